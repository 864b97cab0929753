"""docs/asvr.md: its commands run in their order, its mixed stage trains, discrete inputs are what it says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from asvr_parts import OPTIONS, TRAIN
from test_asvr_tokenizer import GIVEN, OWN, checkpoint

from foveate import assemble, load_recipe, load_run
from foveate.errors import FoveateError, RecipeError
from foveate.progress import Display
from foveate.training import train
from tests.conftest import Command
from tests.corpus import picture, recipe_dict, write_recipe

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "asvr.md").read_text(encoding="utf-8")
COMPARING = (ROOT / "docs" / "comparing.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = PAGE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


def lines(text: str) -> list[list[str]]:
    """Commands as words."""
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]


def test_the_commands_run_in_their_order(
    tmp_path: Path, shared_corpus: Path, foveate_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a tiny model, whose `my.yaml` fits and trains; the published file is one of that layout."""
    monkeypatch.chdir(tmp_path)
    content = recipe_dict(shared_corpus, objectives={"asvr": OPTIONS})
    del content["output"], content["name"]
    content["stages"][0] |= {"train": {**TRAIN, "asvr": 1e-3}, "max_steps": 1}
    write_recipe(tmp_path, content, "my.yaml")
    checkpoint(tmp_path / "epoch_6.pt")
    for number, name in enumerate(("temple.jpg", "flower.png")):
        Path(picture(number, tmp_path)).rename(name)
    every = [words for block in blocks("bash") for words in lines(block)]
    commands = [words for words in every if words[1] != "compare"]  # those of comparing.md, where a test reads them
    assert all(words in lines("".join(blocks("bash", COMPARING))) for words in every if words not in commands)
    assert [words[1] for words in commands] == ["asvr", "train", "import", "train", "train", "show", "show"]
    for words in commands:
        given = (*words[1:], *(GIVEN if words[1] == "import" else ()))
        status, _, errors = foveate_command(*given)
        assert status == 0, (words, errors)
    assert {path.name for path in Path("runs").iterdir()} == {"my-asvr", "published", "discrete"}
    fitted = json.loads(Path("tokenizers/mine/tokenizer.json").read_text())
    assert set(fitted["told"]) == {f"{key}/{d}" for key in ("error", "used", "perplexity", "guess") for d in (1, 2, 3)}
    loaded = load_run("runs/discrete")
    encoder: Any = loaded.learner.lmm.encoder
    for _, seen in loaded.gallery.seen("asvr"):
        codes = seen.targets.stack("semantic")
        shown = encoder.quantizer.decode(codes.flatten(0, 1)).view(*codes.shape[:2], -1)
        with torch.no_grad():
            torch.testing.assert_close(encoder(seen.outputs.pixels), shown, msg="other codes than the LLM is shown")
        break


def test_the_mixed_stage_trains(tmp_path: Path, shared_corpus: Path) -> None:
    """With a tiny model, tokenizer and head: words of captions and documents, codes of captions and bare pictures."""
    [block] = [yaml.safe_load(text) for text in blocks("yaml") if "pictures.json" in text]
    rows = json.loads((shared_corpus / "data.json").read_text())
    one, bare = ([row for row in rows if row["id"].startswith(start)] for start in ("one", "bare"))
    for name, chosen in (("captions", one[:6]), ("pictures", bare[:4]), ("documents", one[6:10])):
        (tmp_path / f"{name}.json").write_text(json.dumps(chosen))
    shutil.copytree(shared_corpus / "images", tmp_path / "images")
    content = {**recipe_dict(shared_corpus, output=str(tmp_path / "run")), **block, "objectives": {"asvr": OPTIONS}}
    recipe = load_recipe(write_recipe(tmp_path, content))
    assert recipe.objectives.keys() == block["objectives"].keys()
    [work, *_] = assemble(recipe).data.stage(recipe.stages[0]).steps()
    assert work.samples == 6 + 2 * 4 + 4
    assert work.counts["asvr"] == (6 + 2 * 4) * 15  # in the template plain every picture opens its sample
    [line, *_] = train(recipe, display=Display(quiet=True)).metrics()
    assert line["loss/asvr"] > 0 and line["loss/text"] > 0


def test_discrete_inputs_without_weights(tmp_path: Path, shared_corpus: Path) -> None:
    """`architecture` plans, with a preset's name too, and cannot train; what is wrong with it is told at its line."""
    path = ROOT / "examples" / "recipes" / "asvr_discrete_vicuna_7b.yaml"
    header = [line.removeprefix("#") for line in path.read_text().splitlines() if line.startswith("#")]
    command = next(words for words in lines("\n".join(header)) if words[:2] == ["foveate", "train"])
    page = next(words for words in lines("".join(blocks("bash"))) if "name=discrete" in words)
    overrides = [page[at + 1] for at, word in enumerate(page) if word == "--set"]
    assert [f"--set {word}".replace("tokenizers/dualtoken", "DIR") for word in overrides[1:]] == [
        f"{first} {second}" for first, second in zip(command[3::2], command[4::2], strict=True)
    ]
    content = recipe_dict(shared_corpus)
    chosen = {"encoder": OWN, "depth": 2, "codebook_size": 8}
    content["model"]["encoder"] = {"type": "quantized", "architecture": chosen}
    with pytest.raises(FoveateError, match="`architecture` brings no weights; give `tokenizer`"):
        assemble(load_recipe(write_recipe(tmp_path, content)))
    for wrong, told in (
        ({"encoder": "siglib"}, r"architecture\.encoder: unknown encoder 'siglib'"),
        ({**chosen, "depth": 0}, r"architecture\.depth: must be greater than 0"),
        ({"depth": 2}, r"architecture\.encoder"),
        ({**chosen, "size": 3}, r"architecture\.size: unknown key"),
    ):
        content["model"]["encoder"]["architecture"] = wrong
        with pytest.raises(RecipeError, match=told):
            load_recipe(write_recipe(tmp_path, content))
