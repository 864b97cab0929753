"""The check that an objective's count fits the sum of its loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace

import torch

from foveate.testing.kit import Kit, apart, forward, loss_of, number
from foveate.testing.models import Bench, tiny_lmm
from foveate.testing.report import Failed, Skipped


def count(kit: Kit) -> str:
    """`count` is a number from 0 on that grows as the sum of the loss does: one for every unit that is summed.

    Nobody can read off a sum how many units it has. But a model with nine times as many visual tokens an image should
    have about the same loss a unit. So two sizes are measured on both models, with fresh heads: the sum itself (where
    all samples agree in its sign), and the length of its gradient with respect to the states that are read, added up
    over rows, which grows with the units whatever the sign of the loss. Only where each of them that can be measured
    grows more than three times as much as the count, or less than a third, in the mean of three pairs of models, the
    count is wrong.
    """
    _check_numbers(kit)
    if not kit.count_check:
        raise Skipped("count_check=False", waived=True)
    growths = _growths(kit, kit.seed)
    if _wrong(growths):  # by chance, or not
        several = [growths, *(_growths(kit, kit.seed + more) for more in (1, 2))]
        growths = {
            what: math.exp(statistics.fmean(math.log(found[what]) for found in several if what in found))
            for what in growths
        }
    told = f"{growths.get('units', 1):.3g} times as many units on nine times as many visual tokens"
    told += "".join(f", {what} {growths[what]:.3g} times" for what in ("sum", "gradient") if what in growths)
    if off := _wrong(growths):
        many = "more" if off > 0 else "fewer"
        raise Failed(
            f"{told}: the sum seems to run over {many} units than `count` says",
            "The sum is divided by the count, so with a wrong one the size of the loss, and with it the meaning of "
            "`weight`, depends on the encoder's resolution.",
            "Let count return how many terms an image brings to the sum: its rows for a loss on every visual token, as "
            "the default does, 1 for one term an image. Where the loss a unit really depends on the grid, say "
            "count_check=False.",
        )
    _check_shift(kit)
    _check_metrics(kit)
    return told


def _check_numbers(kit: Kit) -> None:
    """Raises `Failed` where count is no number from 0 on, depends on the sample's name, or is 0 and the loss not."""
    bench, why = kit.start, "The loss of a step is its sum over the count of the whole step."
    for sample in bench.samples.values():
        records = [record for record in sample.images if kit.name in record.objectives]
        for record in records:
            first, other = bench.rule.count(record), bench.rule.count(replace(record, sample_id="x", occurrence=9))
            if first != other:
                found = f"count is {first:g}, and {other:g} for the same image under another sample id"
                raise Failed(found, why, "Let count depend on the image's grid, content and role.")
        if records and not any(map(bench.rule.count, records)):
            total = kit.total(bench.pack([sample]), bench.learner)
            if abs(total) > 0:
                found = f"count is 0 for the images of '{sample.id}', whose loss is {total:.4g}"
                raise Failed(found, why, "Let count return how many terms an image brings to the sum.")


def _growths(kit: Kit, seed: int) -> dict[str, float]:
    """How many times larger units, sum and gradient are on nine times as many visual tokens, as far as can be told."""
    small = kit.start if seed == kit.seed else Bench(kit.chosen, tiny_lmm(kit.side, seed), seed)
    large = Bench(kit.chosen, tiny_lmm(3 * kit.side, seed), seed)
    sizes, others = _sizes(kit, small), _sizes(kit, large)
    growths = {what: others[what] / size for what, size in sizes.items() if size}
    return {what: growth for what, growth in growths.items() if growth > 0 and math.isfinite(growth)}


def _wrong(growths: Mapping[str, float]) -> int:
    """1: all sizes grow more than three times as much as the units; -1: less than a third; else 0."""
    ratios = [
        growths[what] / growths["units"] for what in ("sum", "gradient") if what in growths and "units" in growths
    ]
    return bool(ratios) and int(min(ratios) > 3) - int(max(ratios) < 1 / 3)


def _sizes(kit: Kit, bench: Bench) -> dict[str, float]:
    """Units, sum and length of the gradient over some samples; the sum is 0 where samples differ in its sign."""
    sizes = {"units": 0.0, "sum": 0.0, "gradient": 0.0}
    signs: set[float] = set()
    for kind in ("image only", "one image", "another image", "two images"):
        batch = bench.pack([bench.samples[kind]])
        sizes["units"] += sum(bench.rule.count(record) for record in batch.images if kit.name in record.objectives)
        run = forward(bench.learner, batch, kit.name)
        total = loss_of(run, kit.name).total
        sizes["sum"] += number(total)
        signs.add(math.copysign(1.0, number(total)))
        read = [states for states in run.layers.values() if states.requires_grad]
        read += [run.vision.tokens] if run.vision is not None and not bench.rule.reads.llm else []
        if total.requires_grad and read:
            gradients = torch.autograd.grad(total, read, allow_unused=True)
            sizes["gradient"] += sum(float(g.norm(dim=-1).sum()) for g in gradients if g is not None)
    return sizes | ({"sum": 0.0} if len(signs) > 1 else {})


def _check_shift(kit: Kit) -> None:
    """Raises `Failed` where the count is the visual tokens, although shift 1 drops a row of images that open."""
    bench = kit.start
    if bench.rule.reads.shift != 1 or bench.objective.role != "input":
        return
    [first], [behind] = bench.samples["image first"].images[:1], bench.samples["one image"].images[:1]
    if bench.rule.count(first) == bench.rule.count(behind) == behind.rows(1) != first.rows(1):
        raise Failed(
            f"with shift 1 count is {behind.tokens} for an image behind text and also for one that opens its sample, "
            f"which has {first.rows(1)} rows",
            "The first visual token of such an image has no state before it, so it brings no term to the sum.",
            "Return record.rows(1), as the default does, instead of record.tokens.",
        )


def _check_metrics(kit: Kit) -> None:
    """Raises `Failed` where a metric divides the very sum of the loss by something that count is no multiple of."""
    bench = kit.start
    ratios: dict[str, list[float]] = {}
    for kind in ("image first", "image only", "one image", "two images", "wide picture"):
        batch = bench.pack([bench.samples[kind]])
        term = kit.term(batch, bench.learner)
        units = sum(bench.rule.count(record) for record in batch.images if kit.name in record.objectives)
        for name, (value, divisor) in term.metrics.items():
            same = bool(units and divisor) and apart(number(value), number(term.total)) < 1e-6
            ratios.setdefault(name, []).append(number(divisor) / units if same else math.nan)
    sure = [name for name, found in ratios.items() if all(ratio == 1.0 for ratio in found)]
    for name, found in ratios.items():
        if not sure and all(map(math.isfinite, found)) and max(found) > min(found) * (1 + 1e-9):
            raise Failed(
                f"metric '{name}' has the sum of the loss and between {min(found):.4g} and {max(found):.4g} times its "
                "count",
                "One of the two divides by the wrong number: the loss that is trained is not the one that is shown.",
                "Let count return the number that the metric has. Where both are meant: count_check=False.",
            )
