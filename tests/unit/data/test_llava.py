"""LLaVA files: every form of a row, rows found without parsing the file into memory, and paths that stay inside."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.data import llava
from foveate.data.dataset import SampleError, texts
from foveate.data.llava import LlavaDataset
from foveate.errors import DataError

Corpus = Callable[..., tuple[Path, Path]]
ONE = [{"role": "human", "content": "<image>"}, {"role": "gpt", "content": "ok"}]
QUESTION = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A temple."}]


def load(path: Path, images: Path | None = None) -> LlavaDataset:
    return LlavaDataset(LlavaDataset.Options.model_validate({"path": path, "images": images}))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_every_form_of_a_row(corpus: Corpus, name: str) -> None:
    two = [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "Ein Gänseblümchen 🌼"}]
    path, images = corpus(
        [
            {"id": "one", "image": "temple.jpg", "conversations": QUESTION},
            {"id": 2, "images": ["temple.jpg", "flower.png"], "messages": two, "meta": {"kind": "flower"}},
            {"conversations": [{"from": "system", "value": "Be brief."}, *QUESTION[1:]], "model": "ignored"},
            {"id": "only", "image": ["flower.png"]},
            {"id": "roles", "images": ["temple.jpg", "flower.png"], "roles": ["target", "input"], "messages": ONE},
            {"id": "targets", "image": "flower.png", "target_images": "temple.jpg", "conversations": QUESTION},
        ],
        name,
    )
    data = load(path, images)
    rows = [data[index] for index in range(len(data))]
    assert [row.id for row in rows] == ["one", "2", "rows-2", "only", "roles", "targets"]
    assert [[ref.source.name for ref in row.images] for row in rows] == [  # type: ignore[union-attr]
        ["temple.jpg"], ["temple.jpg", "flower.png"], [], ["flower.png"],
        ["flower.png", "temple.jpg"], ["flower.png", "temple.jpg"],
    ]  # fmt: skip
    assert [ref.role for ref in rows[4].images] == [ref.role for ref in rows[5].images] == ["input", "target"]
    assert [turn.role for turn in rows[2].turns] == ["system", "assistant"]
    assert rows[1].turns[1].text == "Ein Gänseblümchen 🌼" and rows[1].meta == {"kind": "flower"}
    assert rows[3].turns == ()
    assert list(texts(data))[:4] == ["\nWhat?", "A temple.", "", "Ein Gänseblümchen 🌼"]
    assert pickle.loads(pickle.dumps(data))[1] == rows[1]


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text())), max_size=8),
       indent=st.sampled_from([None, 2]), ascii_only=st.booleans(), lines=st.booleans())  # fmt: skip
def test_every_row_is_found(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indent: int | None, ascii_only: bool, lines: bool
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows"
    dump = partial(json.dumps, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(("\r\n".join(map(dump, rows)) if lines else f" {dump(rows)}\n").encode())
    raw = path.read_bytes()
    assert [json.loads(raw[start:stop]) for start, stop in llava.row_spans(path)] == rows


def test_blank_lines_of_a_jsonl_file_are_no_rows(corpus: Corpus) -> None:
    path, _ = corpus('\n{"id": "a"}\n\n  \n{"id": "b"}', "rows.jsonl")
    assert [load(path)[index].id for index in range(2)] == ["a", "b"] and len(load(path)) == 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[{"id": 1},\n{"id": 2', "line 2 column"),
        ('[{"id": 1}, {id: 2}]', "line 1 column"),
        ('[{"id": 1}', "is it complete"),
        ('[{"id": 1}] {"id": 2}', "is it complete"),
        ('{"id": 1}\n{"id":', "line 2 column"),
        ('{"id": 1}]', "is it complete"),
    ],
)
def test_a_broken_file_says_where(corpus: Corpus, text: str, why: str) -> None:
    path, _ = corpus(text)
    with pytest.raises(DataError, match=rf"rows\.json is not JSON or JSONL in UTF-8, after 1 rows: .*{why}"):
        load(path)


def test_a_file_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes('[{"id": "größe"}]'.encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        load(tmp_path / "rows.json")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("text", "expected an object"),
        ({"image": "a.jpg", "images": ["b.jpg"]}, "both 'image' and 'images'"),
        ({"image": 3}, "expected a picture's path"),
        ({"image": "temple.jpg", "roles": ["shown"]}, "'input' or 'target'"),
        ({"image": "temple.jpg", "roles": ["input", "input"]}, "each of 1 images"),
        ({"conversations": ["hello"]}, "a turn needs 'from'"),
        ({"conversations": [{"from": "gpt", "role": "user", "value": "x"}]}, "both 'from' and 'role'"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "one of human, user, gpt, assistant, system"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "a turn needs 'from'"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "unhashable"),
        ({"meta": "x"}, "'meta' must be an object"),
    ],
)
def test_a_malformed_row_is_named(corpus: Corpus, row: Any, why: str) -> None:
    path, images = corpus([{"id": "fine"}, row])
    with pytest.raises(SampleError, match=why) as caught:
        load(path, images)[1]
    assert caught.value.kind == "row" and str(caught.value).startswith("rows.json row 1")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "link.png", "up/secret.png"])
def test_paths_never_leave_the_folder(corpus: Corpus, name: str, tmp_path: Path) -> None:
    path, images = corpus([{"id": "a", "image": name}])
    (tmp_path / "secret.png").write_bytes((images / "flower.png").read_bytes())
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "up").symlink_to(tmp_path)
    with pytest.raises(SampleError, match="leads out of"):
        load(path, images)[0]


def test_links_inside_the_folder_are_fine(corpus: Corpus) -> None:
    path, images = corpus([{"id": "a", "image": "sub/../other.png"}])
    (images / "other.png").symlink_to(images / "flower.png")
    assert load(path, images)[0].images[0].source == images / "flower.png"


def test_the_fingerprint_follows_the_content(corpus: Corpus) -> None:
    before = load(corpus([{"id": "a"}])[0]).fingerprint()
    assert before == load(corpus([{"id": "a"}])[0]).fingerprint() != load(corpus([{"id": "b"}])[0]).fingerprint()
