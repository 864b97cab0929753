"""Checks of one loss: finite, zero without an image, with gradients, and a pure function of its arguments."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from foveate.errors import PluginError
from foveate.testing.kit import (
    Kit,
    apart,
    fail_unless_close,
    forward,
    global_states,
    loss_of,
    number,
    read_blocks,
    seeded,
)
from foveate.testing.report import Failed


def kinds_of_samples(kit: Kit) -> str:
    """Every kind of sample with an image gives, by itself, a finite loss and finite gradients."""
    learner, bad, totals = kit.start.learner, dict[str, str](), dict[str, float]()
    for kind, sample in ((kind, sample) for kind, sample in kit.start.samples.items() if sample.images):
        learner.zero_grad(set_to_none=True)
        term = kit.term(kit.start.pack([sample]), learner)
        if term.total.requires_grad:
            term.total.backward()
        totals[kind] = number(term.total)
        names = [name for name, p in learner.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        if not math.isfinite(totals[kind]) or names:
            bad[kind] = f"loss {totals[kind]:.4g}, gradients that are not finite: {len(names)}"
    learner.zero_grad(set_to_none=True)
    if bad:
        raise Failed(
            "; ".join(f"'{kind}': {told}" for kind, told in bad.items()),
            "A value that is not finite stops the training.",
            "Guard divisions, roots and logarithms; an image may have padding, and one row less with shift 1.",
        )
    return ", ".join(f"{kind} {total:.4g}" for kind, total in totals.items())


def gradient_flow(kit: Kit) -> str:
    """Every parameter that should learn gets a gradient in one of the first optimizer steps."""
    bench = kit.trained
    if infinite := [name for name, size in kit.largest.items() if size == math.inf]:
        raise Failed(
            f"gradients that are not finite: {', '.join(infinite[:4])}",
            "A value that is not finite stops the training.",
            "Guard divisions, roots and logarithms with an epsilon.",
        )
    if missing := kit.without_gradient(bench):
        raise Failed(
            f"no gradient in {kit.steps} optimizer steps: {', '.join(missing)}",
            "What gets no gradient does not learn from the objective, and a run stops where nothing of a part moves.",
            "Look for detach, no_grad and modules that are not used. Where it is meant that the projector or the LLM "
            "learn nothing, leave them out of gradient_to.",
        )
    parts = [part for part in kit.gradient_to if part != "head" or list(bench.objective.parameters())]
    blocks = f"; {len(read_blocks(bench))} blocks of the LLM are read"
    return f"all of {', '.join(parts) or 'nothing'}, within {kit.steps} steps{blocks}"


def text_only(kit: Kit) -> str:
    """A row without an image: a dummy stands in, and the term and its gradients are exactly zero."""
    bench = kit.trained
    do = "Let the dummy picture run through the same code as any other, without a special case for record.dummy."
    why = "A process without an image computes the loss on a dummy picture, so that all processes run the same code; "
    why += "zero times NaN is NaN, and a parameter without a gradient lets the other processes wait for ever."
    try:
        term, real = kit.measure([bench.samples["text only"]]), kit.measure(list(bench.samples.values()))
    except PluginError as error:
        if error.__cause__ is not None:  # the objective raised
            raise
        raise Failed(str(error), why, do) from error
    if term.total != 0.0:
        raise Failed(f"the term is {term.total!r}, not 0.0", why, do)
    bad = [name for name, gradient in term.gradients.items() if gradient is not None and bool((gradient != 0).any())]
    if bad:
        raise Failed(f"gradients that are not exactly zero: {', '.join(bad[:4])}", why, do)
    absent = [name for name, gradient in term.gradients.items() if gradient is None]
    lost = sorted((name for name in absent if real.gradients[name] is not None), key=lambda name: name[:4] == "lmm.")
    if lost:
        raise Failed(f"parameters that are used for other pictures get no gradient: {', '.join(lost[:4])}", why, do)
    if term.metrics.keys() != real.metrics.keys():
        found = f"metrics {', '.join(term.metrics) or 'none'}; of other rows {', '.join(real.metrics) or 'none'}"
        raise Failed(found, why, "Report every metric always, with count 0 where a batch has nothing for it.")
    return f"0.0, and {len(term.gradients) - len(absent)} gradients of exact zeros"


def noise(kit: Kit) -> str:
    """Nothing random comes from a global generator or from the operating system."""
    losses, moved = list[float](), dict[str, list[str]]()
    for seed in (11, 12):
        learner, batch = kit.copy_of_trained(), kit.trained.mixed
        seeded(seed)
        states = [global_states()]
        run = forward(learner, batch, kit.name)
        states.append(global_states())
        run.targets(kit.name)
        states.append(global_states())
        losses.append(number(loss_of(run, kit.name).total))
        states.append(global_states())
        for place, (old, new) in zip(("an editor", "encode_target", "loss"), pairwise(states), strict=True):
            moved |= {place: names} if (names := [name for name in old if old[name] != new[name]]) else {}
    why = "Noise from a global generator depends on everything else that draws: processes, packing, other objectives, "
    why += "a resume. The same recipe would give another model."
    do = "Draw from outputs.randn, outputs.randn_rows or outputs.generator(image, name), in an editor from its inputs; "
    do += "dropout in a head draws from torch's global generator."
    if moved:
        told = "; ".join(f"{place} draws from the global generator of {', '.join(who)}" for place, who in moved.items())
        raise Failed(f"{told}. With two global seeds the loss is {losses[0]:.8g} and {losses[1]:.8g}", why, do)
    found = f"the loss of one batch at one moment is {losses[0]:.8g} and then {losses[1]:.8g}"
    fail_unless_close(apart(*losses), found, why, do)
    return "the same loss with two global seeds; global generators untouched"


def memory(kit: Kit) -> str:
    """A loss leaves nothing behind that changes the next one."""
    learner, samples = kit.copy_of_trained(), list(kit.trained.samples.values())
    objective = learner.objectives[kit.name]
    first, others = samples[-2:], samples[:-2]
    before, attributes = {key: value.clone() for key, value in objective.state_dict().items()}, _attributes(objective)
    losses = [kit.total(first, learner)]
    changed = [key for key, value in objective.state_dict().items() if not torch.equal(value, before[key])]
    kit.total(others, learner)
    losses.append(kit.total(first, learner))
    now = _attributes(objective)
    written = [name for name in now if name not in attributes or attributes[name] is not now[name]]
    why = "A step has as many losses as micro-batches and processes, so what one leaves for the next makes gradients "
    why += "depend on the hardware, and samples leak into each other."
    do = "Keep nothing of a batch on self: pass it on as Edit.state, and move averages in after_step."
    hint = f" It writes the attributes {', '.join(written)}." if written else ""
    fail_unless_close(
        apart(*losses),
        f"the loss of one batch is {losses[0]:.8g}, and {losses[1]:.8g} after another batch.{hint}",
        why,
        do,
    )
    if changed:
        raise Failed(f"loss changes the buffers {', '.join(changed)}", why, do)
    return "the same loss before and after another batch; state untouched"


def _attributes(objective: nn.Module) -> dict[str, Any]:
    """What stands on the modules beside parameters, buffers and sub-modules."""
    return {
        f"{name}.{key}".strip("."): value
        for name, module in objective.named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_")
    }


def autocast(kit: Kit) -> str:
    """Under bf16 autocast with a float32 model, loss and gradients are finite."""
    learner, batch = kit.in_float32(), kit.trained.mixed
    with torch.autocast("cpu", torch.bfloat16):
        term = kit.term(batch, learner)
    if term.total.requires_grad:
        term.total.backward()
    bad = [name for name, p in learner.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if not term.total.isfinite() or bad:
        raise Failed(
            f"loss {float(term.total.detach()):.4g}; gradients that are not finite: {', '.join(bad[:4]) or 'none'}",
            "Training runs in bfloat16 by default; a value that is not finite stops it.",
            "Guard divisions, roots and logarithms with an epsilon that float32 can hold, such as 1e-6.",
        )
    exact = kit.total(batch)
    return f"loss {float(term.total.detach()):.5g}, in float64 {exact:.5g}"
