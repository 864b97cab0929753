"""Curves as SVG inside a page: without ids or scripts, in the colours and the letters of the page around them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

import numpy as np

Curve = tuple[np.ndarray, np.ndarray]
"""Steps and values."""

SERIES = ("var(--accent, #2764c8)", "var(--accent-2, #c2571a)", "#2f9e7e", "#a457c4", "#b8901f", "#7b8794")
"""Colours of curves; the first two follow light and dark."""

_WIDTH, _HEIGHT = 440, 210
_LEFT, _TOP, _RIGHT, _BOTTOM = 52, 20, 432, 186
_POINTS = 600
"""Points of a curve; a longer one is averaged down to them."""


def drawing(
    title: str,
    curves: Sequence[tuple[str, Sequence[Curve], str]],
    stages: Mapping[str, int],
    last: int,
    linear: bool = False,
    span: Sequence[float] = (),
) -> str:
    """A figure with steps 1 to `last` to the right, and dashed lines where stages meet.

    `curves`: name, a piece a stage, colour. `stages`: name → steps before it. `linear`: values are drawn as they are,
    on an axis from 0; else noisy ones get a running mean, and an axis may be logarithmic. `span`: values that the axis
    reaches in any case.
    """
    values = np.concatenate([np.zeros(int(linear)), span, *(piece for _, pieces, _ in curves for _, piece in pieces)])
    up = Axis(values[np.isfinite(values)], _BOTTOM, _TOP, linear)
    across = Axis(np.array([1.0, max(2, last)]), _LEFT, _RIGHT, linear=True)
    parts = [_text(_LEFT - 6, y + 3.5, label, "end") + _line(_LEFT, y, _RIGHT, y, 0.15) for y, label in up.ticks()]
    across_ticks = across.ticks(whole=True)
    parts += [_text(x, _BOTTOM + 15, label, "end" if x > _RIGHT - 12 else "middle") for x, label in across_ticks]
    parts.append(_line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, 0.6))
    parts += _borders(stages, last, across)
    for _, pieces, colour in curves:
        parts += [mark for piece in pieces for mark in _marks(piece, colour, across, up, smooth=not linear)]
    legend = "".join(f' <span style="color: {colour}">— {escape(name)}</span>' for name, _, colour in curves if name)
    label = escape(f"{title}, over {last} steps", quote=True)
    style = f"width: 100%; max-width: {_WIDTH * 1.4:.0f}px; font-size: 10px; stroke-linejoin: round"
    svg = (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {_HEIGHT}" style="{style}">{"".join(parts)}</svg>'
    )
    return f"<figure><figcaption>{escape(title)}{legend}</figcaption>{svg}</figure>"


class Axis:
    """From values to places between `start` and `end`; logarithmic for positive values that span much."""

    def __init__(self, values: np.ndarray, start: float, end: float, linear: bool = False):
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        self.logarithmic = not linear and low > 0 and high > 30 * low
        if high == low:
            low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
        self.low, self.high, self.start, self.end = low, high, start, end

    def place(self, values: np.ndarray) -> np.ndarray:
        """Where values lie."""
        low, high = self._scaled(np.array([self.low, self.high]))
        return self.start + (self._scaled(values) - low) / (high - low) * (self.end - self.start)

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        return np.log10(values) if self.logarithmic else values

    def ticks(self, whole: bool = False) -> Iterator[tuple[float, str]]:
        """Round numbers on the axis: their places and how they are written. `whole`: no fractions."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors, every = (1, 3) if len(powers) <= 4 else (1,), max(1, len(powers) // 6)
            numbers = [factor * 10.0**power for power in powers[::every] for factor in factors]
        else:
            rough = (self.high - self.low) / 6
            unit = 10.0 ** math.floor(math.log10(rough))
            step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
            step = max(1.0, round(step)) if whole else step
            numbers = [number * step for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        shown = [number for number in numbers if self.low <= number <= self.high]
        for number, at in zip(shown, self.place(np.array(shown, dtype=float)).tolist(), strict=True):
            yield at, f"{number:,.0f}" if whole else f"{number:.6g}"


def _marks(piece: Curve, colour: str, across: Axis, up: Axis, smooth: bool) -> Iterator[str]:
    """A curve; to `smooth` many points, they are faint, and their running mean is drawn over them."""
    steps, values = piece
    if len(values) < 30 or not smooth:
        yield _path(thinned(steps, values), colour, across, up, 1.5, 1.0)
    else:
        yield _path(thinned(steps, values), colour, across, up, 0.7, 0.4)
        yield _path(thinned(steps, running_mean(values)), colour, across, up, 1.7, 1.0)
    if len(values) < 12:
        good = np.isfinite(values)
        places = zip(across.place(steps[good]).tolist(), up.place(values[good]).tolist(), strict=True)
        yield "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places)


def _path(piece: Curve, colour: str, across: Axis, up: Axis, width: float, opacity: float) -> str:
    """A line through the points, interrupted where a value is not finite."""
    x, y, words, pen = across.place(piece[0]), up.place(piece[1]), list[str](), "M"
    for at in range(len(x)):
        if not math.isfinite(y[at]):
            pen = "M"
            continue
        words.append(f"{pen}{x[at]:.1f} {y[at]:.1f}")
        pen = "L"
    look = f'fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity}"'
    return f'<path d="{"".join(words)}" {look}/>' if words else ""


def _borders(stages: Mapping[str, int], last: int, across: Axis) -> list[str]:
    """Where stages meet, and their names; nothing where there is one."""
    parts, firsts = [], [*stages.values(), last]
    for number, (name, first) in enumerate(stages.items() if len(stages) > 1 else ()):
        left, right = across.place(np.array([max(1, first + 0.5), firsts[number + 1] + 0.5])).tolist()
        if number:
            parts.append(_line(left, _TOP, left, _BOTTOM, 0.5, ' stroke-dasharray="4 3"'))
        parts.append(_text((left + min(right, _RIGHT)) / 2, _TOP - 6, name, "middle"))
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, opacity: float, more: str = "") -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="currentColor" opacity="{opacity}"{more}/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    look = f'text-anchor="{anchor}" fill="currentColor" opacity="0.75"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {look}>{escape(text)}</text>'


def thinned(steps: np.ndarray, values: np.ndarray) -> Curve:
    """At most `_POINTS` points, each the mean of its neighbours."""
    if len(values) <= _POINTS:
        return steps, values
    groups = np.array_split(np.arange(len(values)), _POINTS)
    return np.array([steps[g].mean() for g in groups]), np.array([values[g].mean() for g in groups])


def running_mean(values: np.ndarray) -> np.ndarray:
    """The mean over a window of a twentieth of the curve, centred, cut at the ends; not finite values count nothing."""
    half, good = max(2, len(values) // 40), np.isfinite(values)
    sums, counts = np.cumsum([0, *np.where(good, values, 0)]), np.cumsum([0, *good])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)
