"""The fixtures for authors: found by entry point, light until they are used, and what they promise."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch

from foveate.learner import Learner
from foveate.model.lmm import LMM
from foveate.objective import Moment
from foveate.testing.models import LAYOUTS
from foveate.types import Batch
from tests.objectives import Noisy, Queries

Batches = Callable[..., dict[str, Batch]]


def test_the_plugin_is_installed_and_light(pytestconfig: pytest.Config) -> None:
    [point] = [point for point in entry_points(group="pytest11") if point.value == "foveate.pytest_plugin"]
    assert pytestconfig.pluginmanager.has_plugin(point.name)
    script = "import sys, foveate.pytest_plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_learner_and_batches_fit_together(
    foveate_lmm: LMM, foveate_learner: Callable[..., Learner], foveate_batches: Batches
) -> None:
    learner = foveate_learner(Queries, {"tokens": 2, "fit": True})
    batches = foveate_batches(learner)
    assert learner.lmm is foveate_lmm and set(batches) == {*LAYOUTS, "mixed"}
    alone = [learner(batch).terms["queries"].total for kind, batch in batches.items() if kind != "mixed"]
    together = learner(batches["mixed"]).terms["queries"].total
    torch.testing.assert_close(torch.stack(alone).sum(), together, rtol=1e-12, atol=0)
    assert together.dtype == torch.float64 and learner(batches["text only"]).terms["queries"].total == 0
    teacher: Any = learner.teachers.of("queries")
    assert 0 < float(teacher.scale) < 1, "the teacher is fitted"


def test_batches_for_no_objective_have_the_layouts_they_promise(foveate_batches: Batches) -> None:
    batches = foveate_batches()
    images = {kind: batch.images for kind, batch in batches.items()}
    assert images["image first"][0].opens and images["image only"][0].opens and not images["one image"][0].opens
    assert not batches["image only"].target_ids.numel() and batches["image first"].target_ids.numel()
    first, second = images["adjacent images"]
    assert second.start == first.start + first.tokens
    assert images["wide picture"][0].content == pytest.approx((0, 0.3, 1, 0.7))
    assert batches["text only"].images[0].dummy
    assert torch.equal(batches["mixed"].pixels, foveate_batches()["mixed"].pixels)
    assert not torch.equal(batches["mixed"].pixels, foveate_batches(seed=1)["mixed"].pixels)


def test_a_seed_is_another_head(foveate_learner: Callable[..., Learner], foveate_batches: Batches) -> None:
    losses = set()
    for seed in (0, 0, 1):
        learner = foveate_learner(Noisy, seed=seed)
        losses.add(float(learner(foveate_batches(learner)["image only"], Moment(5)).terms["noisy"].total.detach()))
    assert len(losses) == 2
