"""The objective against formulas of its own in float64, and what each option does; the conformance kit."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from foveate import Learner, Moment, ObjectiveContext
from foveate.errors import ModelError, PluginError, TrainingError
from foveate.testing import check_objective
from foveate.types import Batch
from foveate_victor.objective import Victor, replaced_of
from foveate_victor.pool import Pool

MOMENT = Moment(int(torch.randint(1 << 30, ())), "only", 0)


def inputs_of(learner: Learner, batch: Batch, moment: Moment = MOMENT) -> tuple[Tensor, Tensor]:
    """What stands at the visual positions when the LLM begins, `[R, D]`, with and without the objective."""
    found: list[Tensor] = []

    def keep(module: Any, arguments: Any, keywords: Any) -> None:
        found.append((arguments[0] if arguments else keywords["hidden_states"])[0, batch.visual_positions])

    handle = learner.lmm.llm.blocks()[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        learner(batch, moment)
        learner(batch, moment, ())
    finally:
        handle.remove()
    return found[0], found[1]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def by_hand(learner: Learner, batch: Batch, options: dict[str, Any], where: Tensor) -> tuple[float, np.ndarray]:
    """Loss and inserted tokens: numpy and scipy on the tokens, the LMM's own body; `where`: what is replaced."""
    objective: Any = learner.objectives["victor"]
    o = {"cost": "euclidean", "pool_norm": "unit", "target": "normalised", "loss_on": "all", "beta": 0.01, **options}
    with torch.no_grad():
        tokens = learner.lmm.see(batch.pixels).tokens
        v, pool = tokens.numpy(), objective.pool.rows.numpy()
        y = unit(v) if o["target"] == "normalised" else v
        norms = np.linalg.norm(v, axis=1, keepdims=True)
        new, firsts = v.copy(), np.cumsum([0] + [image.tokens for image in batch.images]).tolist()
        for first, last in itertools.pairwise(firsts):
            chosen = where[(where >= first) & (where < last)].numpy()
            # what each row would be in each token's place, measured like the target
            if o["pool_norm"] == "unit":
                size = np.ones_like(norms[chosen]) if o["target"] == "normalised" else norms[chosen]
                candidates = size[:, None] * unit(pool)[None]
            else:
                candidates = np.broadcast_to(pool, (len(chosen), *pool.shape))
            costs = np.stack([cdist(y[[at]], each, o["cost"])[0] for at, each in zip(chosen, candidates, strict=True)])
            times = -(-len(chosen) // len(pool))
            if o.get("assignment") == "nearest":
                rows = costs.argmin(1)
            else:
                rows = linear_sum_assignment(np.tile(costs, (1, times)))[1] % len(pool)
            inserted = unit(pool[rows]) * norms[chosen] if o["pool_norm"] == "unit" else pool[rows]
            if o["pool_norm"] == "free" and o["target"] == "normalised":
                inserted = inserted * norms[chosen]
            new[chosen] = inserted
        states = learner.lmm.run(learner.lmm.place(batch, torch.from_numpy(new)), batch)[batch.visual_positions].numpy()
    made = states @ objective.head.weight.detach().numpy().T + objective.head.bias.detach().numpy()
    errors = np.abs(made - y)
    smooth = np.where(errors < o["beta"], errors**2 / (2 * o["beta"]), errors - o["beta"] / 2).mean(1)
    taken = smooth[where.numpy()] if o["loss_on"] == "replaced" else smooth
    return options.get("scale", 10.0) * taken.sum(), new


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "replaced only": {"loss_on": "replaced", "beta": 1.0, "scale": 2.5},
    "raw": {"target": "raw"},
    "free": {"pool_norm": "free", "pool_init": "gaussian"},
    "released": {"pool_norm": "free", "pool_init": "gaussian", "target": "raw"},
    "cosine": {"cost": "cosine", "pool_init": "unit_gaussian"},
    "first version": {"assignment": "nearest"},
    "few rows": {"pool_size": 5},
    "all tokens": {"replace_fraction": 1.0},
    "half": {"replace_fraction": 0.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_inputs_are_the_formulas(variant: str, foveate_learner: Any, foveate_batches: Any) -> None:
    options = {"pool_size": 40, **VARIANTS[variant]}
    learner = foveate_learner("victor", options)
    torch.nn.init.normal_(learner.objectives["victor"].head.bias)
    for kind in ("image first", "mixed"):
        batch = foveate_batches(learner, seed=MOMENT.seed % 1000)[kind]
        seen = learner.look(batch, MOMENT)["victor"]
        expected, inputs = by_hand(learner, batch, options, seen.state.where)
        assert float(learner(batch, MOMENT).terms["victor"].total.detach()) == pytest.approx(expected, rel=1e-9)
        edited, plain = inputs_of(learner, batch)
        torch.testing.assert_close(edited, torch.from_numpy(inputs), rtol=1e-9, atol=1e-12)
        kept = torch.ones(len(plain), dtype=torch.bool).index_fill(0, seen.state.where, False)
        assert torch.equal(edited[kept], plain[kept]), "what is not selected stays bit for bit"
        assert not (edited[~kept] == plain[~kept]).all(-1).any()


def test_only_matched_rows_get_gradient(foveate_learner: Any, foveate_batches: Any) -> None:
    """From the loss and from the text; of 60 rows at most 12 an image are matched."""
    learner = foveate_learner("victor", {"pool_size": 60})
    batch, pool = foveate_batches(learner)["two images"], learner.objectives["victor"].pool
    matched = set(learner.look(batch, MOMENT)["victor"].state.rows.tolist())
    assert 12 <= len(matched) <= 24
    for part in ("victor", "text"):
        learner.zero_grad()
        learner(batch, MOMENT).terms[part].total.backward()
        for row, gradient in enumerate(pool.rows.grad):
            assert bool((gradient != 0).any()) == (row in matched), (part, row)


def test_replaced_tokens_and_targets_get_no_gradient(foveate_learner: Any, foveate_batches: Any) -> None:
    """At the projector's outputs: zero where a row stands, elsewhere the gradient at the LLM's input for fixed targets.

    So no gradient comes from a target.
    """
    learner = foveate_learner("victor", {"pool_size": 30})
    batch, found = foveate_batches(learner)["one image"], list[Tensor]()
    hook = learner.lmm.projector.register_forward_hook(lambda *args: args[2].retain_grad() or found.append(args[2]))
    learner(batch, MOMENT).terms["victor"].total.backward()
    hook.remove()
    inputs, _ = inputs_of(learner, batch)
    inputs = inputs.detach().requires_grad_()
    states = learner.lmm.run(learner.lmm.place(batch, inputs), batch)[batch.visual_positions]
    wanted = torch.from_numpy(unit(found[0].detach().numpy()[0]))
    errors = (learner.objectives["victor"].head(states) - wanted).abs()
    (10 * torch.where(errors < 0.01, 50 * errors.square(), errors - 0.005).mean(-1)).sum().backward()
    replaced = learner.look(batch, MOMENT)["victor"].state.where
    assert inputs.grad is not None and found[0].grad is not None and bool((inputs.grad != 0).any(-1).all())
    torch.testing.assert_close(found[0].grad[0], inputs.grad.index_fill(0, replaced, 0), rtol=1e-9, atol=1e-12)
    assert bool((found[0].grad[0, replaced] == 0).all())


def test_targets_do_not_change_with_replacement(foveate_learner: Any, foveate_batches: Any) -> None:
    """A head that says zero has a loss that depends on the projector's tokens alone."""
    losses, tokens = list[float](), Tensor()
    for options in ({"replace_fraction": 0.1}, {"replace_fraction": 1.0}, {"pool_size": 1}, {"pool_init": "gaussian"}):
        learner = foveate_learner("victor", {"pool_size": 20, **options})
        torch.nn.init.zeros_(learner.objectives["victor"].head.weight)
        batch = foveate_batches(learner)["mixed"]
        losses.append(float(learner(batch, MOMENT).terms["victor"].total.detach()))
        with torch.no_grad():
            tokens = learner.lmm.see(batch.pixels).tokens
    y = unit(tokens.numpy())
    errors = np.abs(y)
    bound = 10 * np.where(errors < 0.01, errors**2 / 0.02, errors - 0.005).mean(1).sum()
    assert losses == pytest.approx([bound] * 4, rel=1e-12)


def test_the_prompt_is_bidirectional_where_it_is_asked_for(foveate_learner: Any, foveate_batches: Any) -> None:
    """A nudge of an image's last token reaches the state of its first one, in the first version's mask only."""
    moved = []
    for attention in ("causal", "prefix_bidirectional"):
        learner = foveate_learner("victor", {"pool_size": 20, "attention": attention})
        batch = foveate_batches(learner)["one image"]
        states = []
        for nudge in (0.0, 1.0):
            hook = learner.lmm.projector.register_forward_hook(lambda *args, by=nudge: args[2] + by * last(args[2]))
            with torch.no_grad():
                states.append(learner.look(batch, MOMENT)["victor"].outputs.states()[0])
            hook.remove()
        moved.append(float((states[1] - states[0]).abs().max()))
    assert moved[0] == 0 and moved[1] > 1e-6


def last(tokens: Tensor) -> Tensor:
    """One at the last token of each image, in all but the first half of its values."""
    ones = torch.zeros_like(tokens)
    ones[:, -1, tokens.shape[-1] // 2 :] = 1
    return ones


@pytest.mark.parametrize("fraction", [0.75, 0.1, 0.3, 0.7, 0.9, 1.0, 0.001, 1 / 3])
def test_how_many_are_replaced(fraction: float) -> None:
    """The paper's 432 of 576 and 547 of 729, and no token more or less by the rounding of a float."""
    assert (replaced_of(576, 0.75), replaced_of(729, 0.75), replaced_of(10, 0.9)) == (432, 547, 9)
    for tokens in (1, 2, 10, 16, 100, 576, 1000):
        kept = math.floor(tokens * (1 - Fraction(str(fraction))))
        assert replaced_of(tokens, fraction) == tokens - kept >= 1


def test_every_image_and_step_has_its_own_draw(foveate_learner: Any, foveate_batches: Any) -> None:
    learner = foveate_learner("victor", {"pool_size": 20})
    batch = foveate_batches(learner)["two images"]
    draws = []
    for step in range(3):
        where = learner.look(batch, Moment(MOMENT.seed, "only", step))["victor"].state.where.tolist()
        draws += [tuple(at for at in where if at < 16), tuple(at - 16 for at in where if at >= 16)]
    assert {len(draw) for draw in draws} == {12} and len(set(draws)) >= 5


@pytest.mark.parametrize(("size", "most"), [(1, 12), (5, 3), (11, 2), (12, 1)])
def test_too_few_rows_are_shared_evenly(size: int, most: int, foveate_learner: Any, foveate_batches: Any) -> None:
    """12 tokens of an image: a pool of one is a mask, and no row stands more than ⌈12/P⌉ times."""
    learner = foveate_learner("victor", {"pool_size": size})
    rows = learner.look(foveate_batches(learner)["one image"], MOMENT)["victor"].state.rows.tolist()
    assert len(rows) == 12 and max(Counter(rows).values()) == most


def test_the_pool_starts_as_it_is_told(foveate_learner: Any) -> None:
    """Always the same; the released gaussian is √D long, and only where norms are free; no two rows are the same."""

    def rows(size: int = 50, **options: Any) -> Tensor:
        learner = foveate_learner("victor", {"pool_size": size, **options})
        found: Tensor = learner.objectives["victor"].pool.rows.detach()
        return found

    features, raw = rows(), rows(pool_norm="free", target="raw")
    torch.testing.assert_close(features, torch.nn.functional.normalize(raw, dim=-1))
    assert float((raw.norm(dim=-1) - 1).abs().min()) > 0.05, "a projector that does not normalise"
    torch.testing.assert_close(rows(), features, rtol=0, atol=0)
    many = rows(5000)  # more than the tokens that there are
    assert float(torch.cdist(many, many).fill_diagonal_(1).min()) > 1e-3
    for norm in ("unit", "free"):
        found = rows(pool_init="unit_gaussian", pool_norm=norm)
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(50).double(), rtol=1e-6, atol=0)
    assert float(rows(pool_init="gaussian", pool_norm="free").norm(dim=-1).mean()) == pytest.approx(32**0.5, rel=0.1)


def test_metrics_are_what_they_say(foveate_learner: Any, foveate_batches: Any) -> None:
    learner = foveate_learner("victor", {"pool_size": 30})
    batch, objective = foveate_batches(learner)["two images"], learner.objectives["victor"]
    objective.pool.count(torch.arange(30) % 3)
    term, seen = learner(batch, MOMENT).terms["victor"], learner.look(batch, MOMENT)["victor"]
    with torch.no_grad():
        y = unit(learner.lmm.see(batch.pixels).tokens.numpy())
        made = unit(objective.head(seen.outputs.states()).numpy())
    replaced = np.isin(np.arange(32), seen.state.where.numpy())
    found = {name: float(total) / count for name, (total, count) in term.metrics.items()}
    assert found["cosine_replaced"] == pytest.approx((made * y).sum(1)[replaced].mean())
    assert found["cosine_kept"] == pytest.approx((made * y).sum(1)[~replaced].mean())
    spread = [((part - part.mean(0)) ** 2).sum(1).mean() for part in (y[:16], y[16:])]
    assert found["target_variance"] == pytest.approx(np.mean(spread))
    assert found["used_rows"] == pytest.approx(20 / 30)
    rows = unit(objective.pool.rows.detach().numpy())[seen.state.rows]
    distances = np.linalg.norm(y[seen.state.where] - rows, axis=1)
    assert found["matching_cost"] == pytest.approx(distances.mean())
    assert found["matching_seconds"] > 0
    assert term.statistics["uses"].tolist() == np.bincount(seen.state.rows, minlength=30).tolist()


def test_unused_rows_are_revived() -> None:
    """After three steps without a match a row becomes nearly a copy of a used one; the others stay."""
    pool = Pool(8, 16, "unit_gaussian", unit=True)
    before = pool.rows.detach().clone()
    uses = torch.tensor([4, 3, 0, 0, 2, 0, 1, 1])
    for step in range(3):
        pool.count(uses)
        pool.revive(3, uses, torch.Generator().manual_seed(step))
        assert torch.equal(pool.rows, before) == (step < 2)
    dead = torch.tensor([2, 3, 5])
    alive = torch.tensor([0, 1, 4, 6, 7])
    assert torch.equal(pool.rows[alive], before[alive])
    distances = torch.cdist(pool.rows.detach()[dead], before[alive]).min(1).values
    torch.testing.assert_close(distances, torch.full((3,), 0.01), rtol=1e-3, atol=0)
    assert pool.unused_for.tolist() == [0] * 8 and pool.used() == 5 / 8
    pool.revive(3, uses, torch.Generator())
    assert pool.unused_for.tolist() == [0] * 8


def test_a_sample_that_is_not_finite_is_named(foveate_learner: Any, foveate_batches: Any) -> None:
    learner = foveate_learner("victor", {"pool_size": 20})
    batch = foveate_batches(learner)["mixed"]

    def poison(module: Any, arguments: Any, tokens: Tensor) -> Tensor:
        tokens = tokens.clone()
        tokens[3] = float("nan")
        return tokens

    learner.lmm.projector.register_forward_hook(poison)
    image = [record for record in batch.images if record.role == "input"][3]
    told = rf"objective 'victor': image {image.index} of sample '{image.sample_id}' .*12 of its visual tokens are not"
    with pytest.raises(TrainingError, match=told):
        learner(batch, MOMENT)


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5])
def test_fractions_outside_are_refused(fraction: float, foveate_learner: Any) -> None:
    with pytest.raises(PluginError, match=r"replace_fraction: .*(greater than 0|less than or equal to 1)"):
        foveate_learner("victor", {"replace_fraction": fraction})


def test_a_pool_beyond_memory_is_refused_before_it_is_made(foveate_lmm: Any) -> None:
    context = ObjectiveContext("victor", 3584, 4, (27, 27), foveate_lmm.encoder.spec)
    with pytest.raises(ModelError, match=r"pool_size: 1,000,000,000,000 rows of width 3584 need .* GiB .*the most"):
        Victor(Victor.Options(pool_size=10**12), context)


KIT: dict[str, dict[str, Any]] = {
    "default": {},
    "first version": {"head": "transformer", "attention": "prefix_bidirectional", "assignment": "nearest"},
    "released": {"pool_init": "gaussian", "pool_norm": "free", "target": "raw", "revive_unused": 1},
    "others": {"cost": "cosine", "loss_on": "replaced", "pool_init": "unit_gaussian", "pool_size": 5},
}


@pytest.mark.parametrize("options", KIT.values(), ids=list(KIT))
def test_it_keeps_the_contract(options: dict[str, Any]) -> None:
    check_objective("victor", {"pool_size": 24, **options}, gradient_to=("head", "projector", "llm"))
