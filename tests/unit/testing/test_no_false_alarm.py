"""Unusual but sound objectives pass; what their authors declare is shown in the table."""

from __future__ import annotations

import random
from typing import Any

import pytest

from foveate.errors import FoveateError, UserError
from foveate.objective import VisionObjective
from foveate.testing import check_objective
from tests.objectives import ALL, plugins_with
from tests.unit.testing.sound_objectives import SOUND, Colours, Contrastive, Detached, NegativeCosine, Painter


@pytest.mark.parametrize(("cls", "told"), SOUND, ids=lambda value: getattr(value, "__name__", ""))
def test_unusual_objectives_pass(cls: type[VisionObjective], told: dict[str, Any]) -> None:
    report = check_objective(cls, seed=random.randrange(1000), **told)
    waived = {result.check for result in report.results if result.status == "waived"}
    assert waived == ({"sums", "packing"} if cls is Contrastive else set())


def test_a_name_is_resolved_like_in_a_recipe() -> None:
    plugins = plugins_with({**ALL, "painter": Painter}, {"colours": Colours})
    report = check_objective("painter", {"teacher": {"type": "colours", "grid": 3}}, plugins=plugins)
    assert report.objective == "objective 'painter' (tests.unit.testing.sound_objectives.Painter)"
    assert report.of("registration").told == "'painter', by test-objectives (tests)"
    assert report.of("targets").told.startswith("colours of 11 pictures")
    assert "Colours" in report.of("teacher").told


def test_a_class_gets_its_options_checked_the_same_way() -> None:
    plugins = plugins_with({}, {"colours": Colours})
    report = check_objective(Painter, {"teacher": "colours"}, plugins=plugins, gradient_to=("head",))
    assert report.of("registration").status == "skipped"


@pytest.mark.parametrize(
    ("objective", "options", "fragments"),
    [
        ("nois", {}, ["unknown objective 'nois'", "did you mean 'noisy'?"]),
        ("noisy", {"shfit": 1}, ["shfit", "did you mean 'shift'?"]),
        (NegativeCosine, {"weigth": 1}, ["weigth", "did you mean 'weight'?"]),
        (Painter, {"teacher": "color"}, ["teacher", "unknown teacher 'color'", "'colours'"]),
        (Painter, {}, ["the required key 'teacher' is missing"]),
    ],
)
def test_what_cannot_be_checked_is_told(objective: Any, options: dict[str, Any], fragments: list[str]) -> None:
    plugins = plugins_with({**ALL, "painter": Painter}, {"colours": Colours})
    with pytest.raises(UserError) as caught:
        check_objective(objective, options, plugins=plugins)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(FoveateError, match="head, projector and llm are known, not encoder"):
        check_objective(Detached, gradient_to=("encoder",))  # type: ignore[arg-type]
