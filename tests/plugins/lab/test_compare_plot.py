"""The plot and the words of `foveate compare`: what is drawn is what was found; names of folders are safe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure

from foveate.errors import UserError
from foveate_lab.compare_plot import plot
from foveate_lab.compare_results import Comparison, Result
from foveate_lab.compare_variants import differences
from foveate_lab.compare_words import folder_name

CHANCE = {"colour": 1 / 6, "presence": 0.5, "count": 0.1}


def made(facts: Mapping[str, dict[str, Any]], seeds: int = 3) -> Comparison:
    """Random results for variants with these facts."""
    drawn = np.random.default_rng(0)

    def result() -> Result:
        return Result({kind: drawn.uniform(0.3, 0.9) for kind in CHANCE}, {"chance": CHANCE, "majority": {}})

    results = {name: {seed: result() for seed in range(seeds)} for name in facts}
    return Comparison("pool_size", list(range(seeds)), results, dict(facts))


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    return figures


def numbers(values: Mapping[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Facts of recipes with these values."""
    return {
        f"{name}-{value}": {"recipe": f"{name}.yaml", "name": name, "value": value}
        for name, own in values.items()
        for value in own
    }


@pytest.mark.parametrize(("values", "scale"), [([64, 1, 8], "log"), ([2.5, 0, -1], "linear")])
def test_numbers_are_an_axis(figure: list[Figure], values: list[float], scale: str) -> None:
    """Ascending, a panel each kind and the mean, a line each recipe, bars of one standard deviation."""
    comparison = made(numbers({"a": values, "b": values}))
    plot(comparison, Path("unused"))
    [drawn] = figure
    kinds = [None, *CHANCE]
    assert len(drawn.axes) == len(kinds) and {axes.get_xscale() for axes in drawn.axes} == {scale}
    for axes, kind in zip(drawn.axes, kinds, strict=True):
        lines = [entry for entry in axes.containers if isinstance(entry, ErrorbarContainer)]
        assert [line.get_label() for line in lines] == ["a", "b"]
        for name, line in zip("ab", lines, strict=True):
            own = np.array([comparison.values(f"{name}-{value}", kind) for value in sorted(values)])
            points, _, (bars,) = line.lines
            assert np.array_equal(points.get_xdata(), sorted(values))
            assert np.allclose(points.get_ydata(), own.mean(1), atol=1e-12)
            ends = np.array([segment[:, 1] for segment in bars.get_segments()])
            assert np.allclose(ends[:, 1] - ends[:, 0], 2 * own.std(1, ddof=1), atol=1e-12)
        low, high = axes.get_ylim()
        assert low <= (own.mean(1) - own.std(1, ddof=1)).min() and high >= (own.mean(1) + own.std(1, ddof=1)).max()
        chance = np.mean([*CHANCE.values()]) if kind is None else CHANCE[kind]
        assert f"(chance {chance:.2f})" in axes.get_title()


@pytest.mark.parametrize("values", [{"a": [None, 1, 2]}, {"a": [True, False]}, {"a": ["x", "y"]}, {"a": [4], "b": [4]}])
def test_what_is_no_number_is_a_bar(figure: list[Figure], values: dict[str, list[Any]]) -> None:
    """A group each kind and the mean, a bar each variant, a dot each seed, chance as a dashed line."""
    comparison = made(numbers(values))
    plot(comparison, Path("unused"))
    [axes] = figure[0].axes
    kinds, variants = [None, *CHANCE], list(comparison.results)
    bars = [entry for entry in axes.containers if isinstance(entry, BarContainer)]
    assert [bar.get_label() for bar in bars] == variants
    found = np.array([[patch.get_height() for patch in bar] for bar in bars])
    own = np.array([[comparison.values(variant, kind) for kind in kinds] for variant in variants])
    assert np.allclose(found, own.mean(2), atol=1e-12)
    dots = np.array([line.get_ydata() for line in axes.lines]).reshape(own.shape)
    assert np.array_equal(dots, own)
    [dashes] = axes.collections
    assert dashes.get_label() == "chance"
    levels = [segment[0, 1] for segment in dashes.get_segments()]
    assert levels == pytest.approx([np.mean([*CHANCE.values()]), *CHANCE.values()])


def test_many_variants_have_rows_and_colours_of_their_own(tmp_path: Path, figure: list[Figure]) -> None:
    plot(made(numbers({f"r{number}": [None] for number in range(20)}), seeds=1), tmp_path / "many.png")
    assert len(figure[0].axes) == 2
    colours = {bar.patches[0].get_facecolor() for bar in figure[0].axes[0].containers}  # type: ignore[attr-defined]
    assert len(colours) == 20


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("256", "256"), ("1e-3", "1e-3"), ("-1", "minus-1"), (".5", "0.5"), ("-.5", "minus-0.5"), ("false", "false"),
        ("{target: both}", "target-both"), ("../../etc", "etc"), ("a/b c", "a-b-c"), ("'x'", "x"), ("größe", "größe"),
        ("runs/..", "runs"), (".hidden", "hidden"), ("siglip-so400m", "siglip-so400m"),
    ],
)  # fmt: skip
def test_a_value_names_a_folder(value: str, name: str) -> None:
    assert folder_name(value) == name


@pytest.mark.parametrize("value", ["~", "..", "-", "{}", "x" * 101])
def test_what_cannot_name_a_folder_is_told(value: str) -> None:
    with pytest.raises(UserError, match="cannot name a folder"):
        folder_name(value)


def test_differences_name_the_keys() -> None:
    one = {"a": 1, "b": [1, {"c": None}], "d": [1], "same": [2]}
    other = {"a": 2, "b": [1, {"c": 0}], "d": [1, 2], "same": [2], "e": "x"}
    found = ["a: 1 → 2", "b.1.c: None → 0", "d: [1] → [1, 2]", "e: None → x"]
    assert differences(one, other) == found and not differences(one, one)
    assert differences(one, {**one, "a": 3}, "top") == ["top.a: 1 → 3"]


def test_two_metrics_of_one_kind_are_told() -> None:
    values = {"values": {"all/accuracy": 0.5, "all/blind": 0.1, "loss": 2.0}}
    assert Result.read([values]) == Result({"all": 0.5}, {"chance": {}, "majority": {}})
    with pytest.raises(ValueError, match="two metrics report 'all/accuracy'"):
        Result.read([values, values])
