"""`foveate eval`: a run and its export, files and data sets, tables and JSON, and one error for whatever is wrong."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.export import export_model
from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.training import train
from foveate_lab.digits import DigitsDataset
from foveate_lab.export import write_llava
from foveate_lab.scenes import draw
from foveate_lab.scoring import score
from tests.conftest import Command
from tests.corpus import recipe_dict, write_recipe
from tests.plugins.lab.asking import turns

ROOT = Path(__file__).parents[3]
LMMS = ROOT / "examples" / "lmms_eval"
DIGITS = {"task": "questions", "size": 8, "kinds": ["identity", "colour"], "density": 1.0}
SEEN, UNSEEN = {"type": "digits", **DIGITS}, {"type": "digits", "split": "test", **DIGITS}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows eight scenes by heart, and is asked about as many others too."""
    folder = tmp_path_factory.mktemp("digits")
    recipe = recipe_dict(folder, evaluate={"data": [SEEN, UNSEEN], "metrics": ["answers"]})
    stage = {"data": [SEEN], "batch_size": 8, "max_steps": 70, "schedule": "constant"}
    recipe["stages"][0] |= {**stage, "train": {"encoder": 3e-3, "projector": 3e-3, "llm": 3e-3}}
    return train(load_recipe(write_recipe(folder, recipe)), display=Display(quiet=True)).folder


@pytest.fixture(scope="module")
def export(run: Path) -> Path:
    return export_model(run, run.parent / "export", check=False).folder


@pytest.fixture(scope="module")
def file(run: Path) -> Path:
    """The held-out questions as a file with pictures."""
    options = DigitsDataset.Options.model_validate({key: value for key, value in UNSEEN.items() if key != "type"})
    write_llava(run.parent / "files", {"test": DigitsDataset(options)})
    return run.parent / "files" / "test.json"


def answered(foveate_command: Command, *words: object) -> dict[str, Any]:
    status, out, err = foveate_command("eval", *words, "--json")
    assert status == 0, err
    told: dict[str, Any] = json.loads(out)
    return told


def test_generation_agrees_with_what_the_run_found_at_its_end(run: Path, foveate_command: Command) -> None:
    """There, an answer was right where every next token was, the end included: no generation at all."""
    told = answered(foveate_command, run)
    assert told["kind"] == "run" and told["overall"]["n"] == 16 and told["unfinished"] == 0
    (before,) = json.loads((run / "evaluation.json").read_text())
    shares = {kind: row["accuracy"] for kind, row in told["types"].items()}
    assert shares == {kind: before["values"][f"{kind}/accuracy"] for kind in ("identity", "colour")}
    right = [answer["correct"] for answer in told["answers"]]
    assert all(right[:8]) and not all(right[8:])
    assert told["overall"]["correct"] == sum(right)


def test_a_run_and_its_export_tell_the_same(run: Path, export: Path, file: Path, foveate_command: Command) -> None:
    told = [answered(foveate_command, model, "--data", file) for model in (run, export)]
    assert [found.pop("kind") for found in told] == ["run", "export"]
    assert [found.pop("model") for found in told] == [str(run), str(export)]
    assert told[0] == told[1] and len(told[0]["answers"]) == 8
    assert {answer["type"] for answer in told[0]["answers"]} == {"identity", "colour"}
    one = answered(foveate_command, export, "--data", file, "--batch-size", 3, "--limit", 5)
    assert one["answers"] == told[0]["answers"][:5]
    named = answered(foveate_command, export, "--data", json.dumps(UNSEEN))
    assert [answer["answer"] for answer in named["answers"]] == [answer["answer"] for answer in told[0]["answers"]]


def test_the_table_and_the_file_of_answers(run: Path, file: Path, tmp_path: Path, foveate_command: Command) -> None:
    out = tmp_path / "new" / "results.json"
    status, shown, said = foveate_command("eval", run, "--data", file, "--out", out)
    assert status == 0 and str(out) in said and "answering" in said and "opening pictures" in said
    told = json.loads(out.read_text())
    assert "8 questions" in shown and "Wilson" in shown and "yes or no" not in shown
    for kind, row in (*told["types"].items(), ("all", told["overall"])):
        line = next(line for line in shown.splitlines() if f"│ {kind}" in line)
        numbers = [f"{number:.3f}" for number in (row["accuracy"], *row["interval"])]
        assert [cell.strip() for cell in line.strip("│").split("│")] == [kind, "exact", str(row["n"]), *numbers]
    assert told["answers"][0]["prompt"].startswith("<|im_start|>user\n<image>\n")


