"""Tables of the `datasets` library: every form of a file, turns, questions and captions, pictures left encoded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from foveate.data.dataset import SampleError
from foveate.data.hub import HubDataset
from foveate.data.sample import SampleRules, build_sample, load_pixels
from foveate.errors import DataError
from foveate.types import Turn

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(folder: Path, **options: Any) -> HubDataset:
    return HubDataset(HubDataset.Options.model_validate(options, context={"folder": folder}))


@pytest.fixture
def table(digits: list[Image.Image]) -> Any:
    rows = {
        "key": ["a", "b"],
        "pictures": [[digits[0]], digits[1:3]],
        "goal": [digits[3], None],
        "talk": [
            [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Zero"}],
            [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "Two"}],
        ],
    }
    text, image = datasets.Value("string"), datasets.Image()
    turn = {"from": text, "value": text}
    features = {"key": text, "pictures": datasets.List(image), "goal": image, "talk": datasets.List(turn)}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


COLUMNS = {"id": "key", "images": "pictures", "target_images": "goal", "conversations": "talk"}


@pytest.mark.parametrize("form", ["file.parquet", "parquet", "saved", "split", "file.arrow"])
def test_every_form_of_a_table(
    form: str, table: Any, tmp_path: Path, digits: list[Image.Image], make_rules: Callable[..., SampleRules]
) -> None:
    place = tmp_path / form
    if form == "saved":
        table.save_to_disk(place)
    elif form == "split":
        datasets.DatasetDict({"train": table.select([0]), "other": table}).save_to_disk(place)
    elif form == "file.arrow":
        table.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(place)
    elif form == "parquet":
        place.mkdir()
        table.select([0]).to_parquet(place / "0.parquet")
        table.select([1]).to_parquet(place / "1.parquet")
    else:
        table.to_parquet(place)
    data = load(tmp_path, path=form, columns=COLUMNS, split="other" if form == "split" else "train")
    first, second = data[0], data[1]
    assert (first.id, second.id, len(data)) == ("a", "b", 2)
    assert first.turns == (Turn("user", "<image>\nWhat?"), Turn("assistant", "Zero"))
    assert [ref.role for ref in first.images] == ["input", "target"] and len(second.images) == 2
    assert all(isinstance(ref.source, bytes) for ref in first.images), "a row must not open its pictures"
    sample = load_pixels(build_sample(first, make_rules()), make_rules())
    from foveate.data.images import to_pixels

    assert (sample.pixels[0] == to_pixels(digits[0], make_rules().encoder, "resize")).all()
    assert data.fingerprint() == load(tmp_path, path=form, columns=COLUMNS, split=data.options.split).fingerprint()


def test_questions_and_captions(tmp_path: Path, digits: list[Image.Image]) -> None:
    rows = {"image": [digits[0], None], "q": ["Which?", None], "a": ["Zero", "No picture"]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "t.parquet")
    asked = load(tmp_path, path="t.parquet", columns={"images": "image", "question": "q", "answer": "a"})
    assert asked[0].turns == (Turn("user", "<image>\nWhich?"), Turn("assistant", "Zero"))
    assert asked[1].turns == (Turn("user", ""), Turn("assistant", "No picture")) and asked[1].images == ()
    captions = load(tmp_path, path="t.parquet", columns={"images": "image", "answer": "a"})
    assert captions[0].turns == (Turn("user", "<image>"), Turn("assistant", "Zero")) and captions[1].id == "1"
    only = load(tmp_path, path="t.parquet", columns={"images": "image"})
    assert only[0].turns == () and len(only[0].images) == 1


def test_columns_of_paths_stay_in_their_folder(tmp_path: Path, digits: list[Image.Image]) -> None:
    (tmp_path / "images").mkdir()
    digits[0].save(tmp_path / "images" / "0.png")
    datasets.Dataset.from_dict({"file": ["0.png", "../t.parquet"], "a": ["x", "y"]}).to_parquet(tmp_path / "t.parquet")
    columns = {"images": "file", "answer": "a"}
    data = load(tmp_path, path="t.parquet", images="images", columns=columns)
    assert data[0].images[0].source == tmp_path / "images" / "0.png"
    with pytest.raises(SampleError, match="leads out of"):
        data[1]
    with pytest.raises(SampleError, match="relative to the folder `images`"):
        load(tmp_path, path="t.parquet", columns=columns)[0]


def test_errors_say_what_to_do(tmp_path: Path, table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table.to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"lacks columns \['text'\]; it has \['key', 'pictures', 'goal', 'talk'\]"):
        load(tmp_path, path="t.parquet", columns={"answer": "text"})
    with pytest.raises(ValidationError, match="no such file or folder"):
        load(tmp_path, path="gone.parquet", columns={"answer": "text"})
    with pytest.raises(ValidationError, match="columns"):
        load(tmp_path, path="t.parquet", columns={"texts": "talk"})
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"bad\.parquet cannot be opened"):
        load(tmp_path, path="bad.parquet", columns=COLUMNS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'foveate\[datasets\]'"):
        load(tmp_path, path="t.parquet", columns=COLUMNS)
