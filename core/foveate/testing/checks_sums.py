"""Checks that a loss is a sum over samples, whatever they are packed with and whatever else is trained."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from foveate.objective import LossTerm, ObjectiveContext, ObjectiveOptions, Outputs, Reads, Targets, VisionObjective
from foveate.targets import called
from foveate.testing.kit import MOMENT, Kit, Measured, apart, fail_unless_close
from foveate.testing.models import Bench, build_objective
from foveate.testing.report import Failed, Skipped
from foveate.types import Sample

PACKING = "The number of processes and the token budget decide what is packed together; they must change no gradient."

Check = Callable[[Kit], str]


def _waived_by_batch_dependence(check: Check) -> Check:
    """The same check, waived for objectives that say `batch_dependent = True`."""

    @functools.wraps(check)
    def checked(kit: Kit) -> str:
        if kit.chosen.cls.batch_dependent:
            raise Skipped("batch_dependent = True: its loss may depend on the packing", waived=True)
        return check(kit)

    return checked


@_waived_by_batch_dependence
def sums(kit: Kit) -> str:
    """Loss, metrics and gradients of a packed row are the sums of those of its samples alone."""
    samples = list(kit.trained.samples.values())
    whole, alone = kit.measure(samples), [kit.measure([sample]) for sample in samples]
    added = math.fsum(part.total for part in alone)
    scale = math.fsum(abs(part.total) for part in alone)
    do = "Return the sum over rows or images (reduction='sum'); core divides by the count of the whole step. "
    do += "Let no statistic run over the rows of several images."
    fail_unless_close(
        apart(whole.total, added, scale),
        f"{len(samples)} samples in one row have the loss {whole.total:.8g}; alone, {added:.8g} in sum."
        + _diagnosis(kit, samples, whole.total, alone),
        PACKING,
        do,
    )
    names = {tuple(part.metrics) for part in (whole, *alone)}
    if len(names) > 1:
        raise Failed(
            f"names of metrics depend on the batch: {' or '.join(', '.join(group) or 'none' for group in names)}",
            "All processes add up metrics by name; a name that one lacks stops the others.",
            "Report every metric always, with count 0 where a batch has nothing for it.",
        )
    computed = {name: pair for name, pair in whole.metrics.items() if not name.endswith("seconds")}  # no clock
    for name, pair in computed.items():
        for place, what in enumerate(("sum", "count")):
            values = [part.metrics[name][place] for part in alone]
            scale = math.fsum(map(abs, values))
            found = f"metric '{name}': its {what} is {pair[place]:.8g} in one row and {math.fsum(values):.8g} from "
            found += "samples alone"
            do = f'Report metrics as (sum, count): {{"{name}": (values.sum(), len(values))}}.'
            fail_unless_close(apart(pair[place], math.fsum(values), scale), found, PACKING, do)
    worst = _compare_gradients(whole, alone)
    return (
        f"loss, {len(whole.metrics)} metrics and gradients of {len(samples)} samples add up (gradients to {worst:.1g})"
    )


def _diagnosis(kit: Kit, samples: list[Sample], whole: float, alone: list[Measured]) -> str:
    """What the packed loss looks like instead."""
    units = [sum(kit.trained.rule.count(r) for r in sample.images if kit.name in r.objectives) for sample in samples]
    images = [sum(kit.name in record.objectives for record in sample.images) for sample in samples]
    for what, weights in (("units", units), ("images", images)):
        if apart(whole * sum(weights), math.fsum(w * p.total for w, p in zip(weights, alone, strict=True))) < 1e-6:
            return f" It is the mean over {what}, not the sum."
    return " It is no mean over them either: samples influence each other, or the noise of an image depends on the row."


def _compare_gradients(whole: Measured, alone: list[Measured]) -> float:
    """The largest difference between gradients, relative to the parameter's largest. Raises `Failed`."""
    worst = 0.0
    sizes = [float(gradient.abs().max()) for gradient in whole.gradients.values() if gradient is not None]
    floor = 1e-3 * max(sizes, default=0.0)  # some gradients are zero but for rounding: a key's bias
    for name, gradient in whole.gradients.items():
        parts = [part.gradients[name] for part in alone]
        found = [part for part in parts if part is not None]
        added = torch.stack(found).sum(0) if found else torch.zeros(())
        value = torch.zeros_like(added) if gradient is None else gradient
        scale = max(float(value.abs().max()), floor)
        distance = float((value - added).abs().max()) / scale if scale else 0.0
        told = f"the gradient of {name} in one row and the sum of those of samples alone differ by {distance:.2g} of it"
        fail_unless_close(distance, told, PACKING, "Return sums, and detach nothing that depends on other samples.")
        worst = max(worst, distance)
    return worst


