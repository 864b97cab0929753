"""Bad input: one clear error, exit status 2, before anything is computed and before a run folder exists."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import foveate.assembly
import foveate.cli
from foveate.data.templates import template_source
from foveate.data.tokenizer import train_tokenizer
from tests.corpus import ENCODER, LLM, recipe_dict, write_corpus, write_recipe

Rows = list[dict[str, Any]]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(foveate_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command in this process, in an empty folder; returns exit status, stdout, stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return foveate_command


@pytest.fixture
def refused(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Trains a recipe that must be refused; returns its one error. No model is built, no folder made."""

    def build_nothing(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a model was built")

    monkeypatch.setattr(foveate.assembly, "build_lmm", build_nothing)

    def train(recipe: Path, *words: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        status, out, err = command("train", recipe, *words)
        assert status == 2, err
        assert out == "" and err.startswith("error: ") and err.count("error: ") == 1
        assert "Traceback" not in err and "\n\n" not in err.strip()
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return train


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus", samples=24)


def recipe_of(corpus: Path, folder: Path, **changes: Any) -> Path:
    """A recipe in `folder`; `changes` are of its one stage, or of its top level."""
    content = recipe_dict(corpus, output=str(folder / "run"))
    for key, value in changes.items():
        (content if key in ("model", "precision", "hardware") else content["stages"][0])[key] = value
    return write_recipe(folder, content)


def edit(corpus: Path, change: Callable[[Rows], object]) -> None:
    """Changes the rows of the corpus in place."""
    rows = json.loads((corpus / "data.json").read_text())
    change(rows)
    (corpus / "data.json").write_text(json.dumps(rows))


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


LATE = 18
"""A row, of one picture, far from the first."""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("batch_size: 12", "batch_size: 12\n  batchsize: 8", r"unknown key 'batchsize'; did you mean 'batch_size'"),
        ("batch_size: 12", "batch_size: dozen", r"stages\.0\.batch_size: must be a whole number, not 'dozen'"),
        ("batch_size: 12", "batch_size: 12\n  batch_size: 8", r"batch_size.*(twice|duplicate)"),
        ("ENCODER", "encoder: clip-vit-large-patch15-336", r"model\.encoder.*mean 'clip-vit-large-patch14-336'"),
        ("projector: 0.001", "projektor: 0.001", r"stages\.0\.train\.projektor: unknown part.*mean 'projector'"),
        ("data.json", "dota.json", r"stages\.0\.data\.0\.path: no such file or folder: .*dota\.json"),
        ("/images", "/pictures", r"stages\.0\.data\.0\.images: no such file or folder: .*pictures"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_names_line_and_column(
    old: str, new: str, said: str, refused: Callable[..., str], corpus: Path, tmp_path: Path
) -> None:
    path = recipe_of(corpus, tmp_path)
    text = path.read_text()
    if old == "ENCODER":
        old = text[text.index("encoder:") : text.index("  projector:")]
        new += "\n"
    assert old in text
    path.write_text(text.replace(old, new, 1))
    first, *problems = refused(path).splitlines()
    assert first == "error: 1 problem in the recipe" and len(problems) == 1
    assert re.match(rf"{re.escape(str(path))}:\d+:\d+: ", problems[0])
    assert re.search(said, problems[0])
    line = int(problems[0].removeprefix(f"{path}:").split(":")[0])
    wrong = new.strip().splitlines()[-1].strip()
    assert wrong in path.read_text().splitlines()[line - 1]


SEVEN = """\
name: seven
seeed: 1
model:
  encoder: {type: hff, config: {model_type: siglip_vision_model}}
  projector: {type: mlp, depth: deep}
  llm: {config: {model_type: qwen2}}
stages:
  - name: only
    data: [{path: nowhere.json}]
    train: {projector: 1e-3, lmm: 1e-3}
    batch_size: -4
    max_steps: 4
    schedule: cosinus
"""


def test_seven_errors_are_seven_problems(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "seven.yaml"
    path.write_text(SEVEN)
    first, *problems = refused(path).splitlines()
    assert first == "error: 7 problems in the recipe" and len(problems) == 7
    expected = [
        ("2:1", "seeed: unknown key"),
        ("4:19", "model.encoder.type: unknown encoder 'hff'"),
        ("5:33", "model.projector.depth: must be a whole number"),
        ("9:19", "stages.0.data.0.path: no such file"),
        ("10:29", "stages.0.train.lmm: unknown part 'lmm'; did you mean 'llm'?"),
        ("11:17", "stages.0.batch_size: must be greater than 0"),
        ("13:15", "stages.0.schedule: must be 'cosine'"),
    ]
    for problem, (place, said) in zip(problems, expected, strict=True):
        line = place.split(":")[0]
        assert problem.startswith(f"{path}:{line}:") and said in problem, (problem, place)
        assert re.match(rf"{re.escape(str(path))}:\d+:\d+: ", problem)


def test_a_recipe_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    assert f"{tmp_path / 'no.yaml'}" in refused(tmp_path / "no.yaml")


def test_a_missing_image(refused: Callable[..., str], corpus: Path, tmp_path: Path) -> None:
    rows = json.loads((corpus / "data.json").read_text())
    missing = corpus / "images" / rows[LATE]["image"]
    missing.unlink()
    err = refused(recipe_of(corpus, tmp_path))
    assert f"{missing} does not exist" in err and f"data.json[{LATE}], sample {rows[LATE]['id']}: image: " in err
    assert "1 defect " in err and "foveate data check" in err and "on_bad_sample: skip" in err


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_a_truncated_image(
    kind: str, share: float, refused: Callable[..., str], corpus: Path, tmp_path: Path
) -> None:
    from PIL import Image

    rows = json.loads((corpus / "data.json").read_text())
    broken = corpus / "images" / f"broken.{kind}"
    with Image.open(corpus / "images" / rows[LATE]["image"]) as picture:
        picture.resize((200, 200)).save(broken)
    edit(corpus, lambda rows: rows[LATE].update(image=broken.name))
    cut(broken, share)
    err = refused(recipe_of(corpus, tmp_path))
    assert f"{broken} cannot be read" in err and f"data.json[{LATE}], sample {rows[LATE]['id']}: image: " in err
    assert "truncated" in err or "cannot identify" in err


def test_more_placeholders_than_images(refused: Callable[..., str], corpus: Path, tmp_path: Path) -> None:
    edit(corpus, lambda rows: rows[LATE]["conversations"][0].update(value="<image><image>\nWhich?"))
    err = refused(recipe_of(corpus, tmp_path))
    assert f"data.json[{LATE}], sample one{LATE}: placeholders: " in err and "2 <image> placeholders but 1 image" in err


def test_a_sample_without_an_answer(refused: Callable[..., str], corpus: Path, tmp_path: Path) -> None:
    edit(corpus, lambda rows: rows[LATE]["conversations"].__delitem__(slice(1, None)))
    err = refused(recipe_of(corpus, tmp_path))
    assert f"data.json[{LATE}], sample one{LATE}: answer: " in err and "no answer" in err


def test_an_over_long_sample(refused: Callable[..., str], corpus: Path, tmp_path: Path) -> None:
    edit(corpus, lambda rows: rows[LATE]["conversations"][1].update(value="quite long " * 300))
    err = refused(recipe_of(corpus, tmp_path, max_length=256))
    assert f"data.json[{LATE}], sample one{LATE}: long: has " in err
    assert "tokens, max_length is 256 (raise it, or set on_long_sample: drop or cut)" in err


def test_a_malformed_row(refused: Callable[..., str], corpus: Path, tmp_path: Path) -> None:
    """Also where the tokenizer is to be trained on these very rows."""
    edit(corpus, lambda rows: rows[LATE].update(conversations=[{"who": "me"}]))
    err = refused(recipe_of(corpus, tmp_path))
    assert f"data.json row {LATE} (id 'one{LATE}'): row: a turn needs 'from'" in err and "1 defect " in err


def test_a_cut_json_file(refused: Callable[..., str], corpus: Path, tmp_path: Path) -> None:
    cut(corpus / "data.json", 0.9)
    err = refused(recipe_of(corpus, tmp_path))
    assert f"{corpus / 'data.json'} is not JSON" in err and re.search(r"after \d+ rows: Unterminated", err)


def test_a_template_without_generation_mask(refused: Callable[..., str], corpus: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["Which digit? It is 4."], 400)
    unmasked = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template_source("chatml"))
    tokenizer.chat_template = unmasked
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    llm = {**LLM, "tokenizer": str(tmp_path / "tokenizer")}
    model = {"encoder": ENCODER, "projector": "mlp", "llm": llm}
    err = refused(recipe_of(corpus, tmp_path, model=model))
    assert f"template 'chat' of {tmp_path / 'tokenizer'} has no {{% generation %}}" in err
    assert "set the stage's `template` to" in err and "chatml" in err


def test_an_existing_run(command: Command, refused: Callable[..., str], tmp_path: Path, corpus: Path) -> None:
    path = recipe_of(corpus, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: old\n")
    err = refused(path)
    assert str(tmp_path / "run") in err and "--resume" in err
    (tmp_path / "run" / "recipe.yaml").rename(tmp_path / "run" / "thesis.tex")
    for words in ((), ("--resume",)):
        assert "is not a run" in refused(path, *words)


def test_defects_beyond_the_samples_that_are_read_before_training(
    refused: Callable[..., str], corpus: Path, tmp_path: Path
) -> None:
    """`check_samples: null` reads all of them; a few are spread over the whole of a source."""
    cut(corpus / "images" / json.loads((corpus / "data.json").read_text())[LATE]["image"])
    err = refused(recipe_of(corpus, tmp_path, check_samples=None))
    assert "1 defect in the 24 samples" in err
    assert "1 defect in the 8 samples" in refused(recipe_of(corpus, tmp_path, check_samples=8))


def test_held_out_data_are_checked_before_training(refused: Callable[..., str], corpus: Path, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", samples=12)
    edit(other, lambda rows: rows[6]["conversations"][1].update(value=" "))
    held_out = {"data": [{"path": str(other / "data.json"), "images": str(other / "images")}]}
    err = refused(recipe_of(corpus, tmp_path, validate=held_out))
    assert "data.json[6], sample one6: answer: " in err and "empty answer" in err
    content = yaml.safe_load(recipe_of(corpus, tmp_path).read_text())
    content["evaluate"] = {**held_out, "metrics": ["answers"]}
    assert "data.json[6], sample one6: answer: " in refused(write_recipe(tmp_path, content))


def all_wrong(corpus: Path) -> dict[str, str]:
    """Puts one defect of every kind into the corpus; returns sample → kind."""

    def change(rows: Rows) -> None:
        (corpus / "images" / rows[0]["image"]).unlink()
        cut(corpus / "images" / rows[1]["image"])
        rows[6]["conversations"][0]["value"] = "Which digit?"
        del rows[7]["conversations"][1:]
        rows[8]["conversations"][1]["value"] = ""
        rows[12]["conversations"][1]["value"] = "long " * 400
        rows[13]["conversations"] = "What?"
        rows[14]["image"] = "../../../etc/hostname"

    edit(corpus, change)
    return {
        "one0": "image", "one1": "image", "one6": "placeholders", "one7": "answer", "one8": "answer", "one12": "long",
        "one13": "row", "one14": "row",
    }  # fmt: skip


def test_data_check_lists_every_defect_in_one_pass(command: Command, corpus: Path, tmp_path: Path) -> None:
    expected = all_wrong(corpus)
    status, out, err = command("data", "check", recipe_of(corpus, tmp_path, max_length=256))
    assert status == 2 and "Traceback" not in err
    lines = [line for line in out.splitlines() if line.startswith("data.json[")]
    assert len(lines) == len(expected)
    for line, (sample, kind) in zip(lines, expected.items(), strict=True):
        assert sample in line and f": {kind}: " in line
        assert line.startswith(f"data.json[{sample.removeprefix('one')}]")
    status, out, _ = command("data", "check", recipe_of(corpus, tmp_path, max_length=256), "--json")
    found = json.loads(out)["only"]["defects"]
    assert status == 2 and [entry["kind"] for entry in found] == list(expected.values())


def test_training_shows_the_first_defects_of_many(refused: Callable[..., str], corpus: Path, tmp_path: Path) -> None:
    expected = all_wrong(corpus)
    err = refused(recipe_of(corpus, tmp_path, max_length=256))
    assert f"{len(expected)} defects in the 24 samples" in err and all(sample in err for sample in expected)


def test_skipping_trains_around_a_bad_picture(command: Command, corpus: Path, tmp_path: Path) -> None:
    edit(corpus, lambda rows: cut(corpus / "images" / rows[LATE]["image"]))
    path = recipe_of(corpus, tmp_path, on_bad_sample="skip", max_bad_rate=0.05, batch_size=8, max_steps=6)
    status, _, err = command("train", path)
    assert status == 0, err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [sum(line["samples"] for line in lines[epoch : epoch + 3]) for epoch in (0, 3)] == [23, 23]
    assert (tmp_path / "run" / "model" / "foveate.json").is_file()


def test_skipping_also_where_the_tokenizer_is_trained(command: Command, corpus: Path, tmp_path: Path) -> None:
    edit(corpus, lambda rows: rows[LATE].update(conversations="What?"))
    path = recipe_of(corpus, tmp_path, on_bad_sample="skip", max_bad_rate=0.05, max_steps=2)
    status, _, err = command("train", path)
    assert status == 0, err


def test_skipping_stops_above_the_rate_before_training(
    refused: Callable[..., str], corpus: Path, tmp_path: Path
) -> None:
    edit(corpus, lambda rows: [cut(corpus / "images" / rows[number]["image"]) for number in (0, 6, 12, 18)])
    err = refused(recipe_of(corpus, tmp_path, on_bad_sample="skip", max_bad_rate=0.1))
    assert "4 defects in the 24 samples" in err and "max_bad_rate" in err


def test_skipping_stops_above_the_rate_in_training(command: Command, corpus: Path, tmp_path: Path) -> None:
    """Where the samples that were read beforehand are sound, and too many of the rest are not."""
    edit(corpus, lambda rows: [cut(corpus / "images" / rows[number]["image"]) for number in (1, 7, 13, 19)])
    changes: dict[str, Any] = {"on_bad_sample": "skip", "max_bad_rate": 0.1, "check_samples": 1, "batch_size": 6}
    status, _, err = command("train", recipe_of(corpus, tmp_path, **changes))
    assert status == 2 and "Traceback" not in err
    message = err[err.index("error: ") :]
    assert "samples were skipped as defective: max_bad_rate is 0.1" in message and "cannot be read" in message


def test_a_defect_met_in_training_names_the_sample(command: Command, corpus: Path, tmp_path: Path) -> None:
    edit(corpus, lambda rows: cut(corpus / "images" / rows[LATE]["image"]))
    status, _, err = command("train", recipe_of(corpus, tmp_path, check_samples=1, hardware={"workers": 1}))
    assert status == 2 and "Traceback" not in err
    message = err[err.index("error: ") :]
    assert f"sample 'one{LATE}'" in message and "cannot be read" in message
    assert "foveate data check" in message


