"""Fixtures for authors of plugins: tiny models and samples of the conformance kit, wherever pytest and foveate are.

    def test_the_first_loss(foveate_learner, foveate_batches):
        learner = foveate_learner("mine", {"depth": 2})
        term = learner(foveate_batches(learner)["image first"]).terms["mine"]
        assert term.total > 0

No network and no files are needed; everything is float64 and the same in every run. Torch is imported by the fixtures,
not by this module. `pytest -p no:foveate` leaves the plugin out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from foveate.learner import Learner
    from foveate.model.lmm import LMM
    from foveate.objective import VisionObjective
    from foveate.types import Batch


class MakeLearner(Protocol):
    """What the fixture `foveate_learner` is."""

    def __call__(
        self, objective: str | type[VisionObjective], options: Mapping[str, Any] | None = None, seed: int = 0
    ) -> Learner:
        """`objective`: a name as in a recipe, or a class; `options`: its options, checked. `seed`: of the head."""


@pytest.fixture
def foveate_lmm() -> LMM:
    """A tiny LMM in float64: a frozen SigLIP of two blocks, an MLP, a Qwen2 of four blocks; 4 × 4 visual tokens."""
    from foveate.testing.models import tiny_lmm

    return tiny_lmm()


@pytest.fixture
def foveate_learner(foveate_lmm: LMM) -> MakeLearner:
    """A function that puts an objective on `foveate_lmm` and returns the `foveate.Learner`, teacher built and fitted.

    The objective's name in it is the one it is asked for by, or its class's name in lower case.
    """
    from foveate.testing.models import Bench, choose

    def make(
        objective: str | type[VisionObjective], options: Mapping[str, Any] | None = None, seed: int = 0
    ) -> Learner:
        return Bench(choose(objective, options), foveate_lmm, seed).learner

    return make


@pytest.fixture
def foveate_batches(foveate_lmm: LMM) -> Callable[..., dict[str, Batch]]:
    """A function that packs a row of each kind of sample, and "mixed" of all, for a learner's objectives or for none.

    The kinds: "text only" (with the dummy picture that stands in), "image first", "image only", "two images only",
    "one image", "another image", "two images", "adjacent images", "wide picture" (padded). `seed`: of the pictures.
    """
    from foveate.testing.models import tiny_batches, tiny_rules

    def make(learner: Learner | None = None, seed: int = 0) -> dict[str, Batch]:
        return tiny_batches(tiny_rules(foveate_lmm, tuple(learner.rules.values()) if learner else ()), seed)

    return make
