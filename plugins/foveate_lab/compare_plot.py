"""The plot of a comparison: accuracy over a number that is varied, or groups of bars with every seed as a dot."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import ColorType

    from foveate_lab.compare_results import Comparison

_COLOURS = ("#2764c8", "#e08214", "#2f9e7e", "#a457c4", "#c23b4b", "#8a6d1f", "#4db3d3", "#7b8794")
_INCHES, _DPI = 8.0, 125
"""1000 pixels wide."""
_PANELS = 3
"""Panels with lines in a row."""
_BARS = 44
"""Bars in a row, at most."""
_SPAN = 0.15
"""Of accuracies in a panel with lines, at least: noise must not look large."""
_MEAN = "mean of kinds"
_CLOSEST = 0.12
"""Two numbers below a panel, as a fraction of its width."""


def plot(comparison: Comparison, path: Path) -> None:
    """Lines where a key has several numbers as its values, else bars."""
    from matplotlib.figure import Figure  # only when a comparison is done

    figure, lines = Figure(dpi=_DPI, layout="constrained"), _lines(comparison)
    kinds: list[str | None] = [None, *comparison.kinds] if len(comparison.kinds) > 1 else [*comparison.kinds]
    if lines:
        _draw_lines(figure, comparison, kinds, lines)
    else:
        _draw_bars(figure, comparison, kinds)
    figure.savefig(path)


def _lines(comparison: Comparison) -> dict[str, dict[float, str]]:
    """Name of a recipe → number, ascending → variant; empty where a value is no number, or there is only one."""
    found: dict[str, dict[float, str]] = {}
    for variant, facts in comparison.facts.items():
        value = facts.get("value")
        if isinstance(value, bool) or not isinstance(value, int | float):
            return {}
        found.setdefault(facts["name"], {})[value] = variant
    several = max(map(len, found.values())) > 1
    return {recipe: dict(sorted(numbers.items())) for recipe, numbers in found.items()} if several else {}


def _draw_lines(
    figure: Figure, comparison: Comparison, kinds: Sequence[str | None], lines: Mapping[str, Mapping[float, str]]
) -> None:
    """A panel for the mean and for each kind of question, a line for each recipe."""
    from matplotlib.ticker import MaxNLocator

    down, across = -(-len(kinds) // _PANELS), min(_PANELS, len(kinds))
    figure.set_size_inches(_INCHES, 0.8 + 2.4 * down * (1.6 if across == 1 else 1))
    panels = figure.subplots(down, across, squeeze=False)
    for panel in panels.flat[len(kinds) :]:
        panel.remove()
    chance = comparison.baseline("chance")
    for at, (kind, panel) in enumerate(zip(kinds, panels.flat, strict=False)):
        low, high = 1.0, 0.0
        for (recipe, variants), colour in zip(lines.items(), _colours(len(lines)), strict=True):
            spreads = [comparison.spread(variant, kind) for variant in variants.values()]
            means, errors = np.array([mean for mean, _ in spreads]), np.array([error or 0.0 for _, error in spreads])
            panel.errorbar(
                list(variants), means, errors if len(comparison.seeds) > 1 else None, marker="o", markersize=4,
                capsize=3, linewidth=1.6, color=colour, label=recipe,
            )  # fmt: skip
            low, high = min(low, float((means - errors).min())), max(high, float((means + errors).max()))
        room = max(_SPAN - (high - low), 0.0) / 2 + 0.02
        low, high = max(low - room, -0.02), min(high + room, 1.02)
        title = _MEAN if kind is None else _short(kind, 26)
        if kind in chance:
            title += f" (chance {chance[kind]:.2f})"
            if low < chance[kind] < high:
                panel.axhline(chance[kind], color="#333333", linestyle="--", linewidth=1)
        panel.set_title(title, fontsize=10)
        ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
        panel.set_yticks([tick for tick in ticks if tick <= 1])
        panel.tick_params(axis="y", labelsize=8)
        panel.set_ylim(low, high)
        panel.grid(alpha=0.3)
        _number_axis(panel, list(next(iter(lines.values()))))
        if at % across == 0:
            panel.set_ylabel("held-out accuracy")
    told = f" (error bars: standard deviation of {len(comparison.seeds)} seeds)" if len(comparison.seeds) > 1 else ""
    figure.supxlabel(f"{comparison.key}{told}", fontsize=10)
    if len(lines) > 1:
        _legend(figure, panels.flat[0])


def _number_axis(panel: Axes, numbers: Sequence[float]) -> None:
    """Logarithmic for positive numbers; as many of them below it as there is room for."""
    places = np.array(numbers, dtype=float)
    if places.min() > 0:
        panel.set_xscale("log", base=2)
        places = np.log2(places)
    shown, last = list[float](), -np.inf
    for number, place in zip(numbers, places / (np.ptp(places) or 1.0), strict=True):
        if place - last >= _CLOSEST:
            shown, last = [*shown, number], place
    labels = [f"{number:,}" if isinstance(number, int) else f"{number:g}" for number in shown]
    panel.set_xticks(shown, labels, fontsize=8)
    panel.minorticks_off()


def _draw_bars(figure: Figure, comparison: Comparison, kinds: Sequence[str | None]) -> None:
    """A group for the mean and for each kind of question, a bar for each variant, in as many rows as they need."""
    down = -(-len(kinds) * len(comparison.results) // _BARS)
    across = -(-len(kinds) // down)
    down = -(-len(kinds) // across)
    figure.set_size_inches(_INCHES, 1.2 + 3.0 * down + 0.08 * len(comparison.results))
    rows = figure.subplots(down, 1, squeeze=False)[:, 0]
    for number, row in enumerate(rows):
        _draw_groups(row, comparison, kinds[number * across : (number + 1) * across], across)
    if len(comparison.seeds) > 1:
        figure.supxlabel(f"dots: {len(comparison.seeds)} seeds; bars: their mean", fontsize=9)
    _legend(figure, rows[0])


def _draw_groups(row: Axes, comparison: Comparison, kinds: Sequence[str | None], across: int) -> None:
    variants, seeds = list(comparison.results), len(comparison.seeds)
    wide = 0.8 / len(variants)
    beside = np.linspace(-0.2, 0.2, seeds) * wide if seeds > 1 else np.zeros(1)
    for number, (variant, colour) in enumerate(zip(variants, _colours(len(variants)), strict=True)):
        places = np.arange(len(kinds)) + (number - (len(variants) - 1) / 2) * wide
        means = [comparison.spread(variant, kind)[0] for kind in kinds]
        row.bar(places, means, wide * 0.9, color=colour, alpha=0.55, label=variant)
        for place, kind in zip(places, kinds, strict=True):
            row.plot(place + beside, comparison.values(variant, kind), "o", markersize=3, color=colour, clip_on=False)
    chance = comparison.baseline("chance")
    at = [number for number, kind in enumerate(kinds) if kind in chance]
    if at:
        left, right = np.array(at) - 0.45, np.array(at) + 0.45
        levels = [chance[kinds[number]] for number in at]
        row.hlines(levels, left, right, color="#333333", linestyle="--", linewidth=1, label="chance")
    letters = max(6, 96 // across)
    names = [_MEAN if kind is None else _short(kind, 2 * letters) for kind in kinds]
    row.set_xticks(range(len(kinds)), [textwrap.fill(name, letters) for name in names], fontsize=9)
    row.set(xlim=(-0.5, across - 0.5), ylim=(0, 1), ylabel="held-out accuracy")
    row.tick_params(axis="x", length=0)
    row.grid(axis="y", alpha=0.3)
    row.set_axisbelow(True)


def _legend(figure: Figure, axes: Axes) -> None:
    """Above all, in as many columns as names of that length leave room for."""
    handles, names = axes.get_legend_handles_labels()
    last = sorted(range(len(names)), key=lambda at: names[at] == "chance")
    short = [_short(names[at], 80) for at in last]
    columns = max(1, min(len(short), 110 // (max(map(len, short)) + 6)))
    figure.legend(
        [handles[at] for at in last], short, loc="outside upper center", ncols=columns, frameon=False, fontsize=9
    )


def _colours(count: int) -> Sequence[ColorType]:
    """As many as there are variants, all different."""
    from matplotlib import colormaps

    more: Sequence[ColorType] = [colormaps["turbo"](place) for place in np.linspace(0.05, 0.95, count)]
    return _COLOURS[:count] if count <= len(_COLOURS) else more


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"
