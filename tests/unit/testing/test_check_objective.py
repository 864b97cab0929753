"""The conformance kit passes sound objectives and explains what is wrong with others."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from foveate.objective import VisionObjective
from foveate.testing import CHECKS, ConformanceError, check_objective
from tests.objectives import Masked, Noisy, Queries
from tests.unit.testing.wrong_objectives import WRONG


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Noisy, {}),
        (Noisy, {"shift": 1, "layers": [0.5]}),
        (Masked, {"wish": "groups"}),
        (Masked, {"wish": "prefix_bidirectional", "keep_norm": False}),
        (Queries, {"fit": True, "encoder": True}),
    ],
)
def test_sound_objectives_pass(cls: type[VisionObjective], options: dict[str, Any]) -> None:
    report = check_objective(cls, options, seed=random.randrange(1000), gradient_to=("head", "projector", "llm"))
    assert [result.check for result in report.results] == [check.name for check in CHECKS]
    assert {result.status for result in report.results} <= {"passed", "skipped"}
    lines = str(report).splitlines()
    assert "passed" in lines[0] and all(any(check.name in line for line in lines) for check in CHECKS)


@pytest.mark.parametrize("what", WRONG)
def test_wrong_objectives_fail_and_their_twins_pass(what: str) -> None:
    wrong, corrected, check, fragments = WRONG[what]
    with pytest.raises(ConformanceError) as caught:
        check_objective(wrong)
    report, message = caught.value.report, " ".join(str(caught.value).split())
    found = report.of(check)
    assert report.failures == [found], "one thing is wrong, so one check says so"
    assert found.why.endswith(".") and found.do.endswith(".")
    for fragment in fragments:
        assert fragment in f"{found.told} {found.do}", found
        assert fragment in message
    assert all(text in message for text in (wrong.__name__.lower(), check, "it matters:", "to do:"))
    check_objective(corrected)


def test_global_generators_are_left_alone() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    with pytest.raises(ConformanceError):
        check_objective(WRONG["a global random generator"][0])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