@_waived_by_batch_dependence
def packing(kit: Kit) -> str:
    """Neither the order of samples, nor their number, nor what they are packed with changes the loss."""
    samples = list(kit.trained.samples.values())
    whole, backwards = kit.total(samples), kit.total(samples[::-1])
    groups = [samples[:2], samples[2:3], samples[3:7], samples[7:]]
    grouped = [kit.total(group) for group in groups]
    again = [_renamed(sample) for sample in samples]
    doubled, second = kit.total([*samples, *again]), kit.total(again)
    scale = math.fsum(map(abs, grouped))
    do = "Read each image's rows by outputs.images, outputs.split or outputs.per_image_mean; let no result depend on "
    do += "where an image stands in the row."
    for what, value, other in (
        ("backwards", backwards, whole), ("in four rows", math.fsum(grouped), whole),
        ("together with nine others, less these", doubled - second, whole),
    ):  # fmt: skip
        found = f"nine samples have the loss {other:.8g} in one row and {value:.8g} {what}"
        fail_unless_close(apart(value, other, max(scale, abs(doubled))), found, PACKING, do)
    return "the same backwards, in four rows, and beside nine others"


def _renamed(sample: Sample) -> Sample:
    """The same sample at another place of the step."""
    return replace(sample, images=[replace(record, occurrence=1) for record in sample.images])


class Bystander(VisionObjective):
    """An objective beside the one that is checked: reads here and there, draws noise, changes nothing."""

    class Options(ObjectiveOptions):
        """None of its own."""

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        self.head = nn.Linear(context.llm_width, 2)

    @classmethod
    def reads(cls, options: Any) -> Reads:
        return Reads(llm=(0, 1, -1), encoder=(1,))

    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        states = outputs.states(0) + outputs.states(1) + outputs.states(-1)
        error = (self.head(states) - outputs.randn_rows(2, name="noise")).square().sum()
        return LossTerm(error + outputs.encoder_states(1).square().sum())


def other_objectives(kit: Kit) -> str:
    """Beside another objective, and beside one of its own type, its loss is the same; it changes nothing in place."""
    old, rule = kit.trained, kit.trained.rule
    bystander = Bystander(Bystander.Options(), replace(old.objective.context, name="bystander")).double()
    others: dict[str, VisionObjective] = {"bystander": bystander}
    changes = type(old.objective).edit_visual_tokens is not VisionObjective.edit_visual_tokens
    changes |= rule.call("attention") != "causal" or bool(old.mixed.rows[kit.name].extra.numel())
    if not changes:
        others["twin"] = build_objective(kit.chosen, old.lmm, "twin", kit.seed).double()
    bench = Bench(kit.chosen, old.lmm, kit.seed, objective=old.objective, teachers_of=old, others=others)
    why = "Objectives are composed by a recipe; none may change what another one learns."
    do = "Change nothing in place that outputs and targets give, keep nothing global, and read noise by name."
    if touched := _touched(bench):
        raise Failed(f"loss changes in place what others read too: {', '.join(touched)}", why, do)
    alone, together = kit.total(old.mixed), _losses(bench)
    found = f"the loss is {alone:.8g} alone and {together[kit.name]:.8g} beside {' and '.join(others)}"
    fail_unless_close(apart(alone, together[kit.name]), found, why, do)
    if changes:
        return "the same beside a bystander"
    quiet = _losses(bench, ["bystander"])["bystander"]
    found = f"the loss of another objective is {quiet:.8g} without it and {together['bystander']:.8g} beside it"
    fail_unless_close(apart(quiet, together["bystander"]), found, why, do)
    return "the same beside a bystander and a twin; the bystander's too"


@torch.no_grad()
def _losses(bench: Bench, active: Sequence[str] | None = None) -> dict[str, float]:
    """The losses of all objectives of a bench, or of the `active` ones."""
    return {name: float(term.total) for name, term in bench.learner(bench.mixed, MOMENT, active).terms.items()}


@torch.no_grad()
def _touched(bench: Bench) -> list[str]:
    """What the objective's loss changes in place of what objectives share."""
    seen = bench.learner.look(bench.mixed, MOMENT)[bench.name]
    shared = [(f"target '{name}'", value) for record in seen.targets for name, value in record.items()]
    shared += [(f"encoder_states({layer})", seen.outputs.encoder_states(layer)) for layer in bench.rule.reads.encoder]
    before = [value.clone() for _, value in shared]
    called(bench.objective, bench.name, "loss", seen.outputs, seen.targets, seen.state)
    return sorted({what for (what, now), old in zip(shared, before, strict=True) if not torch.equal(now, old)})
