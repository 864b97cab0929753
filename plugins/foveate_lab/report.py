"""Sections of a run's page: what it answered, how its losses, metrics and rates went, and how fast it was."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import timedelta
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate_lab.curves import SERIES, Curve, drawing

if TYPE_CHECKING:
    from foveate.run import Run

_MOST = 40
"""Drawings of a section."""


class History:
    """`metrics.jsonl` as curves over the steps of all stages, counted through."""

    def __init__(self, lines: Sequence[Mapping[str, Any]]):
        self.lines = lines
        self.stages = list(dict.fromkeys(line["stage"] for line in lines))
        self.keys = list(dict.fromkeys(key for line in lines for key in line))
        firsts = {stage: next(at for at, line in enumerate(lines) if line["stage"] == stage) for stage in self.stages}
        self.borders = [*firsts.values(), len(lines)]

    def pieces(self, key: str) -> list[Curve]:
        """Steps (from 1) and values of a key, stage by stage; a value that was not finite is NaN."""
        pieces = []
        for first, last in zip(self.borders, self.borders[1:], strict=False):
            at = [number for number in range(first, last) if key in self.lines[number]]
            values = [self.lines[number][key] for number in at]
            if at:
                found = np.array([math.nan if value is None else value for value in values], dtype=float)
                pieces.append((np.array(at) + 1, found))
        return pieces


def sections(run: Run) -> list[tuple[str, str]]:
    """Evaluation, losses, metrics of objectives, rates, speed: those that the run has."""
    path = run.folder / "evaluation.json"
    evaluations = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    found = [(f"Evaluation: {entry['title']}", _evaluation(entry)) for entry in evaluations]
    lines = run.metrics()
    if not lines:
        return found
    history = History(lines)
    losses = [key for key in history.keys if key.startswith("loss/")]
    losses = ["loss", *losses] if len(losses) > 1 else losses
    others = [key for key in history.keys if "/" in key and not key.startswith(("loss/", "lr/", "valid/loss/"))]
    found.append(("Losses", _panels(history, losses, {key: f"valid/{key}" for key in losses})))
    if others:
        found.append(("Metrics of the objectives", _panels(history, others)))
    found.append(("Learning rates and gradient", _rates(history)))
    found.append(("Speed", _speed(history)))
    return found


def _evaluation(entry: Mapping[str, Any]) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in entry["notes"])
    return _table(entry["columns"], entry["rows"]) + (f'<ul class="notes">{notes}</ul>' if notes else "")


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table, numbers to the right."""
    numbers = [all(not isinstance(row[at], str) for row in rows) for at in range(len(columns))]
    classes = [' class="num"' if number else "" for number in numbers]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(columns, classes, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{_cell(value)}</td>" for value, kind in zip(row, classes, strict=True)) + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else escape(value)


def _speed(history: History) -> str:
    rows = []
    for stage in history.stages:
        lines = [line for line in history.lines if line["stage"] == stage]
        seconds = [line["step_seconds"] or 1e-9 for line in lines]
        per_second = {
            key: statistics.median(line[key] / took for line, took in zip(lines, seconds, strict=True))
            for key in ("tokens", "images")
        }
        wait = sum(line["data_wait"] or 0.0 for line in lines) / sum(seconds)
        numbers = [f"{value:,.0f}" if value >= 10 else f"{value:.2f}" for value in per_second.values()]
        total = str(timedelta(seconds=round(sum(seconds))))
        rows.append((stage, len(lines), total, f"{statistics.median(seconds):.3g}", *numbers, f"{wait:.1%}"))
    columns = ("stage", "steps", "time", "seconds a step", "tokens/s", "images/s", "waiting for data")
    note = "Rates and seconds are medians over the steps. Waiting for data: share of the time."
    return _table(columns, rows) + f'<ul class="notes"><li>{note}</li></ul>'


def _panels(history: History, keys: Sequence[str], held_out: Mapping[str, str] | None = None) -> str:
    """A drawing each key: its values, a running mean of them, and what it was on held-out data."""
    drawings = []
    for key in keys[:_MOST]:
        curves = [("", history.pieces(key), SERIES[0])]
        beside = history.pieces((held_out or {}).get(key, ""))
        if beside:
            curves.append(("held out", beside, SERIES[1]))
        drawings.append(_drawn(history, key, curves))
    more = f'<ul class="notes"><li>{len(keys) - _MOST} more in metrics.jsonl</li></ul>' if len(keys) > _MOST else ""
    return _grid(drawings) + more


def _rates(history: History) -> str:
    """Parts with the same rate share a curve."""
    groups: dict[bytes, tuple[list[str], list[Curve]]] = {}
    for key in (key for key in history.keys if key.startswith("lr/")):
        pieces = history.pieces(key)
        same = b"".join(array.tobytes() for piece in pieces for array in piece)
        groups.setdefault(same, ([], pieces))[0].append(key.removeprefix("lr/"))
    curves = [
        (", ".join(names), pieces, SERIES[number % len(SERIES)])
        for number, (names, pieces) in enumerate(groups.values())
    ]
    norm = [("", history.pieces("grad_norm"), SERIES[0])]
    return _grid([_drawn(history, "learning rate", curves, linear=True), _drawn(history, "norm of the gradient", norm)])


def _drawn(history: History, title: str, curves: Sequence[tuple[str, list[Curve], str]], linear: bool = False) -> str:
    return drawing(title, curves, dict(zip(history.stages, history.borders, strict=False)), len(history.lines), linear)


def _grid(drawings: Sequence[str]) -> str:
    style = "display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr))"
    return f'<div style="{style}">{"".join(drawings)}</div>'
