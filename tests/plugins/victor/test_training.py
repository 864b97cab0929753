"""The objective in runs, in float64: neither packing, processes nor a resume change anything; the pool's start."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import load_run
from foveate.errors import FoveateError, ModelError, TrainingError
from foveate.loaded import LoadedRun
from foveate.session import Interrupted
from foveate_victor.objective import Victor
from tests.corpus import recipe_dict
from tests.distributed.launching import left, torchrun, trained, write
from tests.unit.test_objectives_in_training import TRAIN, run

OPTIONS: dict[str, Any] = {"pool_size": 40, "revive_unused": 2}
EXACT: dict[str, Any] = {"precision": {"compute": "fp64", "teachers": "fp64"}}
NORMALISED: dict[str, Any] = {"type": "mlp", "depth": 2, "normalize": True}
TIMES = {"step_seconds", "data_wait", "stage", "victor/matching_seconds", "free/matching_seconds"}


def same(first: Any, second: Any, tolerance: float = 1e-9) -> None:
    """Metrics and weights, the pool's counts of uses among them."""
    assert len(first[0]) == len(second[0])
    for line, other in zip(first[0], second[0], strict=True):
        assert line.keys() == other.keys()
        for key in line.keys() - TIMES:
            assert other[key] == pytest.approx(line[key], rel=tolerance, abs=tolerance * 1e-3), key
    assert first[1].keys() == second[1].keys()
    for name, weight in first[1].items():
        torch.testing.assert_close(second[1][name], weight, atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("options", [{}, {"head": "transformer", "attention": "prefix_bidirectional"}])
def test_splitting_changes_nothing(tmp_path: Path, shared_corpus: Path, options: dict[str, Any]) -> None:
    """Text-only samples, one image, two images, images only: in one micro-batch, and about one sample in each."""
    results = [
        run(
            tmp_path / str(budget), shared_corpus, {"victor": {**OPTIONS, **options}}, max_steps=4, **EXACT,
            hardware={"workers": 0, "tokens_per_microbatch": budget},
        )
        for budget in (100_000, 60)
    ]  # fmt: skip
    lines, weights, _ = results[0]
    assert {f"victor/{name}" for name in ("cosine_kept", "cosine_replaced", "target_variance")} <= lines[0].keys()
    assert "victor/used_rows" not in lines[0] and 0 < lines[-1]["victor/used_rows"] <= 1
    assert int(weights["victor:pool.uses"].sum()) > 0
    same(*results)


def test_two_processes_are_one(tmp_path: Path, shared_corpus: Path) -> None:
    """Also where the pool starts from the pictures, and rows are revived: equal on both before the first step."""
    objectives: dict[str, Any] = {"victor": OPTIONS, "free": {"type": "victor", "pool_size": 7, "pool_norm": "free"}}
    stage, found = {"max_steps": 4, "batch_size": 5}, list[Any]()
    for number in (1, 2):
        recipe = write(tmp_path / str(number), shared_corpus, [stage], objectives=objectives)
        done = trained(torchrun(number), recipe)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(left(recipe.parent / "run"))
    assert {"victor.pool.rows", "free.pool.rows"} <= found[0][1].keys()
    same(*found)


def test_a_stopped_run_resumes_bit_by_bit(tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool goes on from the checkpoint; it is not drawn again."""
    unbroken = run(tmp_path / "a", shared_corpus, {"victor": OPTIONS}, max_steps=5)
    loss, starts = Victor.loss, list[int]()

    def interrupting(self: Victor, outputs: Any, *others: Any) -> Any:
        if outputs._moment.step == 2 and outputs._moment.stage == "only":
            signal.raise_signal(signal.SIGINT)
        return loss(self, outputs, *others)

    monkeypatch.setattr(Victor, "loss", interrupting)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", shared_corpus, {"victor": OPTIONS}, max_steps=5)
    monkeypatch.undo()
    monkeypatch.setattr(Victor, "start_head", lambda *_: starts.append(1))
    again = run(tmp_path / "b", shared_corpus, {"victor": OPTIONS}, max_steps=5, resume=True)
    assert not starts
    same(unbroken, again, 0.0)


def test_the_pool_starts_from_the_projector_of_its_first_stage(
    tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are directions of visual tokens of the trained projector, before any step; a later stage keeps the pool."""
    pools = list[Tensor]()
    start = Victor.start_head

    def started(self: Victor, batches: Any) -> None:
        seen: Any = []
        start(self, (seen.append(batch) or batch for batch in batches))
        pools.append(self.pool.rows.detach().clone())
        tokens = torch.nn.functional.normalize(torch.cat([batch.tokens for batch in seen]), dim=-1)
        distances = torch.cdist(pools[-1], tokens).min(1).values
        assert bool(((distances > 1e-3) & (distances < 0.0101)).all())
        assert len(pools[-1].unique(dim=0)) > 30

    monkeypatch.setattr(Victor, "start_head", started)
    rates = {**TRAIN, "victor.pool": 1.5e-4, "victor.head": 1e-5}
    options = {"victor": {"pool_size": 40}}
    model = {"model": {**recipe_dict(shared_corpus)["model"], "projector": NORMALISED}}
    changes: dict[str, Any] = {"max_steps": 2, "schedule": "constant", "warmup": 0, **model}
    lines, weights, first = run(tmp_path / "a", shared_corpus, options, train=rates, **changes)
    assert (lines[0]["lr/victor.pool"], lines[0]["lr/victor.head"]) == (1.5e-4, 1e-5)
    assert len(pools) == 1
    moved = (weights["victor:pool.rows"] - pools[0]).abs().amax(1)
    assert 0 < float(moved.max()) <= 2 * 1.5e-4 * 1.01, "Adam's steps at the pool's own rate"
    # a run that begins with this model has its pool, unless it wants a fresh one
    changes["model"] = {"from": str(first.folder)}
    frozen: dict[str, Any] = {"train": TRAIN, "frozen": ["victor"]}
    _, kept, _ = run(tmp_path / "b", shared_corpus, options, **changes, **frozen)
    assert len(pools) == 1 and torch.equal(kept["victor:pool.rows"], weights["victor:pool.rows"])
    fresh = {"victor": {"pool_size": 40, "from_model": False}}
    _, other, _ = run(tmp_path / "c", shared_corpus, fresh, **changes, **frozen)
    assert len(pools) == 2 and torch.equal(other["victor:pool.rows"], pools[1])


def test_a_pool_of_another_size_is_refused(tmp_path: Path, shared_corpus: Path) -> None:
    _, _, first = run(tmp_path / "a", shared_corpus, {"victor": {"pool_size": 20}}, max_steps=1)
    with pytest.raises(ModelError, match="from_model: false"):
        run(tmp_path / "b", shared_corpus, {"victor": {"pool_size": 30}}, model={"from": str(first.folder)})


def test_bad_recipes_are_refused_before_anything_is_computed(tmp_path: Path, shared_corpus: Path) -> None:
    for options, told in (
        ({"pool_size": 10**12}, r"'victor': pool_size: 1,000,000,000,000 rows of width 32 need .* GiB"),
        ({"replace_fraction": 1.5}, r"objectives\.victor\.replace_fraction: .*less than or equal to 1"),
        ({"pool_sise": 3}, r"objectives\.victor\.pool_sise: .*pool_size"),
    ):
        with pytest.raises(FoveateError, match=told):
            run(tmp_path / "a", shared_corpus, {"victor": options})
        assert not (tmp_path / "a" / "run").exists()


def test_an_image_that_is_not_finite_stops_the_run(
    tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = Victor.edit_visual_tokens

    def poisoned(self: Victor, inputs: Any) -> Any:
        if inputs._moment.step == 1:
            inputs = type(inputs)(inputs.images, "victor", inputs._moment, inputs.tokens * torch.nan, inputs.edited)
        return edit(self, inputs)

    monkeypatch.setattr(Victor, "edit_visual_tokens", poisoned)
    with pytest.raises(TrainingError, match=r"image 0 of sample '\w+' cannot be matched .* 12 of its visual tokens"):
        run(tmp_path / "a", shared_corpus, {"victor": OPTIONS}, max_steps=3)


def test_a_finished_run_draws_its_pool(tmp_path: Path, shared_corpus: Path, foveate_command: Any) -> None:
    """`foveate show --data` and the run's report: with one row, each image is one region; and how rows are used."""
    _, _, result = run(tmp_path / "a", shared_corpus, {"victor": {"pool_size": 1}}, max_steps=2)
    status, out, err = foveate_command("show", result.folder, "--data", "--out", tmp_path / "drawn")
    assert status == 0, err
    names = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert names == sorted(Path(line).name for line in out.splitlines())
    assert any("8-regions-of-more-than-4-patches" in name for name in names)
    assert any("use-of-the-pool-in-training-1-of-1-rows" in name for name in names)
    page = (result.folder / "report.html").read_text()
    assert "8 regions of more than 4 patches with one nearest row" in page
    loaded: LoadedRun = load_run(result.folder)
    assert [len(drawn) for drawn in loaded.show_data(4).values()] == [2]
