"""`foveate plugins`, `plugins show` and `new-plugin`: what they tell, what they refuse, and that it can be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import foveate.cli
import foveate.yaml_tree
from foveate import plugin_cli, scaffold
from foveate.plugins import BLOCK, KINDS, load_plugins
from foveate.recipe_file import load_recipe
from foveate.yaml_tree import parse_yaml
from tests.corpus import recipe_dict, write_recipe
from tests.distributions import HOOKS, install, on_path, registering

Command = Callable[..., tuple[int, str, str]]

RICH = """\
from typing import Literal

import foveate
from foveate import ObjectiveOptions, Options, Reads
from pydantic import Field

class Blur(Options):
    '''How a picture is blurred.'''
    sigma: float = Field(1.5, gt=0, description="Standard deviation in pixels.")
    sizes: tuple[int, ...] = Field(description="Sizes | of kernels.")

class Rich(foveate.VisionObjective):
    '''Rebuilds a blurred picture.

    More of it.
    '''
    role = "target"
    batch_dependent = True

    class Options(ObjectiveOptions):
        mode: Literal["soft", "hard"] = Field(description="How: softly\\nor not.")
        width: int = Field(gt=3, description="Channels: many, # or few.")
        blur: Blur = Field(Blur(sizes=(3,)), description="The blur.")
        name: str | None = Field(None, description="Anything.")
        layers: tuple[int, ...] = Field((1, 2), description="Layers.")
        when: list[str] = Field(default_factory=list, description="When.")

    @classmethod
    def reads(cls, options):
        return Reads(llm=options.layers, shift=1)

    def build_teacher(self):
        return None

    def loss(self, outputs, targets, state):
        raise NotImplementedError

class Simple(Rich):
    role = "input"
    batch_dependent = False

    class Options(ObjectiveOptions):
        layer: float = Field(0.5, description="Layer.")
        teacher: foveate.TeacherChoice | None = Field(None, description="Teacher.")

    @classmethod
    def reads(cls, options):
        return Reads(llm=(options.layer, -1), encoder=(-2,), teacher=(0,), shift=1)

    def edit_visual_tokens(self, inputs):
        return None
"""


CATALOGUE = """\
encoders:
  wide: {type: hf, pretrained: nobody/wide}
teachers:
  small: {type: patches}
