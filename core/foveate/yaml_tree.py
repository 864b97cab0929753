"""YAML with positions: plain values, where each of them stands, every duplicate key; scalars as YAML 1.2 reads them.

PyYAML's own rules (YAML 1.1) read `1e-4` as text, `4:12` as 252 and `no` as false, and keep the last of two equal keys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

DEEPEST = 40
"""Levels of mappings and lists in a document, at most."""

Loc = tuple[str | int, ...]
"""Keys and list indices from the root to a value."""


class Place(NamedTuple):
    """Where a value was written: file, line and column from 1; an override has only its text."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


class Problem(NamedTuple):
    """What is wrong with a file: where, at which key, and what to do."""

    place: Place
    loc: Loc
    message: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (str(self.place), ".".join(map(str, self.loc)), self.message)))


class Block(dict[str, Any]):
    """A mapping of a file; `folders` tells, for each key, the folder against which its paths are relative."""

    def __init__(self, values: dict[str, Any] | None = None, folders: dict[str, Path] | None = None):
        super().__init__(values or {})
        self.folders = dict(folders or {})

    def without(self, *keys: str) -> Block:
        """A copy that lacks `keys`."""
        return Block({key: value for key, value in self.items() if key not in keys}, self.folders)


@dataclass
class Tree:
    """A document as plain values (`root`; its mappings are `Block`s), places by location, and what is wrong with it."""

    root: Any = None
    places: dict[Loc, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, loc: Loc) -> Place:
        """Where `loc` was written, or what is closest around it."""
        return self.places[next(loc[:depth] for depth in range(len(loc), -1, -1) if loc[:depth] in self.places)]


def merge(base: Any, over: Any) -> Any:
    """`over` laid on `base`: mappings merge key by key, everything else replaces."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    merged = {key: merge(base[key], value) if key in base else value for key, value in over.items()}
    return Block({**base, **merged}, {**getattr(base, "folders", {}), **getattr(over, "folders", {})})


def plain(value: Any) -> Any:
    """The same value with ordinary dicts."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def shown(path: Path) -> str:
    """How messages name a file: relative to the current folder where it lies below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def read_yaml(path: Path) -> Tree:
    """The document in a file; what is wrong with it (also that it cannot be read) is in `problems`."""
    name = shown(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = str(error.strerror).lower() if isinstance(error, OSError) else "is not UTF-8 text"
        return Tree(None, {(): Place(name)}, [Problem(Place(name), (), reason)])
    return parse_yaml(text, path.parent, lambda line, column: Place(name, line + 1, column + 1))


def parse_yaml(text: str, folder: Path, place: Callable[[int, int], Place]) -> Tree:
    """The document `text`; paths in it are relative to `folder`; `place` makes a place of line and column from 0."""
    tree, loader = Tree(places={(): place(0, 0)}), None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            tree.root = _Walk(tree, folder, place).value(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = place(mark.line, mark.column) if mark else tree.places[()]
        tree.problems.append(Problem(at, (), f"YAML syntax: {error.problem or error.context}"))
    except yaml.reader.ReaderError as error:
        before = text[: error.position].split("\n")
        at = place(len(before) - 1, len(before[-1]))
        tree.problems.append(Problem(at, (), f"YAML syntax: {error.reason}"))
    except (RecursionError, ValueError, OverflowError) as error:  # PyYAML's own: depth, escapes that are no character
        mark = loader.get_mark() if loader else None
        at = place(mark.line, mark.column) if mark else tree.places[()]
        reason = _TOO_DEEP if isinstance(error, RecursionError) else str(error)
        tree.problems.append(Problem(at, (), f"YAML syntax: {reason}"))
    return tree


class _Loader(yaml.SafeLoader):
    """PyYAML's parser, which leaves it to `_scalar` what a word without quotes means."""

    yaml_implicit_resolvers: dict[Any, Any] = {None: [("plain", re.compile(""))]}  # noqa: RUF012  (PyYAML's design)


_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_WORDS |= {form: value for word, value in _WORDS.items() for form in (word.title(), word.upper())}


_INTEGER = re.compile(r"[-+]?\d{1,100}", re.ASCII)  # Python refuses thousands of digits; as text they are told
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


def _scalar(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text


_BROKEN = re.compile("[\0\ud800-\udfff]")
_MOST = 20_000
_TOO_DEEP = f"nested deeper than {DEEPEST} levels"


class _Walk:
    """Turns nodes into values, and notes places and problems in a tree. Raises `MarkedYAMLError` for a bomb."""

    def __init__(self, tree: Tree, folder: Path, place: Callable[[int, int], Place]):
        self.tree, self.folder, self.place = tree, folder, place

    def value(self, node: yaml.Node, loc: Loc = (), above: tuple[int, ...] = ()) -> Any:
        self.tree.places[loc] = self._at(node)
        if len(above) > DEEPEST or len(self.tree.places) > _MOST:
            too = _TOO_DEEP if len(above) > DEEPEST else f"more than {_MOST} values; aliases multiply them"
            raise yaml.MarkedYAMLError(problem=too, problem_mark=node.start_mark)
        tag, inside = node.tag.removeprefix("tag:yaml.org,2002:"), (*above, id(node))
        if id(node) in above:
            return self._wrong(node, loc, "an alias must not hold itself")
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self._mapping(node, loc, inside)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self.value(item, (*loc, index), inside) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and tag in ("plain", "str"):
            if _BROKEN.search(node.value):
                return self._wrong(node, loc, "text must not hold NUL or half of a surrogate pair")
            return _scalar(node.value) if tag == "plain" else node.value
        return self._wrong(node, loc, f"tags such as {node.tag} are not read; write a plain value")

    def _mapping(self, node: yaml.MappingNode, loc: Loc, inside: tuple[int, ...]) -> Block:
        block = Block()
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str) or key == "<<" or not key.isprintable():
                self._wrong(key_node, loc, "a key must be plain text" + (" ('<<' is not read)" if key == "<<" else ""))
            elif key in block:
                hint = f" (first in line {line})" if (line := self.tree.places[*loc, key].line) else ""
                self._wrong(key_node, (*loc, key), f"duplicate key '{key}'{hint}")
            else:
                block[key] = self.value(value_node, (*loc, key), inside)
                block.folders[key] = self.folder
                self.tree.places[*loc, key] = self._at(key_node)
        return block

    def _at(self, node: yaml.Node) -> Place:
        return self.place(node.start_mark.line, node.start_mark.column)

    def _wrong(self, node: yaml.Node, loc: Loc, message: str) -> None:
        self.tree.problems.append(Problem(self._at(node), loc, message))
