"""The data set `digits`: every option works, samples are pure functions of their index, and torch stays out."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from foveate import Conversation, ImageRef
from foveate.plugins import load_plugins
from foveate_lab.digits import DigitsDataset, picture
from foveate_lab.questions import HELD_OUT_KINDS, KINDS, majority
from foveate_lab.scenes import draw


def dataset(**options: Any) -> DigitsDataset:
    return DigitsDataset(DigitsDataset.Options(**options))


def opened(ref: ImageRef) -> np.ndarray:
    assert callable(ref.source)
    image = ref.source()
    assert isinstance(image, Image.Image) and image.mode == "RGB"
    return np.asarray(image)


def texts(conversation: Conversation) -> list[str]:
    return [turn.text for turn in conversation.turns]


def test_captions() -> None:
    data = dataset(task="captions", size=20)
    assert len(data) == 20
    for index in range(20):
        conversation = data[index]
        assert [turn.role for turn in conversation.turns] == ["user", "assistant"]
        assert conversation.turns[0].text == "<image>"
        assert np.array_equal(opened(conversation.images[0]), draw(data.scene(index)))
        assert all(cell.place in conversation.turns[1].text for cell in data.scene(index).cells)
    assert len({data[index].id for index in range(20)}) == 20


def test_clauses_choose_what_captions_tell() -> None:
    both = dataset(clauses=("digit", "colour"))[0].turns[1].text
    assert sorted(part.split()[0] for part in both.split(". ")) == ["Colour", "Digit"]
    assert {dataset(clauses=("colour",))[index].turns[1].text.split()[0] for index in range(9)} == {"Colour"}


def test_questions_share_one_picture_in_one_conversation() -> None:
    conversation = dataset(task="questions", questions=8, kinds=KINDS)[3]
    assert len(conversation.turns) == 16 and len(conversation.images) == 1
    assert [turn.role for turn in conversation.turns] == ["user", "assistant"] * 8
    assert conversation.turns[0].text.startswith("<image>\n")
    assert sum(turn.text.count("<image>") for turn in conversation.turns) == 1
    assert len(conversation.meta["kinds"]) == 8 and "kind" not in conversation.meta


def test_kinds_take_turns_so_that_each_has_its_exact_share() -> None:
    held_out = dataset(split="test", task="questions", size=500)
    kinds = Counter(held_out[index].meta["kind"] for index in range(500))
    assert kinds == dict.fromkeys(HELD_OUT_KINDS, 100)
    training = dataset(task="questions", size=30, questions=4, kinds=("presence", "presence", "where"))
    asked = Counter(kind for index in range(30) for kind in training[index].meta["kinds"])
    assert asked == {"presence": 80, "where": 40}


def test_held_out_questions_carry_what_a_report_needs() -> None:
    held_out = dataset(split="test", task="questions", size=1000)
    for index in range(10):
        conversation = held_out[index]
        assert conversation.turns[1].text.endswith(f" {conversation.meta['answer']}")
        assert conversation.meta["kinds"] == [conversation.meta["kind"]]
    counts = [row.meta["answer"] for row in (held_out[index] for index in range(1000)) if row.meta["kind"] == "count"]
    assert majority(counts)[1] < 0.45
    assert held_out[0].meta["chance"] == 0.5


def test_questions_in_a_conversation_rarely_repeat() -> None:
    data = dataset(task="questions", questions=8, size=200, kinds=KINDS)
    repeated = 0
    for index in range(200):
        asked = [turn.text.removeprefix("<image>\n") for turn in data[index].turns if turn.role == "user"]
        repeated += len(asked) - len(set(asked))
    assert repeated < 16  # of 1600: scenes of two cells run out of questions


def test_samples_depend_on_index_split_seed_and_task_alone() -> None:
    data = dataset(task="questions", questions=3)
    backwards = {index: data[index] for index in reversed(range(10))}
    larger = dataset(task="questions", questions=3, size=5000)
    for index in range(10):
        assert texts(data[index]) == texts(backwards[index]) == texts(larger[index])
        assert data[index].id == backwards[index].id
    assert texts(dataset(task="questions", questions=3, seed=1)[0]) != texts(data[0])
    assert texts(dataset(task="questions", questions=3, split="test")[0]) != texts(data[0])


def test_scene_options_reach_the_picture() -> None:
    data = dataset(rows=2, columns=5, cell_px=8, density=1.0, noise=0, colours=("green",))
    pixels = opened(data[0].images[0])
    assert pixels.shape == (16, 40, 3)
    assert (pixels[..., 1] >= pixels[..., 0]).all()
    assert len(data.scene(0).cells) == 10


def test_items_and_data_set_go_to_worker_processes() -> None:
    data = dataset(task="questions", questions=2)
    again = pickle.loads(pickle.dumps(data))
    assert texts(again[4]) == texts(data[4])
    assert np.array_equal(opened(pickle.loads(pickle.dumps(data[4])).images[0]), opened(data[4].images[0]))


def test_the_fingerprint_follows_the_content() -> None:
    base = dataset(task="questions").fingerprint()
    assert base == dataset(task="questions").fingerprint()
    changed = [{"seed": 1}, {"size": 999}, {"density": 0.5}, {"split": "test"}, {"questions": 2}, {"kinds": ("count",)}]
    captions = {dataset().fingerprint(), dataset(clauses=("digit",)).fingerprint()}
    assert len(captions) == 2
    assert len({base, *(dataset(**{"task": "questions", **options}).fingerprint() for options in changed)}) == 7


@pytest.mark.parametrize("index", [-1, 1000])
def test_an_index_outside_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match="of 1000"):
        dataset()[index]


@pytest.mark.parametrize(
    "options", [{"task": "poems"}, {"split": "validation"}, {"size": 0}, {"questions": 0}, {"kinds": ()}, {"lines": 3}]
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        dataset(**options)


def test_every_option_is_described() -> None:
    assert all(field.description for field in DigitsDataset.Options.model_fields.values())


def test_the_plugin_registers_by_name_without_importing_torch() -> None:
    found = load_plugins().find("datasets", "digits")
    assert found is not None and found.load() is DigitsDataset
    code = "import sys, foveate_lab; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_picture_is_what_is_drawn() -> None:
    scene = dataset().scene(0)
    assert np.array_equal(np.asarray(picture(scene)), draw(scene))