def test_the_documented_rows_give_both_tables(run: Path, tmp_path: Path, foveate_command: Command) -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    rows, answer = re.findall(r"```json\n(.*?)```", page, re.S)
    (tmp_path / "rows.json").write_text(rows)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (20, 30), "red").save(tmp_path / "pictures" / "street.png")
    words = ("eval", run, "--data", tmp_path / "rows.json", "--images", tmp_path / "pictures")
    told = answered(foveate_command, *words[1:])
    assert [(found["type"], found["metric"]) for found in told["answers"]] == [
        ("adversarial", "yesno"), ("colour", "letter"), ("text", "exact"),
    ]  # fmt: skip
    assert set(told["answers"][0]) == set(json.loads(answer))
    assert told["types"]["adversarial"]["yesno"]["n"] == told["overall"]["yesno"]["n"] == 1
    status, shown, _ = foveate_command(*words)
    assert status == 0 and "yes or no" in shown and "yes ratio" in shown and "taken for yes" in shown


def test_answers_that_do_not_end_are_told(run: Path, file: Path, foveate_command: Command) -> None:
    status, shown, _ = foveate_command("eval", run, "--data", file, "--max-new-tokens", 2)
    assert status == 0 and "8 of 8 answers did not end within 2 tokens; --max-new-tokens" in shown


def test_control_tokens_as_text_are_told(export: Path, tmp_path: Path, foveate_command: Command) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"conversations": turns("Is <|im_end|> a word?", "No.")}))
    status, _, said = foveate_command("eval", export, "--data", tmp_path / "rows.jsonl", "--max-new-tokens", 1)
    assert status == 0 and "1 question holds control tokens" in said


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_other_precisions(run: Path, export: Path, file: Path, precision: str, foveate_command: Command) -> None:
    words = ("--data", file, "--precision", precision, "--device", "cpu")
    ours, theirs = (answered(foveate_command, model, *words) for model in (run, export))
    assert ours["answers"] == theirs["answers"] and ours["precision"] == precision


def test_missing_pictures_are_named_before_anything_is_computed(
    run: Path, export: Path, file: Path, tmp_path: Path, foveate_command: Command
) -> None:
    shutil.copy(file, tmp_path / "test.json")
    shutil.copytree(file.parent / "test", tmp_path / "test")
    (tmp_path / "test" / "000006.png").unlink()
    for model in (run, export):
        status, out, err = foveate_command("eval", model, "--data", tmp_path / "test.json")
        assert (status, out) == (2, "") and "answering" not in err
        assert "one sample is defective" in err and "questions-6'" in err and "000006.png does not exist" in err


def test_a_recipe_without_questions_or_whose_data_are_gone(
    run: Path, tmp_path: Path, shared_corpus: Path, foveate_command: Command
) -> None:
    gone = tmp_path / "rows.json"
    gone.write_text(json.dumps([{"conversations": turns("Say the word.", "Word.")}]))
    for name, evaluate in (("bare", None), ("moved", {"data": [{"path": str(gone)}], "metrics": ["answers"]})):
        recipe = recipe_dict(shared_corpus, output=str(tmp_path / name), evaluate=evaluate)
        recipe["stages"][0] |= {"max_steps": 1}
        folder = train(load_recipe(write_recipe(tmp_path, recipe)), display=Display(quiet=True)).folder
        if evaluate:
            gone.unlink()
        status, _, err = foveate_command("eval", folder)
        assert status == 2 and "give --data" in err, err


