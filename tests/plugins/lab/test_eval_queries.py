"""What is asked: every answer of a file once, with the turns and pictures before it; defects before anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate import ImageRef
from foveate.data.llava import LlavaDataset
from foveate.data.mixture import Source
from foveate.errors import DataError
from foveate_lab.digits import DigitsDataset
from foveate_lab.queries import Joined, Query, check_pictures, pictures_of, read_queries
from tests.plugins.lab.asking import data, turns


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in "abc":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    return tmp_path


def shown(query: Query) -> list[str]:
    return [ref.source.stem for ref in query.conversation.images if isinstance(ref.source, Path)]


def test_every_answer_is_asked_for_with_its_history(pictures: Path) -> None:
    row = {
        "id": "talk", "image": ["a.png", "b.png", "c.png"], "target_images": ["a.png"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            *turns("<image>\nWhat?", "One.", "And <image><image>?", "Two.", "Sure?", "Yes."),
        ],
    }  # fmt: skip
    first, second, third = read_queries(data(pictures, [row]))
    assert [query.id for query in (first, second, third)] == ["talk", "talk#2", "talk#3"]
    assert [query.reference for query in (first, second, third)] == ["One.", "Two.", "Yes."]
    assert [turn.text for turn in first.conversation.turns] == ["Be brief.", "<image>\nWhat?"]
    assert [turn.text for turn in third.conversation.turns] == [turn["value"] for turn in row["conversations"]][:-1]  # type: ignore[index]
    assert [shown(query) for query in (first, second, third)] == [["a"], ["a", "b", "c"], ["a", "b", "c"]]


def test_a_type_is_said_by_the_row_or_its_meta(pictures: Path) -> None:
    asked = {"conversations": turns("Is it?", "Yes.")}
    rows: list[dict[str, Any]] = [
        {**asked, "type": "random"},
        {**asked, "meta": {"type": "popular"}},
        {**asked, "type": "row", "meta": {"type": "meta", "kind": "kind"}},
        {**asked, "meta": {"kind": "count"}},
        {"conversations": turns("One?", "1", "Two?", "2"), "meta": {"kinds": ["count", "colour"]}},
        {"conversations": turns("One?", "1", "Two?", "2"), "type": 7},
        asked,
    ]
    found = [query.type for query in read_queries(data(pictures, rows))]
    assert found == ["random", "popular", "meta", "count", "count", "colour", "7", "7", None]


def test_options_are_given_or_listed(pictures: Path) -> None:
    asked = turns("Which?\nA. red\nB. green", "B")
    rows: list[dict[str, Any]] = [
        {"conversations": asked},
        {"conversations": asked, "meta": {"options": ["one", "two", 3]}},
        {"conversations": asked, "meta": {"options": {"b": "zwei"}}},
    ]
    found = [query.options for query in read_queries(data(pictures, rows))]
    assert found == [{"A": "red", "B": "green"}, {"A": "one", "B": "two", "C": "3"}, {"B": "zwei"}]


def test_digits_have_a_type_each_as_data_set_and_as_file(tmp_path: Path) -> None:
    from foveate_lab.export import write_llava

    options = {"task": "questions", "size": 6, "questions": 2, "kinds": ["identity", "colour"]}
    made = DigitsDataset(DigitsDataset.Options.model_validate(options))
    write_llava(tmp_path / "out", {"test": made})
    read = LlavaDataset(LlavaDataset.Options(path=tmp_path / "out" / "test.json"))
    ours, theirs = read_queries(made), read_queries(read)
    assert len(ours) == len(theirs) == 12
    for one, other in zip(ours, theirs, strict=True):
        assert (one.id, one.type, one.reference) == (other.id, other.type, other.reference)
        assert one.type == {"D": "identity", "C": "colour"}[one.reference[0]]
    assert pictures_of(ours) == [] and len(pictures_of(theirs)) == 6


def test_rows_without_turns_ask_nothing_and_a_limit_stops_early(pictures: Path) -> None:
    good = {"conversations": turns("One?", "1", "Two?", "2")}
    bad = {"conversations": turns("<image>?", "No picture.")}
    dataset = data(pictures, [{"image": "a.png"}, good, good, bad])
    assert [query.id for query in read_queries(dataset, 3)] == ["rows-1", "rows-1#2", "rows-2"]
    with pytest.raises(DataError, match=r"because one sample is defective:\n  sample 'rows-3': has 1 <image>"):
        read_queries(dataset)
    with pytest.raises(DataError, match="the data ask nothing"):
        read_queries(data(pictures, [{"image": "a.png"}], "bare.json"))


def test_all_defective_rows_are_named(pictures: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "blind", "conversations": turns("<image>?", "So.")},
        {"id": "mute", "conversations": turns("Well?")},
        {"id": "first", "conversations": turns("Hello.", "Well?")[1:]},
        {"id": "out", "image": "../a.png", "conversations": turns("<image>?", "So.")},
    ]
    with pytest.raises(DataError) as caught:
        read_queries(data(pictures, rows))
    lines = str(caught.value).splitlines()
    assert lines[0] == "nothing was asked, because 4 samples are defective:"
    expected = ("'blind': has 1", "'mute': has no answer", "'first': answer 1 follows no question", "'out'")
    for line, words in zip(lines[1:], expected, strict=True):
        assert words in line
    with pytest.raises(DataError, match=r"20 samples are defective:(\n.*){8}\n  and 12 more$"):
        read_queries(data(pictures, rows[:1] * 20))


def test_pictures_are_opened_once_and_all_that_cannot_be_are_named(pictures: Path) -> None:
    (pictures / "torn.png").write_bytes((pictures / "a.png").read_bytes()[:40])
    rows = [
        {"id": "fine", "image": "a.png", "conversations": turns("<image>?", "1", "And?", "2")},
        {"id": "gone", "image": "gone.png", "conversations": turns("<image>?", "1", "And?", "2")},
        {"id": "torn", "image": ["a.png", "torn.png"], "conversations": turns("<image><image>?", "1")},
    ]
    found = pictures_of(read_queries(data(pictures, rows)))
    assert [name for name, _ in found] == ["fine", "gone", "torn"]
    ticks: list[int] = []
    with pytest.raises(DataError) as caught:
        check_pictures(found, ticks.append)
    assert ticks == [1, 2, 3]
    said = str(caught.value).splitlines()
    assert len(said) == 3 and "sample 'gone'" in said[1] and "gone.png does not exist" in said[1]
    assert "sample 'torn'" in said[2] and "torn.png cannot be read" in said[2]
    check_pictures([("made", ImageRef(Image.new("RGB", (2, 2))))])


def test_sources_of_a_recipe_are_joined_in_order(pictures: Path) -> None:
    rows = [{"id": str(number), "conversations": turns("One?", str(number))} for number in range(9)]
    one, other = data(pictures, rows, "one.json"), data(pictures, rows[:2], "other.json")
    few = [query.id for query in read_queries(Joined([Source(other), Source(one, max_samples=4), Source(other)]))]
    assert few[:2] == few[-2:] == ["0", "1"] and len(few) == 8 and few[2:6] == sorted(set(few[2:6]))
