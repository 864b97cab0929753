"""`check`: every defect of a corpus in one pass, with its sample, and the lengths of what is sound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate.data.check import check
from foveate.data.llava import LlavaDataset
from foveate.data.mixture import Source
from foveate.data.sample import SampleRules
from foveate.data.tokenizer import train_tokenizer


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_defect_in_one_pass(
    workers: int, corpus: Callable[..., tuple[Path, Path]], make_rules: Callable[..., SampleRules]
) -> None:
    path, images = corpus(
        [
            {"id": "fine", "image": "temple.jpg", "conversations": turns("<image>", "A temple.")},
            {"id": "gone", "image": "gone.jpg", "conversations": turns("<image>", "Nothing.")},
            {"id": "cut", "image": "cut.jpg", "conversations": turns("<image>", "Half.")},
            {"id": "count", "image": "temple.jpg", "conversations": turns("<image><image>", "Two.")},
            {"id": "empty", "conversations": turns("Why?", "")},
            {"id": "both", "images": ["gone.jpg", "temple.jpg"], "conversations": turns("<image>", "")},
            {"id": "silent", "conversations": turns("Why?", "secret")},
            {"id": "long", "conversations": turns("Go on", "and on " * 400)},
            {"id": "way out", "image": "../rows.json", "conversations": turns("<image>", "Out.")},
            {"id": "only", "image": "flower.png"},
        ]
    )
    (images / "cut.jpg").write_bytes((images / "temple.jpg").read_bytes()[:2000])
    tokenizer = train_tokenizer(["text"], 300)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "== 'assistant'", "== 'assistant' and message['content'] != 'secret'"
    )
    rules = make_rules("chat", tokenizer, max_length=300)
    source = Source(LlavaDataset(LlavaDataset.Options(path=path, images=images)), name="rows")
    heard: list[int] = []
    report = check([source], rules, workers, heard.append)
    found = [(defect.sample_id, defect.kind) for defect in report.defects]
    assert found == [
        ("gone", "image"), ("cut", "image"), ("count", "placeholders"), ("empty", "answer"),
        ("both", "placeholders"), ("both", "answer"), ("both", "image"),
        ("silent", "unsupervised"), ("long", "long"), ("rows.json row 8 (id 'way out')", "row"),
    ]  # fmt: skip
    assert report.counts == {"image": 3, "placeholders": 2, "answer": 2, "unsupervised": 1, "long": 1, "row": 1}
    assert "gone.jpg does not exist" in report.defects[0].problem and report.defects[0].index == 1
    assert "leads out of" in report.defects[-1].problem
    assert report.samples == 10 == heard[-1]
    sizes = report.statistics
    assert sizes["width"]["count"] == 4 and (sizes["width"]["min"], sizes["height"]["max"]) == (107, 160)
    assert sizes["tokens"]["count"] == 4  # fine, only, and the two whose pictures alone are broken
    assert sizes["tokens"]["min"] == 4 and sizes["supervised"]["min"] == 0


def test_a_limit_is_spread_over_each_source(listed: Any, talk: Any, make_rules: Callable[..., SampleRules]) -> None:
    bad = [talk("q", "", id=f"{number}") for number in range(1000)]
    report = check([Source(listed(bad), name="a"), Source(listed(bad[:3]), name="b")], make_rules(), limit=10)
    assert [defect.index for defect in report.defects] == [*range(0, 1000, 100), 0, 1, 2] and report.samples == 13


def test_a_sound_corpus_has_an_empty_list(
    listed: Any, talk: Any, make_rules: Callable[..., SampleRules], digits: list[Image.Image]
) -> None:
    rows = [talk("<image>", "a digit", images=[digit]) for digit in digits]
    report = check([Source(listed(rows))], make_rules())
    assert report.defects == [] and report.counts == {} and report.samples == 16
    assert report.statistics["width"] == {"count": 16, "min": 48, "median": 48, "p95": 48, "max": 48}
