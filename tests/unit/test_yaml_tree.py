"""YAML with positions: scalars, places, duplicate keys, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from foveate.yaml_tree import Block, Place, Tree, merge, parse_yaml, plain, read_yaml


def parsed(text: str) -> Tree:
    return parse_yaml(text, Path("/folder"), lambda line, column: Place("file", line + 1, column + 1))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1e3", 1000.0), ("-1.5E+2", -150.0), (".5", 0.5), ("3.", 3.0), ("7", 7), ("-7", -7),
        ("007", 7),
        ("true", True), ("False", False), ("~", None), ("null", None), ("", None),
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("4:12", "4:12"), ("-4:12", "-4:12"), ("2024-01-01", "2024-01-01"),
        ("'1e-4'", "1e-4"), ('"true"', "true"), ("!!str 5", "5"), ("1_000", "1_000"), ("0x10", "0x10"), ("12e", "12e"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    root = parsed(f"key: {text}").root
    assert root == {"key": value}
    assert type(root["key"]) is type(value)


def test_every_value_has_its_place() -> None:
    tree = parsed("a: 1\nb:\n  - x\n  - {c: 2, d: [3]}\n")
    lines = {".".join(map(str, loc)): (place.line, place.column) for loc, place in tree.places.items()}
    assert lines == {
        "": (1, 1), "a": (1, 1), "b": (2, 1), "b.0": (3, 5), "b.1": (4, 5), "b.1.c": (4, 6), "b.1.d": (4, 12),
        "b.1.d.0": (4, 16),
    }  # fmt: skip
    assert tree.place(("b", 1, "e", "f")) == Place("file", 4, 5), "a key that is missing is told at its mapping"


def test_all_duplicate_keys_are_found_and_the_first_counts() -> None:
    tree = parsed("a: 1\nb: {c: 1, c: 2}\na: 2\na: 3\n")
    assert [str(problem) for problem in tree.problems] == [
        "file:2:11: b.c: duplicate key 'c' (first in line 2)",
        "file:3:1: a: duplicate key 'a' (first in line 1)",
        "file:4:1: a: duplicate key 'a' (first in line 1)",
    ]
    assert tree.root == {"a": 1, "b": {"c": 1}}


@pytest.mark.parametrize(
    ("text", "place"),
    [("a: [1, 2\nb: 3", "file:2:2"), ("a: b: c", "file:1:5"), ("a: 'x", "file:1:6"), ("a: 1\n---\nb: 2", "file:2:1")],
)
def test_a_syntax_error_is_one_problem_with_a_position(text: str, place: str) -> None:
    (problem,) = parsed(text).problems
    assert str(problem).startswith(f"{place}: YAML syntax: ")


def test_control_characters_have_a_position_too() -> None:
    (problem,) = parsed("a: 1\nb: x\x00").problems
    assert str(problem).startswith("file:2:5: YAML syntax: ")


@pytest.mark.parametrize(
    "text", ["a: !!python/object:os.system {}", "a: !!int x", "a: &x [*x]", "? [1]\n: 2", "<<: {a: 1}"]
)
def test_what_is_not_a_plain_value_is_refused(text: str) -> None:
    tree = parsed(text)
    assert len(tree.problems) == 1
    assert tree.problems[0].place.line == 1


def test_an_alias_repeats_a_value_and_its_place() -> None:
    tree = parsed("a: &x {c: 1}\nb: *x\n")
    assert tree.root == {"a": {"c": 1}, "b": {"c": 1}}
    assert (tree.places["b",].line, tree.places["b", "c"].line) == (2, 1)


def test_merge_goes_into_mappings_only_and_keeps_folders() -> None:
    base = Block({"a": Block({"x": 1, "y": 2}), "b": [1, 2], "c": 3}, {"a": Path("/base"), "c": Path("/base")})
    over = Block({"a": Block({"y": 5, "z": 6}), "b": [9], "c": None}, {"c": Path("/over")})
    merged = merge(base, over)
    assert merged == {"a": {"x": 1, "y": 5, "z": 6}, "b": [9], "c": None}
    assert merged.folders == {"a": Path("/base"), "c": Path("/over")}
    assert type(plain(merged)["a"]) is dict


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latin").write_bytes(b"a: \xe9")
    monkeypatch.chdir(tmp_path)
    assert [str(problem) for problem in read_yaml(tmp_path / "none").problems] == ["none: no such file or directory"]
    assert [str(problem) for problem in read_yaml(tmp_path).problems] == [".: is a directory"]
    assert [str(problem) for problem in read_yaml(tmp_path / "latin").problems] == ["latin: is not UTF-8 text"]
