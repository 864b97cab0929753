"""From a YAML file to a `Recipe`: `extends`, overrides, and every problem at once with its line and column."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from foveate.errors import RecipeError
from foveate.explain import ABSENT
from foveate.options import absolute
from foveate.plugins import Plugins, installed_plugins
from foveate.recipe import Recipe
from foveate.registry import load_registry
from foveate.variants import by_name, named_stages, nothing_to_take_out, take_out
from foveate.yaml_tree import DEEPEST, Block, Loc, Place, Problem, Tree, merge, parse_yaml, read_yaml


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    plugins: Plugins | None = None,
    templates: Collection[str] | None = None,
) -> Recipe:
    """The recipe in the file `path`, with `overrides` such as `stages.0.batch_size=8` laid over it.

    `plugins` and the names of `templates` default to what is installed. Raises `RecipeError` with every problem; one
    of them may be that a plugin which the recipe asks for cannot be imported.
    """
    path = Path(path)
    tree, folders = _read(path, ())
    for text in overrides:
        _override(tree, text)
    take_out(tree)
    registry, problems = load_registry(folders)
    if isinstance(tree.root, Block):
        tree.root.setdefault("name", path.stem)
        objectives = tree.root.get("objectives")
        context = {
            "folder": path.resolve().parent,
            "plugins": plugins or installed_plugins(),
            "registry": registry,
            "objectives": set(objectives) if isinstance(objectives, dict) else set(),
            "templates": set(template_names() if templates is None else templates),
        }
        try:
            recipe = Recipe.model_validate(tree.root, context=context, by_name=False)
        except ValidationError as error:
            problems += _problems(error, tree)
    elif not tree.problems:
        tree.problems.append(Problem(tree.place(()), (), "a recipe is a mapping with `model` and `stages`"))
    if problems := sorted([*problems, *tree.problems]):
        raise RecipeError(list(dict.fromkeys(map(str, problems))))
    return recipe


def template_names() -> set[str]:
    """`chat`, the tokenizer's own, and the templates that come with foveate."""
    folder = files("foveate") / "data" / "templates"
    return {"chat", *(file.name.removesuffix(".jinja") for file in folder.iterdir() if file.name.endswith(".jinja"))}


def _read(path: Path, above: tuple[Path, ...]) -> tuple[Tree, list[Path]]:
    """The file laid over the one that it extends, and the folders of all of them."""
    tree, folders = read_yaml(path), [path.resolve().parent]
    if not isinstance(tree.root, Block) or "extends" not in tree.root:
        return tree, folders
    extends, above = tree.root.pop("extends"), (*above, path.resolve())
    try:
        if not isinstance(extends, str):
            raise ValueError(f"no such recipe: {str(extends)[:100]}")
        parent = absolute(extends, path.parent)
        if parent.resolve() in above:
            circle = " → ".join(file.name for file in (*above, parent))
            raise ValueError(f"the recipes extend each other in a circle: {circle}")
        if not parent.is_file():
            raise ValueError(f"no such recipe: {parent}")
    except ValueError as error:
        tree.problems.append(Problem(tree.place(("extends",)), ("extends",), str(error)))
        return tree, folders
    base, more = _read(parent, above)
    if isinstance(base.root, Block):
        base.root = base.root.without("name", "output")  # every recipe has a run of its own
    for name, wrong in nothing_to_take_out(base.root, tree.root).items():
        tree.problems.append(Problem(tree.place(("objectives", name)), ("objectives", name), wrong))
    tree = named_stages(base, tree)
    places, problems = {**base.places, **tree.places}, [*base.problems, *tree.problems]
    return Tree(merge(base.root, tree.root), places, problems), [*folders, *more]


def _override(tree: Tree, text: str) -> None:
    """Lay `path.to.key=value` over the tree. The value is YAML; a path in it is relative to the current folder."""
    place = Place("--set " + " ".join(text.split())[:200])
    dotted, _, value = text.partition("=")
    words = dotted.strip().split(".")
    keys = tuple(int(key) if key.isascii() and key.isdigit() and len(key) < 10 else key for key in words)
    if len(keys) > 1 and keys[0] == "stages" and isinstance(tree.root, Block):
        keys = (keys[0], by_name(tree.root.get("stages"), keys[1]), *keys[2:])
    given = parse_yaml(value, Path.cwd(), lambda *position: place)
    tree.problems += [problem._replace(loc=(*keys, *problem.loc)) for problem in given.problems]
    if "=" not in text or "" in keys or not dotted.isprintable() or len(keys) > DEEPEST:
        tree.problems.append(Problem(place, (), "write key=value, such as stages.0.batch_size=8"))
        return
    for wrong in nothing_to_take_out(tree.root, _replaced(None, keys, given.root)).values():
        tree.problems.append(Problem(place, keys, wrong))
    try:
        tree.root = _replaced(tree.root, keys, given.root)
    except LookupError as error:
        tree.problems.append(Problem(place, keys, str(error.args[0])))
    for depth in range(1, len(keys)):
        tree.places.setdefault(keys[:depth], place)
    tree.places.update({(*keys, *loc): place for loc in given.places})


def _replaced(value: Any, keys: Loc, new: Any) -> Any:
    """`value` with `new` at `keys`; mappings are made on the way. Raises `LookupError` where there is no way."""
    if not keys:
        return new
    key, rest = keys[0], keys[1:]
    if isinstance(value, list):
        if not isinstance(key, int) or key >= len(value):
            raise LookupError(f"there is no '{key}' in a list of {len(value)}; entries count from 0")
        return [*value[:key], _replaced(value[key], rest, new), *value[key + 1 :]]
    if value is not None and not isinstance(value, Block):
        raise LookupError(f"'{key}' cannot be set inside of {value!r}, which is no mapping; set the whole")
    block = value if value is not None else Block()
    folders = {**block.folders, **({} if rest else {str(key): Path.cwd()})}
    return Block({**block, str(key): _replaced(block.get(str(key)), rest, new)}, folders)


def _problems(error: ValidationError, tree: Tree) -> list[Problem]:
    """Pydantic's errors at their places; those of a union's branches, and those that follow from others, as one."""
    broken = {problem.loc for problem in tree.problems}
    found: dict[Loc, list[str]] = {}
    outside: set[Loc] = set()  # of these the last key is not in the file: a branch of a union, or a default
    for line in error.errors(include_url=False):
        loc = _in_tree(tree.root, line["loc"])
        if line["type"] == ABSENT:
            if broken & {(), ("extends",)}:
                continue  # it may stand in the file that could not be read
            loc = (*loc, line["loc"][-1])
        elif loc in broken and line["input"] is None:
            continue
        elif loc[-1:] != line["loc"][-1:]:
            outside.add(loc)
        found.setdefault(loc, []).append(line["msg"])
    inner = {loc[:depth] for loc in found for depth in range(len(loc))}
    problems = {
        (tree.place(loc), loc[-1:], ", or ".join(messages)): loc
        for loc, messages in reversed(found.items())
        if not (loc in outside and loc in inner)
    }
    return [Problem(place, loc, message) for (place, _, message), loc in problems.items()]


def _in_tree(value: Any, loc: Loc) -> Loc:
    """`loc` without the elements that pydantic puts in: only keys and indices of the file."""
    found: list[str | int] = []
    for key in loc:
        if (isinstance(value, dict) and key in value) or (isinstance(value, list) and key in range(len(value))):
            value = value[key]  # type: ignore[index]
            found.append(key)
    return tuple(found)
