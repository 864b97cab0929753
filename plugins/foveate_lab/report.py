"""Sections of a run's page: what it answered, how its losses, metrics and rates went, and how fast it was."""

from __future__ import annotations

import io
import json
import math
import re
import statistics
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from html import escape
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from foveate.run import Run

_INK, _LINE, _SECOND = "#010203", "#010204", "#010205"
"""Stand in a drawing for colours of the page, which follow light and dark."""
_PAGE_COLOURS = {_INK: "currentColor", _LINE: "var(--accent, #2764c8)", _SECOND: "var(--accent-2, #c2571a)"}
_SERIES = (_LINE, _SECOND, "#2f9e7e", "#a457c4", "#c9a227", "#6c7a89")
_POINTS = 600
"""Points of a curve; a longer one is averaged down to them."""
_MOST = 40
"""Drawings of a section."""

Curve = tuple[np.ndarray, np.ndarray]


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
    others = [key for key in history.keys if "/" in key and key.split("/")[0] not in ("loss", "lr", "valid")]
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
        curves = [("", history.pieces(key), _LINE)]
        beside = history.pieces((held_out or {}).get(key, ""))
        if beside:
            curves.append(("held out", beside, _SECOND))
        drawings.append(_drawing(history, key, curves))
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
        (", ".join(names), pieces, _SERIES[number % len(_SERIES)])
        for number, (names, pieces) in enumerate(groups.values())
    ]
    norm = [("", history.pieces("grad_norm"), _LINE)]
    return _grid(
        [_drawing(history, "learning rate", curves, linear=True), _drawing(history, "norm of the gradient", norm)]
    )


def _grid(drawings: Sequence[str]) -> str:
    style = "display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr))"
    return f'<div style="{style}">{"".join(drawings)}</div>'


def _drawing(history: History, title: str, curves: Sequence[tuple[str, list[Curve], str]], linear: bool = False) -> str:
    """A figure with axes of its own: steps of all stages to the right, dashed lines where stages meet.

    The axis up is logarithmic where values span much, unless it has to be `linear`, from 0.
    """
    look: Any = {
        "svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False, "text.color": _INK,
        "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "font.size": 8,
        "axes.linewidth": 0.5, "xtick.major.width": 0.5, "ytick.major.width": 0.5, "ytick.minor.size": 0,
    }  # fmt: skip
    with matplotlib.rc_context(look), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font that lacks a letter: the page has its own fonts
        figure = Figure(figsize=(4.6, 2.3))
        axes = figure.add_axes((0.13, 0.13, 0.85, 0.76))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4, alpha=0.25, color=_INK)
        for _, pieces, colour in curves:
            _draw(axes, pieces, colour)
        _stages(axes, history)
        if linear:
            axes.set_ylim(bottom=0)
        elif _wide([values for _, pieces, _ in curves for _, values in pieces]):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    label = escape(f"{title}, over {len(history.lines)} steps", quote=True)
    legend = "".join(
        f' <span style="color: {_PAGE_COLOURS.get(colour, colour)}">— {escape(name)}</span>'
        for name, _, colour in curves
        if name
    )
    return f"<figure><figcaption>{escape(title)}{legend}</figcaption>{_inline(svg.getvalue(), label)}</figure>"


def _draw(axes: Any, pieces: Sequence[Curve], colour: str) -> None:
    """A curve, stage by stage; where it has many points they are faint, and their running mean is drawn over them."""
    for steps, values in pieces:
        few = len(values) < 30
        style = {"marker": "o", "markersize": 2.5} if len(values) < 12 else {}
        x, y = _thinned(steps, values)
        axes.plot(x, y, color=colour, linewidth=1.2 if few else 0.6, alpha=1 if few else 0.35, **style)
        if not few:
            axes.plot(*_thinned(steps, _running_mean(values)), color=colour, linewidth=1.4)


def _stages(axes: Any, history: History) -> None:
    last = len(history.lines)
    axes.set_xlim(1, max(2, last))
    if len(history.stages) < 2:
        return
    for first, end, stage in zip(history.borders, history.borders[1:], history.stages, strict=False):
        if first:
            axes.axvline(first + 0.5, color=_INK, linewidth=0.6, linestyle=(0, (4, 3)), alpha=0.6)
        middle = ((first + end) / 2 - 1) / max(1, last - 1)
        axes.text(middle, 1.02, stage, transform=axes.transAxes, ha="center", va="bottom", alpha=0.7, clip_on=False)


def _thinned(steps: np.ndarray, values: np.ndarray) -> Curve:
    """At most `_POINTS` points, each the mean of its neighbours."""
    if len(values) <= _POINTS:
        return steps, values
    groups = np.array_split(np.arange(len(values)), _POINTS)
    return np.array([steps[g].mean() for g in groups]), np.array([values[g].mean() for g in groups])


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean over a window of a twentieth of the curve, centred, cut at the ends; not finite values count nothing."""
    half = max(2, len(values) // 40)
    good = np.isfinite(values)
    sums, counts = np.cumsum([0, *np.where(good, values, 0)]), np.cumsum([0, *good])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)


def _wide(values: Sequence[np.ndarray]) -> bool:
    """Whether values span so much that only a logarithmic axis shows them."""
    flat = np.concatenate([np.zeros(0), *values])
    flat = flat[np.isfinite(flat)]
    return bool(len(flat)) and bool(flat.min() > 0) and bool(flat.max() > 30 * flat.min())


def _inline(svg: str, label: str) -> str:
    """The drawing as an element of the page: its colours the page's, its name for who cannot see it."""
    box = re.search(r'viewBox="([^"]*)"', svg)
    svg = svg[svg.index("</defs>") + len("</defs>") :]  # after the head: the first definitions are styles
    for stand_in, colour in _PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    used = set(re.findall(r"#([\w-]+)[\")]", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda match: match[0] if match[1] in used else "", svg)
    style = "width: 100%; stroke-linejoin: round; stroke-linecap: butt"
    return f'<svg role="img" aria-label="{label}" viewBox="{box[1] if box else ""}" style="{style}">{svg}'
