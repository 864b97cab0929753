"""Discovery: every way to be broken disturbs nobody who does not ask, and is told by name to whoever does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from foveate.errors import PluginError, RecipeError, TrainingError
from foveate.plugins import BLOCK, load_plugins
from foveate.recipe_file import load_recipe
from tests.corpus import recipe_dict, write_recipe
from tests.distributions import HOOKS, OBJECTIVE, install, on_path, registering

OWNER = "foveate-neat (neat)"
HOOK = "@foveate.hookimpl\ndef register_objectives(register): "
BROKEN = {
    "raises on import": ("raise RuntimeError('half installed')", ["RuntimeError: half installed", "Traceback"]),
    "exits on import": ("raise SystemExit(3)", ["SystemExit: 3"]),
    "lacks a library": ("import a_library_that_nobody_has", ["No module named 'a_library_that_nobody_has'"]),
    "no version": ("import foveate\n" + HOOK + "0", ["does not declare HOOK_API; write HOOK_API = 1"]),
    "other version": ("HOOK_API = 2", ["declares HOOK_API = 2; this foveate speaks 1"]),
    "misspelt hook": (
        HOOKS + "@foveate.hookimpl\ndef register_objectivs(register): 0",
        ["implements the unknown hook 'register_objectivs'; did you mean 'register_objectives'?"],
    ),
    "misspelt beside a sound one": (
        HOOKS + HOOK + "register('neat', dict)\n@foveate.hookimpl\ndef steps_finished(run): 0",
        ["implements the unknown hook 'steps_finished'; did you mean 'step_finished'?"],
    ),
    "unmarked hook": (HOOKS + "def register_objectives(register): 0", ["put @foveate.hookimpl above it"]),
    "no hook": (HOOKS, ["implements no hook; those are register_encoders, "]),
    "wrong argument": (
        HOOKS + "@foveate.hookimpl\ndef register_objectives(registry): 0",
        ["register_objectives(registry)", "Argument(s) {'registry'} are declared in the hookimpl but can not"],
    ),
    "wrong argument of an observer": (
        HOOKS + HOOK + "register('neat', dict)\n@foveate.hookimpl\ndef step_finished(run, steps): 0",
        ["step_finished(run, steps)", "{'steps'}"],
    ),
    "hook raises": (HOOKS + HOOK + "1 / 0", ["ZeroDivisionError"]),
    "one name twice": (
        HOOKS + HOOK + "[register('neat', 'neat_things:A'), register('neat', 'neat_things:B')]",
        ["registers objective 'neat' twice"],
    ),
    "no target": (HOOKS + HOOK + "register('neat', 'neat_things.A')", ["'neat_things.A'; give a class or 'module:"]),
    "no name": (HOOKS + HOOK + "register(dict, 'neat')", ["registers <class 'dict'> among the objectives"]),
}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    with on_path(tmp_path / "site") as folder:
        yield folder


def recipe(folder: Path, corpus: Path, *objectives: str) -> Path:
    """A recipe that trains the projector and `objectives`."""
    content = recipe_dict(corpus, objectives={name: {} for name in objectives})
    content["stages"][0]["train"] = {"projector": 1e-3, **dict.fromkeys(objectives, 1e-3)}
    return write_recipe(folder, content, f"{'-'.join(objectives) or 'plain'}.yaml")


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_plugin_harms_nobody_and_is_told_to_whoever_asks(
    how: str, site: Path, tmp_path: Path, shared_corpus: Path
) -> None:
    source, reasons = BROKEN[how]
    install(site, "foveate-neat", {"neat_plugin.py": source}, neat="neat_plugin")
    install(site, "foveate-sound", {"sound_plugin.py": registering(sound="'sound_things:Objective'")})
    (site / "sound_things.py").write_text(OBJECTIVE)
    plugins = load_plugins()
    assert set(plugins.broken) == {OWNER} and not plugins.blocked
    assert OWNER not in dict(plugins.manager.list_name_plugin())
    assert all(entry.owner != OWNER for names in plugins.names.values() for entry in names.values())
    assert not any(entry.plugin_name == OWNER for entry in plugins.manager.hook.step_finished.get_hookimpls())
    load_recipe(recipe(tmp_path, shared_corpus), plugins=plugins)
    loaded = load_recipe(recipe(tmp_path, shared_corpus, "sound"), plugins=plugins)
    assert loaded.objectives["sound"].cls.__module__ == "sound_things"
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe(tmp_path, shared_corpus, "neat"), plugins=plugins)
    assert len(error.value.problems) == 1
    assert "objectives.neat: unknown objective 'neat'" in str(error.value)
    for reason in [OWNER, *reasons]:
        assert reason in str(error.value)


def test_a_module_that_is_not_there(site: Path) -> None:
    install(site, "foveate-neat", {"other.py": ""}, neat="neat_plugin")
    install(site, "foveate-odd", {"another.py": ""}, odd="another:plugin")
    broken = load_plugins().broken
    assert "No module named 'neat_plugin'" in broken[OWNER]
    assert "has no attribute 'plugin'" in broken["foveate-odd (odd)"]


def test_a_class_that_cannot_be_imported_is_an_error_only_when_asked_for(
    site: Path, tmp_path: Path, shared_corpus: Path
) -> None:
    targets = {"gone": "'neat_gone:Objective'", "exits": "'neat_exits:Objective'", "sound": "'neat_things:Objective'"}
    install(site, "foveate-neat", {"neat_plugin.py": registering(**targets), "neat_things.py": OBJECTIVE})
    (site / "neat_exits.py").write_text("raise SystemExit('bye')")
    plugins = load_plugins()
    assert not plugins.broken
    load_recipe(recipe(tmp_path, shared_corpus, "sound"), plugins=plugins)
    for name, reason in (("gone", "No module named 'neat_gone'"), ("exits", "SystemExit: bye")):
        with pytest.raises(RecipeError, match=f"objective '{name}' of foveate-neat .neat. cannot be imported") as error:
            load_recipe(recipe(tmp_path, shared_corpus, name), plugins=plugins)
        assert reason in str(error.value) and "Traceback" in str(error.value)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["one way", "the other"])
def test_a_name_of_two_is_an_error_that_names_both(
    order: tuple[int, int], site: Path, tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first by the distribution's name keeps what is its own, wherever on the path the two lie."""
    for number in order:
        name, fruit = (("foveate-apple", "apple"), ("Foveate_Banana", "banana"))[number]
        module = registering(**{fruit: f"'{fruit}_things:Objective'", "pie": f"'{fruit}_things:Objective'"})
        files = {f"{fruit}_plugin.py": module, f"{fruit}_things.py": OBJECTIVE}
        install(site / name, name, files, **{f"a{1 - number}": f"{fruit}_plugin"})
        monkeypatch.syspath_prepend(str(site / name))
    apple, banana = "foveate-apple (a1)", "Foveate_Banana (a0)"
    plugins = load_plugins()
    assert plugins.broken == {banana: f"objective 'pie' is registered twice: by {apple} and by {banana}"}
    load_recipe(recipe(tmp_path, shared_corpus, "apple"), plugins=plugins)
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe(tmp_path, shared_corpus, "banana"), plugins=plugins)
    assert apple in str(error.value) and banana in str(error.value)
    with pytest.raises(RecipeError, match="which one is meant") as contested:
        load_recipe(recipe(tmp_path, shared_corpus, "pie"), plugins=plugins)
    assert apple in str(contested.value) and banana in str(contested.value) and BLOCK in str(contested.value)
    for blocked, of in (("foveate-apple", "banana_things"), ("foveate-banana", "apple_things")):
        monkeypatch.setenv(BLOCK, blocked)
        pie = load_recipe(recipe(tmp_path, shared_corpus, "pie"), plugins=load_plugins()).objectives["pie"]
        assert pie.cls.__module__ == of


