"""Variants of a recipe: stages changed by their names; stages, objectives and trained parts taken out by `false`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from foveate.explain import did_you_mean
from foveate.yaml_tree import Block, Loc, Place, Problem, Tree, merge


def by_name(stages: Any, key: Any) -> Any:
    """The number of the stage that `key` names, or `key` itself."""
    names = _names(stages)
    return names.index(key) if key in names else key


def named_stages(base: Tree, over: Tree) -> Tree:
    """`over` with its `stages`, where they are a mapping from inherited names to changes, as the whole list."""
    root, below = over.root, base.root
    changes = root.get("stages") if isinstance(root, dict) else None
    inherited = below.get("stages") if isinstance(below, dict) else None
    if not isinstance(changes, dict) or not isinstance(inherited, list):
        return over
    names, problems = _names(inherited), list[Problem]()
    for name in changes:
        if name not in names:
            wrong = f"there is no stage '{name}' to change{did_you_mean(str(name), [n for n in names if n])}"
            problems.append(Problem(over.place(("stages", name)), ("stages", name), wrong))
    whole = [merge(stage, changes.get(name, stage)) for name, stage in zip(names, inherited, strict=True)]
    numbers: dict[Any, Any] = {name: number for number, name in enumerate(names)}
    places = {loc: place for loc, place in base.places.items() if loc[:1] == ("stages",)}
    places |= _moved(over.places, numbers)
    return Tree(Block({**root, "stages": whole}, root.folders), places, [*over.problems, *problems])


def nothing_to_take_out(below: Any, over: Any) -> dict[str, str]:
    """Objectives that are `false` in `over` but not in `below`, which it is laid on, and what to say of each."""
    known, wishes = (root.get("objectives") if isinstance(root, Block) else None for root in (below, over))
    there = [str(name) for name in known] if isinstance(known, Block) else []
    off = [name for name, value in wishes.items() if value is False] if isinstance(wishes, Block) else []
    return {
        name: f"there is no objective '{name}' to take out{did_you_mean(str(name), there)}"
        for name in off
        if name not in there
    }


def take_out(tree: Tree) -> None:
    """Removes stages, trained parts and objectives that are `false`, the last also where stages and data name them."""
    if not isinstance(tree.root, Block):
        return
    stages, objectives = tree.root.get("stages"), tree.root.get("objectives")
    if isinstance(stages, list) and any(stage is False for stage in stages):
        kept = [number for number, stage in enumerate(stages) if stage is not False]
        tree.root["stages"] = stages = [stages[number] for number in kept]
        rest = {loc: place for loc, place in tree.places.items() if loc[:1] != ("stages",) or len(loc) < 2}
        tree.places = rest | _moved(tree.places, {old: new for new, old in enumerate(kept)})
    for block in _blocks(stages):
        if isinstance(train := block.get("train"), Block):
            block["train"] = train.without(*(part for part, rule in train.items() if rule is False))
    off = [name for name, value in objectives.items() if value is False] if isinstance(objectives, Block) else []
    if not off or not isinstance(objectives, Block):
        return
    tree.root["objectives"] = objectives.without(*off)
    for block in _blocks(stages):
        for key in _NAMING:
            value = block.get(key)
            if isinstance(value, Block):
                block[key] = value.without(*(part for part in value if str(part).partition(".")[0] in off))
            elif isinstance(value, list):
                block[key] = [part for part in value if part not in off]


_NAMING = ("train", "objectives", "frozen", "weights")
"""Keys of stages and of their data that name objectives."""


def _blocks(value: Any) -> Iterator[Block]:
    """The stages, and all mappings in them."""
    if isinstance(value, Block):
        yield value
    inner: Any = value.values() if isinstance(value, Block) else value if isinstance(value, list) else ()
    for item in inner:
        yield from _blocks(item)


def _names(stages: Any) -> list[Any]:
    entries = stages if isinstance(stages, list) else []
    names = [stage.get("name") if isinstance(stage, Block) else None for stage in entries]
    return [name if isinstance(name, str) else None for name in names]


def _moved(places: Mapping[Loc, Place], numbers: Mapping[Any, int]) -> dict[Loc, Place]:
    """Places of stages with the second element of their location replaced; others of stages are left out."""
    found: dict[Loc, Place] = {}
    for loc, place in places.items():
        if loc[:1] != ("stages",) or len(loc) < 2:
            found[loc] = place
        elif loc[1] in numbers:
            found[("stages", numbers[loc[1]], *loc[2:])] = place
    return found