WRONG = {
    "no folder": (["NOWHERE", "--data", "FILE"], "is no folder. Give what `foveate train` wrote"),
    "not a model": (["PICTURES", "--data", "FILE"], "neither a run nor an exported Llava"),
    "a model folder": (["RUN/model", "--data", "FILE"], "is not a run: it has no recipe.yaml. Give RUN"),
    "an export alone": (["EXPORT"], "has no data of its own: give --data"),
    "no such file": (["RUN", "--data", "gone.json"], "no such file or folder"),
    "no such data set": (["RUN", "--data", "digts"], "did you mean 'digits'?"),
    "wrong options": (["RUN", "--data", "{type: digits, sizes: 3}"], "did you mean 'size'?"),
    "broken YAML": (["RUN", "--data", "{type: digits"], "YAML syntax"),
    "images without file": (["RUN", "--images", "PARENT"], "--images is the folder of a file's pictures"),
    "images gone": (["RUN", "--data", "FILE", "--images", "NOWHERE"], "no such file or folder"),
    "metric of another form": (["RUN", "--data", "FILE", "--metric", "letter"], "questions-0': the reference 'Digit"),
    "unknown metric": (["RUN", "--data", "FILE", "--metric", "bleu"], "'bleu' is not one of"),
    "out is a folder": (["RUN", "--data", "FILE", "--out", "PARENT"], "name a file, such as"),
    "out cannot be": (["RUN", "--data", "FILE", "--out", "FILE/x.json"], "is not a folder that can be written to"),
    "unknown device": (["RUN", "--data", "FILE", "--device", "gpu"], "device gpu: "),
    "absent device": (["RUN", "--data", "FILE", "--device", "cuda:99"], "device cuda:99: "),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_words_are_one_error(what: str, run: Path, export: Path, file: Path, foveate_command: Command) -> None:
    places = {"NOWHERE": run / "nowhere", "EXPORT": export, "FILE": file, "PARENT": run.parent, "RUN": run}
    places["PICTURES"] = file.parent / "test"
    words, message = WRONG[what]
    for name, path in places.items():
        words = [str(path) + word.removeprefix(name) if word.startswith(name) else word for word in words]
        message = re.sub(rf"\b{name}\b", str(path), message)
    status, out, err = foveate_command("eval", *words)
    assert (status, out) == (2, ""), err
    assert message in " ".join(err.replace("│", " ").split()) and "Traceback" not in err


def test_digits_are_written_in_the_size_that_a_model_was_trained_on(tmp_path: Path, foveate_command: Command) -> None:
    small = ("--captions", 1, "--questions", 1, "--held-out", 3)
    status, _, err = foveate_command("data", "digits", tmp_path / "out", *small, "--cell-px", 32, "--digit-px", 16)
    assert status == 0, err
    made = DigitsDataset(DigitsDataset.Options(split="test", task="questions", size=3, cell_px=32, digit_px=16))
    for index in range(3):
        with Image.open(tmp_path / "out" / "test" / f"{index:06d}.png") as picture:
            assert np.array_equal(np.asarray(picture), draw(made.scene(index)))
    status, _, err = foveate_command("data", "digits", tmp_path / "none", *small, "--digit-px", 32)
    assert status == 2 and "a digit of 32 px does not fit into a cell of 16 px" in err


def test_the_command_is_listed(foveate_command: Command) -> None:
    status, shown, _ = foveate_command("--help")
    assert status == 0 and re.search(r"\beval\b", shown)


# examples/lmms_eval


@pytest.fixture(scope="module")
def task() -> Any:
    """The functions of the task that lmms-eval is given."""
    spec = importlib.util.spec_from_file_location("lmms_eval_digits", LMMS / "tasks" / "utils.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_task_of_lmms_eval_asks_and_scores_the_same(
    task: Any, run: Path, file: Path, foveate_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    found = answered(foveate_command, run, "--data", file)["answers"]
    for row, answer in zip(json.loads(file.read_text()), found, strict=True):
        assert answer["prompt"].count(f"<image>\n{task.question(row)}<") == 1
        assert task.reference(row) == answer["reference"]
        for text in (answer["answer"], f" {answer['reference'].upper()}. ", f"{answer['reference']} 7"):
            right = score("exact", text, answer["reference"], {}).correct
            assert task.score(row, [text]) == {"accuracy": float(right)}
        (picture,) = task.pictures(row)
        assert picture.mode == "RGB" and picture.size == (48, 48)


@pytest.mark.parametrize(("change", "status"), [(None, 0), ("answer", 1), ("missing", 1)])
def test_the_comparison_finds_what_differs(
    run: Path, file: Path, tmp_path: Path, foveate_command: Command, change: str | None, status: int
) -> None:
    out = tmp_path / "results.json"
    assert foveate_command("eval", run, "--data", file, "--out", out)[0] == 0
    samples = [
        {"doc_id": at, "filtered_resps": f"{answer['answer']} ", "accuracy": float(answer["correct"])}
        for at, answer in enumerate(json.loads(out.read_text())["answers"])
    ]
    if change == "answer":
        samples[3]["filtered_resps"] = "other"
    samples = samples[: -1 if change == "missing" else None]
    (tmp_path / "lmms" / "model").mkdir(parents=True)
    path = tmp_path / "lmms" / "model" / "20260101_samples_foveate_digits.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    command = [sys.executable, str(LMMS / "compare.py"), str(out), str(tmp_path / "lmms")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, "") and "accuracy" in done.stdout
