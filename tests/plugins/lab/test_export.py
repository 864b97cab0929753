"""`foveate data digits OUT`: the same samples as files, all of them or none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.data.images import open_image
from foveate.data.llava import LlavaDataset
from foveate.errors import UserError
from foveate_lab import export
from foveate_lab.digits import DigitsDataset
from foveate_lab.export import data_digits, write_llava
from foveate_lab.questions import KINDS
from foveate_lab.scenes import COMPASS, draw


def questions(size: int = 12) -> DigitsDataset:
    return DigitsDataset(DigitsDataset.Options(task="questions", questions=3, kinds=KINDS, size=size))


def captions(size: int = 5) -> DigitsDataset:
    return DigitsDataset(DigitsDataset.Options(task="captions", size=size))


def test_files_hold_the_same_conversations_and_pixels(tmp_path: Path) -> None:
    data = {"ask": questions(), "tell": captions()}
    write_llava(tmp_path / "out", data)
    for name, dataset in data.items():
        read = LlavaDataset(LlavaDataset.Options(path=tmp_path / "out" / f"{name}.json"))
        assert len(read) == len(dataset)
        for index in range(len(dataset)):
            ours, theirs = dataset[index], read[index]
            assert (theirs.id, theirs.turns, dict(theirs.meta)) == (ours.id, ours.turns, dict(ours.meta))
            one, other = (open_image(row.images[0], row.id) for row in (ours, theirs))
            assert np.array_equal(np.asarray(one), np.asarray(other))


def test_rows_have_the_keys_of_llava(tmp_path: Path) -> None:
    write_llava(tmp_path / "out", {"ask": questions(), "tell": captions()})
    rows = json.loads((tmp_path / "out" / "ask.json").read_text())
    assert rows[2]["image"] == "ask/000002.png"
    assert [turn["from"] for turn in rows[2]["conversations"]] == ["human", "gpt"] * 3
    assert rows[2]["conversations"][0]["value"].startswith("<image>\n")
    with Image.open(tmp_path / "out" / rows[2]["image"]) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), draw(questions().scene(2)))
    assert "meta" not in json.loads((tmp_path / "out" / "tell.json").read_text())[0]


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    calls = iter(range(100))

    def stop_at_the_seventh() -> None:
        if next(calls) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_llava(tmp_path / "out", {"ask": questions()}, advance=stop_at_the_seventh)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_content_or_a_file_is_never_touched(tmp_path: Path) -> None:
    kept = tmp_path / "out" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    for target in (kept.parent, kept):
        with pytest.raises(UserError, match="is not an empty folder"):
            write_llava(target, {"ask": questions()})
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes.txt"]


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b"):
        write_llava(target, {"ask": questions(1)})
        assert sorted(path.name for path in target.iterdir()) == ["ask", "ask.json"]
        assert target.stat().st_mode & 0o777 == 0o777 & ~export._umask()


def test_the_command_writes_training_and_held_out_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_digits(tmp_path / "out", captions=4, questions=3, per_scene=5, held_out=10, density=1.0, seed=2)
    rows = {
        name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("captions", "questions", "test")
    }
    assert {name: len(found) for name, found in rows.items()} == {"captions": 4, "questions": 3, "test": 10}
    assert all(len(row["conversations"]) == 10 for row in rows["questions"])
    assert [row["meta"]["kind"] for row in rows["test"][:5]] == list(KINDS[:5])
    assert all(f" {place} " in row["conversations"][1]["value"] for row in rows["captions"] for place in COMPASS)
    assert "captions.json (4 scenes)" in capsys.readouterr().out