def test_nobody_takes_a_name_of_foveates_own(site: Path, tmp_path: Path, shared_corpus: Path) -> None:
    module = HOOKS + "@foveate.hookimpl\ndef register_encoders(register): register('hf', dict)\n"
    install(site, "aaa", {"aaa_plugin.py": module})
    plugins = load_plugins()
    assert "encoder 'hf' is registered twice: by foveate (core) and by aaa (aaa)" in plugins.broken["aaa (aaa)"]
    loaded = load_recipe(recipe(tmp_path, shared_corpus), plugins=plugins)
    assert loaded.model.encoder is not None and loaded.model.encoder.cls.__name__ == "TransformersEncoder"


def test_one_module_under_two_names_is_told(site: Path) -> None:
    install(site, "foveate-neat", {"neat_plugin.py": registering(neat="dict")}, a="neat_plugin", b="neat_plugin")
    plugins = load_plugins()
    assert plugins.broken == {"foveate-neat (b)": "is the same plugin as foveate-neat (a)"}
    found = plugins.find("objectives", "neat")
    assert found is not None and found.owner == "foveate-neat (a)"


def test_foveates_own_come_first_and_the_others_by_name(site: Path) -> None:
    for name in ("zebra", "AARDVARK", "foveate-neat"):
        word = name.split("-")[-1].lower()
        install(site, name, {f"{word}_plugin.py": registering(**{word: "dict"})}, **{word: f"{word}_plugin"})
    found = [name for name, _ in load_plugins().manager.list_name_plugin()]
    assert found[0] == "foveate (core)" and "foveate (lab)" in found[:-3]
    assert all(name.startswith("foveate (") for name in found[:-3])
    assert found[-3:] == ["AARDVARK (aardvark)", "foveate-neat (neat)", "zebra (zebra)"]


