"""The code blocks of the documentation run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import recipe_dict, write_recipe

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str = "python") -> list[str]:
    """The fenced blocks of a page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.S | re.M)


def test_the_python_page_runs(tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One namespace for the page: later blocks use names of earlier ones."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, recipe_dict(shared_corpus, output="runs/docs"))
    names: dict[str, Any] = {}
    found = blocks("python-api.md")
    assert len(found) >= 3
    for block in found:
        exec(compile(block, "python-api.md", "exec"), names)
    losses = names["losses"]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert names["run"].folder == tmp_path / "runs" / "docs"
    loop = found[1].split("import foveate\n\n")[1]
    assert len([line for line in loop.splitlines() if line.strip()]) <= 20