objectives:
  simple: {distribution: foveate-rich, summary: is simple, paper: "2501.00001", install: pip install foveate-rich}
  sober: {distribution: foveate-sober, summary: stays sober, install: pip install foveate-sober}
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Installed distributions with the objectives `rich` and `simple` and one that is broken, and a catalogue."""
    (tmp_path / "registry.yaml").write_text(CATALOGUE)
    monkeypatch.setattr("foveate.registry.packaged_registry", lambda: tmp_path / "registry.yaml")
    with on_path(tmp_path / "site") as folder:
        targets = {"rich": "'rich_things:Rich'", "simple": "'rich_things:Simple'"}
        install(folder, "foveate-rich", {"rich_plugin.py": registering(**targets), "rich_things.py": RICH})
        install(folder, "foveate-neat", {"neat_plugin.py": "raise RuntimeError('half installed')"})
        yield folder


def told(foveate_command: Command, *words: object) -> Any:
    """What a command says as JSON."""
    status, out, err = foveate_command(*words, "--json")
    assert status == 0, err
    return json.loads(out)


def test_the_list_shows_owners_versions_kinds_states_and_what_is_known(
    foveate_command: Command, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(site, "foveate-shut", {"shut_plugin.py": registering(shut="dict")})
    source = HOOKS + "@foveate.hookimpl\ndef step_finished(run): 0\n"
    install(site, "foveate-watch", {"watch_plugin.py": source})
    monkeypatch.setenv(BLOCK, "shut,absent")
    listed = told(foveate_command, "plugins")
    plugins = {plugin["owner"]: plugin for plugin in listed["plugins"]}
    assert {owner: plugin["state"] for owner, plugin in plugins.items()} == {
        "foveate (core)": "ok",
        **dict.fromkeys(("foveate (lab)", "foveate (ross)", "foveate (victor)", "foveate (asvr)"), "ok"),
        "foveate-neat (neat)": "broken",
        "foveate-rich (rich)": "ok",
        "foveate-shut (shut)": "blocked",
        "foveate-watch (watch)": "ok",
    }
    assert plugins["foveate-rich (rich)"]["registers"] == {"objectives": ["rich", "simple"]}
    assert plugins["foveate-rich (rich)"]["version"] == "1.2.3"
    assert {"hf", "timm"} <= set(plugins["foveate (core)"]["registers"]["encoders"])
    assert plugins["foveate-watch (watch)"]["hooks"] == ["step_finished"]
    assert "Traceback" in plugins["foveate-neat (neat)"]["reason"]
    assert listed["blocked_but_absent"] == ["absent"]
    (known,) = listed["known"]
    assert (known["name"], known["kind"]) == ("sober", "objectives")
    assert (known["distribution"], known["install"]) == ("foveate-sober", "pip install foveate-sober")

    status, out, _ = foveate_command("plugins")
    assert status == 0 and "Traceback" not in out
    for words in ("foveate-rich (rich)", "1.2.3", "objectives: rich, simple", "hooks: step_finished"):
        assert words in out
    assert "broken: RuntimeError: half installed" in out and f"blocked: the environment variable {BLOCK}" in out
    assert "names 'absent', which is not installed" in out
    assert "pip install foveate-sober" in out and "stays sober" in out and "is simple" not in out


def test_the_list_imports_no_torch(site: Path) -> None:
    code = (
        "import sys\n"
        "from foveate.cli import main\n"
        "for words in (['plugins'], ['plugins', '--json'], ['plugins', '--help']):\n"
        "    try:\n"
        "        main(words)\n"
        "    except SystemExit as leaving:\n"
        "        print('STATUS', leaving.code)\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'numpy', 'PIL', 'rich_things'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert [line for line in done.stdout.splitlines() if line.startswith(("STATUS", "HEAVY"))] == [
        "STATUS 0", "STATUS 0", "STATUS 0", "HEAVY []",
    ], done.stderr  # fmt: skip
    assert "foveate-rich (rich)" in done.stdout


def test_an_objective_is_described_with_every_option(foveate_command: Command, site: Path) -> None:
    found = told(foveate_command, "plugins", "show", "rich")
    rows = {row["key"]: row for row in found["options"]}
    own = ["mode", "width", "blur", "name", "layers", "when"]
    common = ["weight", "start_step", "end_step", "probability", "from_model", "fit_before"]
    assert list(rows) == [*own, *common, "blur.sigma", "blur.sizes"]
    assert rows["mode"] == {
        "key": "mode", "type": "soft | hard", "default": "required", "meaning": "How: softly or not.",
    }  # fmt: skip
    assert (rows["width"]["type"], rows["width"]["default"]) == ("whole number > 3", "required")
    assert (rows["name"]["type"], rows["name"]["default"]) == ("text | null", "null")
    assert (rows["layers"]["default"], rows["when"]["default"]) == ("[1, 2]", "computed")
    assert (rows["blur"]["type"], rows["blur"]["default"]) == ("mapping", "see below")
    assert rows["blur.sigma"] == {
        "key": "blur.sigma", "type": "number > 0", "default": "1.5", "meaning": "Standard deviation in pixels.",
    }  # fmt: skip
    assert rows["blur.sizes"]["default"] == "required"
    assert found["owner"] == "foveate-rich (rich)" and found["version"] == "1.2.3"
    assert found["summary"] == "Rebuilds a blurred picture.\n\nMore of it."
    assert found["facts"]["code"] == "rich_things.Rich" and found["facts"]["teacher"] == "its own"
    assert found["facts"]["images"].startswith("`target` images")
    assert found["facts"]["reads"] == "depends on its required options"
    assert "compares the images of a batch" in found["facts"]["also"]
    assert yaml.safe_load(found["use"]) == {
        "objectives": {"rich": {"weight": 1.0, "mode": "soft", "width": "<whole number > 3>"}},
        "train": {"rich": 1e-3},
    }
    status, out, _ = foveate_command("plugins", "show", "rich")
    assert status == 0 and "More of it." in out and found["use"] in out
    assert all(key in out for key in rows)


def test_what_an_objective_reads_and_does(foveate_command: Command, site: Path) -> None:
    facts = told(foveate_command, "plugins", "show", "simple")["facts"]
    teachers = [*load_plugins().names["teachers"], "small"]
    assert facts["images"] == "those that the model sees"
    assert facts["reads"] == (
        "LLM at layer 0.5, -1; encoder at layer -2; encoder, for its teacher, at layer 0; "
        "states of the token before each visual token"
    )
    assert facts["teacher"] == f"the one that the option `teacher` names, of {', '.join(teachers)}"
    assert facts["also"] == "edits the visual tokens"
    assert facts["paper"] == "arXiv 2501.00001"
    assert "paper" not in told(foveate_command, "plugins", "show", "rich")["facts"]


@pytest.mark.parametrize("name", ["rich", "simple"])
def test_the_lines_make_a_recipe(
    name: str, foveate_command: Command, site: Path, tmp_path: Path, shared_corpus: Path
) -> None:
    """Pasted, with a number where one is asked for, they load; JSON may be asked for before `show` too."""
    lines = told(foveate_command, "plugins", "--json", "show", name)["use"].replace('"<whole number > 3>"', "7")
    pasted = yaml.safe_load(lines)
    content = recipe_dict(shared_corpus, objectives=pasted["objectives"])
    content["stages"][0]["train"] |= pasted["train"]
    loaded = load_recipe(write_recipe(tmp_path, content))
    assert loaded.objectives[name].type == name and loaded.stages[0].train[name].lr == 1e-3
    assert getattr(loaded.objectives[name].options, "width", 7) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_comes_along_is_described_and_its_lines_parse(kind: str, foveate_command: Command) -> None:
    for name, entry in load_plugins().names[kind].items():
        found = told(foveate_command, "plugins", "show", name, "--kind", kind)
        assert found["owner"] == entry.owner and found["summary"] != "It has no description.", name
        options = getattr(entry.load(), "Options", None)
        keys = [info.alias or key for key, info in options.model_fields.items()] if options else []
        assert sorted(row["key"] for row in found["options"] if "." not in row["key"]) == sorted(keys)
        if kind == "commands":
            assert foveate_command(*found["use"].split()[1:])[0] == 0
            continue
        problems = parse_yaml(found["use"], Path(), lambda *place: foveate.yaml_tree.Place("pasted")).problems
        assert not problems and name in json.dumps(yaml.safe_load(found["use"]))
        assert foveate_command("plugins", "show", name, "--kind", kind)[0] == 0


def test_a_name_of_several_kinds(foveate_command: Command, site: Path) -> None:
    status, _, err = foveate_command("plugins", "show", "hf")
    assert status == 2 and "--kind encoders or --kind llms or --kind datasets" in err
    assert told(foveate_command, "plugins", "show", "hf", "--kind", "llms")["kind"] == "llms"
    install(site, "foveate-hf", {"hf_plugin.py": registering(hf="'rich_things:Simple'")})
    with on_path(site):
        assert told(foveate_command, "plugins", "show", "hf")["kind"] == "objectives"
    status, _, err = foveate_command("plugins", "show", "hf", "--kind", "llm")
    assert status == 2 and "did you mean 'llms'?" in err


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["richh"], "nothing is registered as 'richh'; did you mean 'rich'?"),
        (["sober"], "as 'sober'. 'sober' (stays sober) comes with foveate-sober: pip install foveate-sober"),
        (["sobre"], "as 'sobre'; did you mean 'sober'? 'sober' (stays sober) comes with foveate-sober: pip install"),
        (["rich", "--kind", "encoders"], "nothing is registered as 'rich'"),
        (["wide"], "'wide' is a preset of the encoders, of type 'hf': foveate plugins show hf --kind encoders"),
        (["tidy"], "The plugin foveate-neat (neat) is not available and may be what is missing: RuntimeError: half"),
    ],
)
def test_an_unknown_name(foveate_command: Command, site: Path, words: list[str], answer: str) -> None:
    status, out, err = foveate_command("plugins", "show", *words)
    assert (status, out) == (2, "") and answer in err and "Traceback" not in err


@pytest.mark.parametrize("name", ["neat", "foveate-neat", "foveate-neat (neat)"])
def test_a_broken_plugin_is_shown_with_its_traceback(foveate_command: Command, site: Path, name: str) -> None:
    status, _, err = foveate_command("plugins", "show", name)
    assert status == 2 and "foveate-neat (neat) is not available" in err
    assert "Traceback" in err and "raise RuntimeError('half installed')" in err


def test_a_class_that_cannot_be_imported_and_one_that_is_no_objective(foveate_command: Command, site: Path) -> None:
    source = registering(gone="'nowhere_at_all:Objective'", wrong="dict")
    install(site, "foveate-odd", {"odd_plugin.py": source})
    status, _, err = foveate_command("plugins", "show", "gone")
    assert status == 2 and "objective 'gone' of foveate-odd (odd) cannot be imported" in err and "Traceback" in err
    status, _, err = foveate_command("plugins", "show", "wrong")
    assert status == 2 and "<class 'dict'> is no subclass of VisionObjective" in err


def test_a_plugin_by_its_own_name(foveate_command: Command, site: Path) -> None:
    listed = told(foveate_command, "plugins", "show", "foveate")["plugins"]
    assert {plugin["distribution"] for plugin in listed} == {"foveate"} and len(listed) >= 2
    status, out, _ = foveate_command("plugins", "show", "foveate-rich")
    assert status == 0 and "objectives: rich, simple" in out and "foveate (core)" not in out


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("Edge", "small letters, digits"),
        ("edge map", "small letters, digits"),
        ("1edge", "small letters, digits"),
        ("edge-", "small letters, digits"),
        ("../edge", "small letters, digits"),
        ("", "small letters, digits"),
        ("projector", "means something else in a recipe"),
        ("text", "means something else in a recipe"),
        ("null", "means something else in a recipe"),
        ("rich", "there is an objective 'rich' already, that of foveate-rich (rich)"),
        ("sober", "there is an objective 'sober' already, that of foveate-sober"),
        ("neat", "foveate-neat is installed already"),
        ("lab", "foveate-lab is installed already"),
    ],
)
def test_new_plugin_refuses_bad_and_taken_names(
    foveate_command: Command, site: Path, tmp_path: Path, name: str, answer: str
) -> None:
    status, out, err = foveate_command("new-plugin", "--out", tmp_path / "new", "--", name)
    assert (status, out) == (2, "") and answer in err and len(err.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_new_plugin_replaces_nothing_and_leaves_nothing_half_written(
    foveate_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "foveate-edge"
    folder.mkdir()
    (folder / "mine").touch()
    status, _, err = foveate_command("new-plugin", "edge", "--out", tmp_path)
    assert status == 2 and "exists already" in err and [path.name for path in folder.iterdir()] == ["mine"]
    renamed = scaffold._renamed

    def failing(text: str, names: Any) -> str:
        if text.endswith("objective.py"):
            raise OSError(28, "No space left on device")
        return renamed(text, names)

    monkeypatch.setattr(scaffold, "_renamed", failing)
    status, _, err = foveate_command("new-plugin", "edge", "--out", tmp_path / "new")
    assert status == 2 and "No space left on device" in err and list((tmp_path / "new").iterdir()) == []


def test_the_template_is_found_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel puts it beside the modules; a checkout has it among the examples."""
    checkout = scaffold.template_folder()
    assert checkout == Path(foveate.__file__).resolve().parents[2] / "examples" / "plugin_template"
    installed = tmp_path / "site-packages" / "foveate"
    (installed / "plugin_template").mkdir(parents=True)
    monkeypatch.setattr(scaffold, "__file__", str(installed / "scaffold.py"))
    assert scaffold.template_folder() == installed / "plugin_template"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("objectives", "commands")])
def test_required_options_of_every_kind_stand_in_the_lines(kind: str) -> None:
    words = [("path", "path", "Rows: # of it"), ("mode", "`a` | `b`", "How."), ("n", "number ≥ 0, ≤ 1", "Share.")]
    pasted: Any = yaml.safe_load(plugin_cli.recipe_lines(kind, "thing", words))
    expected = {"type": "thing", "path": "<path>", "mode": "a", "n": "<number ≥ 0, ≤ 1>"}
    while pasted != expected:
        assert len(pasted) == 1
        (pasted,) = pasted.values() if isinstance(pasted, dict) else pasted