@pytest.mark.parametrize("name", ["neat", "foveate-neat", "Foveate_Neat", "other, neat ,"])
def test_a_blocked_plugin_is_not_imported_and_the_recipe_is_told(
    name: str, site: Path, tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By entry point or by distribution, however it is spelt."""
    source = "from pathlib import Path\nPath(__file__).with_name('imported').touch()\n" + registering(neat="dict")
    install(site, "foveate-neat", {"neat_plugin.py": source}, neat="neat_plugin")
    monkeypatch.setenv(BLOCK, name)
    plugins = load_plugins()
    assert plugins.blocked == {OWNER} == set(plugins.broken) and not (site / "imported").exists()
    load_recipe(recipe(tmp_path, shared_corpus), plugins=plugins)
    with pytest.raises(RecipeError, match=rf"objectives.neat: .*{BLOCK} blocks it"):
        load_recipe(recipe(tmp_path, shared_corpus, "neat"), plugins=plugins)
    monkeypatch.setenv(BLOCK, "neat-not")
    assert load_plugins().find("objectives", "neat") is not None and (site / "imported").exists()


def test_an_optional_hook_of_another_version_is_allowed(site: Path) -> None:
    source = registering(neat="dict") + "@foveate.hookimpl(optionalhook=True)\ndef hook_of_tomorrow(run): 0\n"
    install(site, "foveate-neat", {"neat_plugin.py": source})
    assert not load_plugins().broken


def test_a_plugin_may_be_an_object(site: Path) -> None:
    source = """\
    import foveate

    class Plugin:
        HOOK_API = 1

        @foveate.hookimpl
        def register_objectives(self, register):
            register("neat", dict)

    plugin = Plugin()
    """
    install(site, "foveate-neat", {"neat_plugin.py": source}, neat="neat_plugin:plugin")
    plugins = load_plugins()
    assert not plugins.broken and plugins.find("objectives", "neat") is not None
    assert plugins.hooks_of(OWNER) == ["register_objectives"]


def test_what_a_hook_raises_names_its_plugin(site: Path) -> None:
    """And the others' calls are told apart; foveate's own errors, and Ctrl-C, pass as they are."""
    calm = HOOKS + "@foveate.hookimpl\ndef stage_started(stage): return stage\n"
    install(site, "foveate-calm", {"calm_plugin.py": calm})
    source = """\
    import foveate
    from foveate.errors import TrainingError

    HOOK_API = 1

    @foveate.hookimpl
    def stage_started(stage):
        raise {"value": ValueError("no disk"), "own": TrainingError("enough"), "stop": KeyboardInterrupt()}[stage]
    """
    install(site, "foveate-neat", {"neat_plugin.py": source}, neat="neat_plugin")
    plugins = load_plugins()
    plugins.asked.add(OWNER)
    with pytest.raises(PluginError) as error:
        plugins.hook.stage_started(run=None, stage="value")
    assert str(error.value) == f"{OWNER} failed in its hook stage_started: ValueError('no disk')"
    assert isinstance(error.value.__cause__, ValueError)
    with pytest.raises(TrainingError, match=r"^enough$"):
        plugins.hook.stage_started(run=None, stage="own")
    with pytest.raises(KeyboardInterrupt):
        plugins.hook.stage_started(run=None, stage="stop")
    plugins.asked.clear()
    with pytest.warns(UserWarning, match="no disk.*put aside: the recipe does not ask for it"):
        assert plugins.hook.stage_started(run=None, stage="value") == ["value"]
    assert plugins.hook.stage_started(run=None, stage="value") == ["value"]
    assert "no disk" in plugins.broken[OWNER]
