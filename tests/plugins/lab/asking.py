"""LLaVA files to ask a model about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from foveate.data.llava import LlavaDataset


def turns(*texts: str) -> list[dict[str, str]]:
    """Question and answer in turn."""
    return [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]


def data(folder: Path, rows: list[dict[str, Any]], name: str = "rows.json") -> LlavaDataset:
    (folder / name).write_text(json.dumps(rows))
    return LlavaDataset(LlavaDataset.Options(path=folder / name))
