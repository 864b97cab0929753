"""One row of `test.json` as lmms-eval's picture, question, reference and score."""

from __future__ import annotations

from typing import Any

from PIL import Image

Row = dict[str, Any]


def pictures(row: Row) -> list[Image.Image]:
    """The scene, from the current folder."""
    with Image.open(row["image"]) as image:
        return [image.convert("RGB")]


def question(row: Row) -> str:
    """The question alone: `llava_hf` puts the image token on a line before it, as the data do."""
    text: str = row["conversations"][0]["value"]
    return text.removeprefix("<image>\n")


def reference(row: Row) -> str:
    """The right answer."""
    text: str = row["conversations"][1]["value"]
    return text


def score(row: Row, results: list[str]) -> dict[str, float]:
    """1 where the answer is the reference, but for case, whitespace around it and a final full stop."""
    return {"accuracy": float(_normalised(results[0]) == _normalised(reference(row)))}


def _normalised(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().casefold()
