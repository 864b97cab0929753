"""The code blocks of the documentation run as they stand."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import foveate.cli
from foveate.assembly import assemble
from foveate.objective import Moment
from foveate.plugins import installed_plugins
from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.registry import load_registry, resolve
from foveate.testing import ConformanceError, check_objective
from foveate.training import train
from tests.corpus import recipe_dict, write_recipe
from tests.distributions import install_project, on_path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OBJECTIVES = "writing-an-objective.md"


def blocks(page: str, language: str = "python") -> list[str]:
    """The fenced blocks of a page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.S | re.M)


def test_the_python_page_runs(tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One namespace for the page: later blocks use names of earlier ones."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, recipe_dict(shared_corpus, output="runs/docs"))
    names: dict[str, Any] = {}
    found = blocks("python-api.md")
    assert len(found) >= 3
    for block in found:
        exec(compile(block, "python-api.md", "exec"), names)
    losses = names["losses"]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert names["run"].folder == tmp_path / "runs" / "docs"
    loop = found[1].split("import foveate\n\n")[1]
    assert len([line for line in loop.splitlines() if line.strip()]) <= 20


# ross.md, victor.md and asvr.md


@pytest.mark.parametrize(("page", "least"), [("ross.md", 9), ("victor.md", 6), ("asvr.md", 9)])
def test_every_variant_of_a_methods_page_plans(
    page: str, least: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each block in a recipe with an encoder and an LLM of the paper, without weights."""
    found = blocks(page, "yaml")
    assert len(found) >= least
    for number, block in enumerate(found):
        objectives = yaml.safe_load(block)["objectives"]
        stage = {"name": "align", "data": [{"path": "absent.json"}], "batch_size": 8, "max_steps": 1}
        content = {
            "model": {"encoder": "clip-vit-large-patch14-336", "projector": "mlp", "llm": "qwen2-7b-instruct"},
            "objectives": objectives, "stages": [{**stage, "train": dict.fromkeys(["projector", *objectives], 1e-3)}],
        }  # fmt: skip
        command(f"foveate plan {write_recipe(tmp_path, content, f'{number}.yaml')} --no-data --json")
        [planned] = json.loads(capsys.readouterr().out)["stages"]
        assert set(objectives) <= {row["part"] for row in planned["parts"]}, block


def test_the_python_of_the_ross_page_runs(
    tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"teacher": {"type": "patches", "patch_px": 4}, "denoiser": {"width": 16, "depth": 1, "heads": 2}}
    content = recipe_dict(shared_corpus, output="runs/my-ross", objectives={"ross": options})
    content["stages"][0] |= {"max_steps": 1, "train": {"projector": 1e-3, "llm": 1e-3, "ross": 1e-3}}
    train(load_recipe(write_recipe(tmp_path, content)), display=Display(quiet=True))
    [block] = blocks("ross.md")
    names: dict[str, Any] = {}
    exec(compile(block, "ross.md", "exec"), names)
    assert len(names["found"].own) > 20 and names["worst"] in names["found"].images


# writing-an-objective.md

QUOTES = re.findall(r'`([\w ]+)`: "([^"]+)"', (DOCS / OBJECTIVES).read_text(encoding="utf-8"))
"""Check of the kit, and what it says, as the page's table of rules quotes it."""


def command(words: str) -> None:
    """A `foveate` command that must succeed."""
    with pytest.raises(SystemExit) as leaving:
        foveate.cli.main(words.split()[1:])
    assert not leaving.value.code, words


def test_from_nothing_to_a_training_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The page's commands, recipes, objective, its test and its registry entry, in the page's order."""
    monkeypatch.chdir(tmp_path)
    lines = [shlex.join(shlex.split(line, comments=True)) for line in blocks(OBJECTIVES, "bash")[0].splitlines()]
    new, install, tests, run, show = lines
    command(new)
    project = tmp_path / install.split()[-1]
    assert tests == f"pytest {project.name}"
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "digits.yaml").write_text((ROOT / "examples" / "digits.yaml").read_text())
    first, second, registry = blocks(OBJECTIVES, "yaml")
    path = tmp_path / run.split()[-1]
    path.write_text(first)
    short = ["stages.0.max_steps=2", "stages.0.epochs=null", "stages.0.data.0.size=40", "hardware.workers=0"]
    install_project(tmp_path / "template", project)
    with on_path(tmp_path / "template"):
        made = train(load_recipe(path, short), display=Display(quiet=True))
        assert made.folder == tmp_path / show.split()[2]
        command(f"{show} --count 2")
        assert list((made.folder / "pictures" / "show").glob("*.png"))
    found = blocks(OBJECTIVES)
    (project / "foveate_raw_patches" / "objective.py").write_text(found[0])
    install_project(tmp_path / "site", project)
    with on_path(tmp_path / "site"):
        names: dict[str, Any] = {}
        exec(compile(found[-1], OBJECTIVES, "exec"), names)
        for test in [names[name] for name in names if name.startswith("test_")]:
            test(**{fixture: request.getfixturevalue(fixture) for fixture in inspect.signature(test).parameters})
        [*_, line] = train(load_recipe(path, [*short, "name=again"]), display=Display(quiet=True)).metrics()
        assert 0.5 < line["loss/raw-patches"] < 2 and 0 <= line["raw-patches/beats_mean"] <= 1
        path.write_text(second)
        check_two_of_one_type(path)
        (tmp_path / "registry.yaml").write_text(registry)
        catalogue, problems = load_registry([tmp_path])
        assert not problems and catalogue.known["objectives"]["edge-map"].distribution == "foveate-edge-map"
        [preset] = catalogue.presets["objectives"]
        chosen = resolve("objectives", preset, {"plugins": installed_plugins(), "registry": catalogue})
        assert (chosen.type, chosen.resolved()["hidden"]) == ("raw-patches", 2048)


def check_two_of_one_type(path: Path) -> None:
    """The recipe passes the checks before training, and both objectives have a loss on its data."""
    made = assemble(load_recipe(path, ["stages.0.data.0.size=40", "hardware.workers=0"]))
    both = [made.recipe.active(stage) for stage in made.recipe.stages]
    assert both == [("pixels", "seen")]
    batch = next(iter(made.data.stage(made.recipe.stages[0]).steps())).batches[0]
    assert set(made.learner(batch, Moment()).terms) == {"text", "pixels", "seen"}


def run_in(module: ModuleType, *sources: str) -> ModuleType:
    """Runs sources as the text of a module that can be imported, as loader processes import an objective's."""
    sys.modules[module.__name__] = module
    for source in sources:
        exec(compile(source, OBJECTIVES, "exec", dont_inherit=True), vars(module))
    return module


@pytest.fixture(scope="module")
def page() -> Iterator[ModuleType]:
    """All but the last block of the page, which needs the plugin installed, in one module."""
    module = ModuleType("writing_an_objective")
    yield run_in(module, *blocks(OBJECTIVES)[:-1])
    del sys.modules[module.__name__]


@pytest.mark.parametrize("name", re.findall(r"^class (\w+)", "".join(blocks(OBJECTIVES)), re.M))
def test_an_objective_of_the_page_keeps_the_contract(page: ModuleType, name: str) -> None:
    """`Pictured` is for pictures that can be decoded; the page says so."""
    check_objective(getattr(page, name), {"teacher": "patches"} if name == "Pictured" else {})


BROKEN: dict[str, tuple[str, str, str]] = {
    "It is the mean over units, not the sum.": ("RawPatchesLoss", "errors.sum()", "errors.mean()"),
    "samples influence each other": (
        "RawPatchesLoss", "self.head(outputs.states())", "self.head(outputs.states() - outputs.states().mean(0))",
    ),
    "loss draws from the global generator of torch": (
        "Noisy", 'outputs.randn_rows(states.shape[-1], name="noise")', "torch.randn_like(states)",
    ),
    "It writes the attributes centre.": (
        "RawPatchesLoss", "errors = self.errors(outputs, targets)",
        "errors = self.errors(outputs, targets) * getattr(self, 'centre', 1.0); self.centre = errors.detach().mean()",
    ),
    "'wide picture': loss nan": (
        "RawPatchesLoss", "targets.rows()", "targets.rows() / targets.rows().norm(dim=-1, keepdim=True)",
    ),
    "keeps its teacher as a sub-module": (
        "MeanColour", "return nn.Sequential(nn.AvgPool2d(8), nn.BatchNorm2d(3, affine=False, momentum=None))",
        "self.kept = nn.Sequential(nn.AvgPool2d(8), nn.BatchNorm2d(3)); return self.kept",
    ),
    "names of metrics depend on the batch": (
        "RawPatchesLoss", '{"beats_mean":', '{"beats_mean" if len(errors) > 16 else "few":',
    ),
    "writes into inputs.tokens": (
        "Masked", "return Edit(self.mask.expand_as(inputs.tokens),",
        "inputs.tokens[hidden] = self.mask.detach(); return Edit(inputs.tokens,",
    ),
}  # fmt: skip
"""What the page says that the kit says → an objective of the page, and how it is broken: its text before and after."""


def test_the_page_quotes_every_broken_rule() -> None:
    assert [quote for _, quote in QUOTES] == list(BROKEN)


@pytest.mark.parametrize(("check", "quote"), QUOTES, ids=[quote for _, quote in QUOTES])
def test_the_kit_says_of_a_broken_rule_what_the_page_quotes(page: ModuleType, check: str, quote: str) -> None:
    name, right, wrong = BROKEN[quote]
    parts = [part for block in blocks(OBJECTIVES) for part in re.split(r"^(?=class )", block, flags=re.M)]
    [source] = [part for part in parts if part.startswith(f"class {name}(")]
    assert source.count(right) == 1
    broken = ModuleType("broken_objective")
    vars(broken).update({key: value for key, value in vars(page).items() if not key.startswith("__")})
    try:
        cls = getattr(run_in(broken, source.replace(right, wrong)), name)
        with pytest.raises(ConformanceError) as caught:
            check_objective(cls)
    finally:
        del sys.modules[broken.__name__]
    failure = caught.value.report.of(check)
    assert failure.status == "failed" and quote in failure.told
