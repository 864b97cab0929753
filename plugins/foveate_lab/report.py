"""Sections of a run's page: what it answered, how its losses, metrics and rates went, and how fast it was."""

from __future__ import annotations

import json
import math
import re
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

_COLOURS = {"": SERIES[0], "held out": SERIES[1], "weighted": SERIES[2]}
_NORM = re.compile(r"gradient/([^/]+)/(projector|llm)")
_COSINE = re.compile(r"cosine/([^/~]+)~([^/]+)/(projector|llm)")


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
    """Evaluation, losses, metrics of objectives, gradients, rates, speed: those that the run has."""
    path = run.folder / "evaluation.json"
    evaluations = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    found = [(f"Evaluation: {entry['title']}", _evaluation(entry)) for entry in evaluations]
    lines = run.metrics()
    if not lines:
        return found
    history = History(lines)
    losses = [key for key in history.keys if key.startswith("loss/")]
    losses = ["loss", *losses] if len(losses) > 1 else losses
    weighted = {key: key.replace("loss/", "weighted/", 1) for key in losses}
    drawn = {*weighted.values(), *(key for key in history.keys if _NORM.fullmatch(key) or _COSINE.fullmatch(key))}
    others = [key for key in history.keys if "/" in key and not key.startswith(("loss/", "lr/", "valid/loss/"))]
    others = [key for key in others if key not in drawn]
    beside = {key: {"held out": f"valid/{key}"} for key in losses}
    for key, other in weighted.items():
        if any(line.get(other, line.get(key)) != line.get(key) for line in lines):
            beside[key]["weighted"] = other
    found.append(("Losses", _panels(history, losses, beside)))
    if others:
        found.append(("Metrics of the objectives", _panels(history, others)))
    if any(_NORM.fullmatch(key) for key in history.keys):
        found.append(("Gradients of the parts of the loss", _gradients(history)))
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


def _panels(history: History, keys: Sequence[str], beside: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """A drawing each key: its values, a running mean of them, and what stands `beside` it, as name → key."""
    drawings = []
    for key in keys[:_MOST]:
        named = {"": key, **(beside or {}).get(key, {})}
        curves = [(name, history.pieces(named[name]), _COLOURS[name]) for name in named]
        drawings.append(_drawn(history, key, [curve for curve in curves if curve[1]]))
    return _grid(drawings) + _more(len(keys))


def _gradients(history: History) -> str:
    """Norms in projector and LLM, a curve a part of the loss; and cosines, a drawing for each pair of parts."""
    norms: dict[str, list[tuple[str, str]]] = {}
    cosines: dict[str, list[tuple[str, str]]] = {}
    for key in history.keys:
        if norm := _NORM.fullmatch(key):
            norms.setdefault(norm[2], []).append((norm[1], key))
        elif cosine := _COSINE.fullmatch(key):
            cosines.setdefault(f"{cosine[1]} ~ {cosine[2]}", []).append((cosine[3], key))

    def curves(named: Sequence[tuple[str, str]]) -> list[tuple[str, list[Curve], str]]:
        return [(name, history.pieces(key), SERIES[at % len(SERIES)]) for at, (name, key) in enumerate(named)]

    drawings = [_drawn(history, f"norm in {place}", curves(named)) for place, named in norms.items()]
    drawings += [
        _drawn(history, f"cosine of {pair}", curves(named), linear=True, span=(-1.0, 1.0))
        for pair, named in list(cosines.items())[:_MOST]
    ]
    note = "Of the weighted parts, over the whole step, before clipping. A cosine below 0: the two parts pull apart."
    return _grid(drawings) + f'<ul class="notes"><li>{note}</li></ul>' + _more(len(cosines))


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


def _drawn(
    history: History, title: str, curves: Sequence[tuple[str, list[Curve], str]], linear: bool = False,
    span: Sequence[float] = (),
) -> str:  # fmt: skip
    stages = dict(zip(history.stages, history.borders, strict=False))
    return drawing(title, curves, stages, len(history.lines), linear, span)


def _more(number: int) -> str:
    left = number - _MOST
    return f'<ul class="notes"><li>{left} more in metrics.jsonl</li></ul>' if left > 0 else ""


def _grid(drawings: Sequence[str]) -> str:
    style = "display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr))"
    return f'<div style="{style}">{"".join(drawings)}</div>'
