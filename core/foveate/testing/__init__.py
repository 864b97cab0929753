"""The conformance kit for authors of objectives.

    from foveate.testing import check_objective

    def test_contract():
        print(check_objective("mine", {"depth": 2}))

It puts the objective on a tiny LMM with real data paths, in float64 and without network, runs every check of `CHECKS`
and raises one `ConformanceError` that says of each failed check what was found, why it matters and what to do. With
pytest, the fixtures `foveate_lmm`, `foveate_batches` and `foveate_learner` offer the same models and samples.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from foveate.errors import FoveateError, UserError
from foveate.objective import VisionObjective
from foveate.plugins import Plugins
from foveate.testing import checks_class, checks_count, checks_loss, checks_model, checks_sums
from foveate.testing.kit import Kit, own_generators
from foveate.testing.models import choose
from foveate.testing.report import ConformanceError, Failed, Report, Result, Skipped

__all__ = ["CHECKS", "Check", "ConformanceError", "Report", "Result", "check_objective"]

Part = Literal["head", "projector", "llm"]


@dataclass(frozen=True)
class Check:
    """One check by name. `needs`: checks that must have passed, because without them this one says nothing."""

    name: str
    run: Callable[[Kit], str]
    needs: tuple[str, ...] = ()


_FINITE = ("targets", "kinds of samples")
_PURE = (*_FINITE, "noise", "memory")

CHECKS: tuple[Check, ...] = (
    # what it is
    Check("options", checks_class.options),
    Check("registration", checks_class.registration),
    Check("construction", checks_class.construction),
    Check("pickling", checks_class.pickles),
    # its teacher, and what it does around the LLM
    Check("teacher", checks_model.teacher),
    Check("class methods", checks_class.class_methods),
    Check("targets", checks_model.teacher_targets),
    Check("edits", checks_model.edits),
    Check("extra tokens", checks_model.extra_tokens),
    Check("attention", checks_model.attention),
    # its loss
    Check("kinds of samples", checks_loss.kinds_of_samples),
    Check("text-only batch", checks_loss.text_only, _FINITE),
    Check("gradient flow", checks_loss.gradient_flow, _FINITE),
    Check("frozen teacher", checks_model.frozen_teacher, _FINITE),
    Check("noise", checks_loss.noise, _FINITE),
    Check("memory", checks_loss.memory, (*_FINITE, "noise")),
    Check("sums", checks_sums.sums, _PURE),
    Check("packing", checks_sums.packing, (*_PURE, "sums")),
    Check("count", checks_count.count, (*_PURE, "sums")),
    Check("other objectives", checks_sums.other_objectives, (*_PURE, "frozen teacher")),
    # a run around it
    Check("checkpoint", checks_class.round_trip, _PURE),
    Check("autocast", checks_loss.autocast, _FINITE),
    Check("pictures", checks_model.pictures, _FINITE),
)
"""All checks, in the order in which they run. Each is a function `(Kit) -> what was measured`."""


def check_objective(
    objective: str | type[VisionObjective], options: Mapping[str, Any] | None = None, *,
    gradient_to: Sequence[Part] = ("head", "projector"), count_check: bool = True, side: int = 4, seed: int = 0,
    plugins: Plugins | None = None,
) -> Report:  # fmt: skip
    """Holds an objective to the contract; prints as a table. Raises `ConformanceError` with all failures at once.

    `objective`: a name as in a recipe (a preset, or what a plugin registers), or a class; `options`: its options.
    `gradient_to`: what must learn from it; "llm" asks every block up to the deepest layer that it reads. Without
    "projector" for an objective that reads detached states. `count_check=False` waives the check that its sum grows
    with its count, for a loss whose size a unit depends on the grid by nature. `side`: visual tokens an image are
    side², for objectives that need a larger grid than 4 × 4; the check of the count takes three times that side.
    `seed`: of weights and pictures. `plugins`: where other than the installed ones are meant.

    Raises `UserError` where there is nothing to check: unknown names, options that do not fit.
    """
    if unknown := set(gradient_to) - {"head", "projector", "llm"}:
        raise UserError(f"gradient_to: head, projector and llm are known, not {', '.join(sorted(unknown))}")
    chosen = choose(objective, options, plugins)
    kit = Kit(chosen, tuple(gradient_to), count_check, side, seed, plugins)
    results: list[Result] = []
    with own_generators():
        for check in CHECKS:
            results.append(_result(check, kit, results))
    cls = chosen.cls
    report = Report(f"objective '{chosen.name}' ({cls.__module__}.{cls.__qualname__})", tuple(results))
    if report.failures:
        raise ConformanceError(report)
    return report


def _result(check: Check, kit: Kit, before: Sequence[Result]) -> Result:
    """Runs one check. An error after a failed check is most likely its consequence, and told as such."""
    failed = [result.check for result in before if result.status in ("failed", "not run")]
    if blocking := [name for name in check.needs if name in failed]:
        return Result(check.name, "not run", f"needs '{blocking[0]}'")
    try:
        return Result(check.name, "passed", check.run(kit))
    except Failed as failure:
        return Result(check.name, "failed", failure.found, failure.why, failure.do)
    except Skipped as reason:
        return Result(check.name, "waived" if reason.waived else "skipped", str(reason))
    except Exception as error:
        told = str(error) if isinstance(error, FoveateError) else f"{type(error).__name__}: {error}"
        if failed:
            return Result(check.name, "not run", told.strip().splitlines()[0][:200])
        place = traceback.extract_tb((error.__cause__ or error).__traceback__)[-1]
        do = f"Mend what raises: line {place.lineno} of {place.filename}, in {place.name}."
        return Result(check.name, "failed", told, "An objective that raises stops the training.", do)
