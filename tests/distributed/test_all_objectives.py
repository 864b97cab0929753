"""Every subset of ROSS, ViCToR and ASVR, in float64: processes and token budgets change no loss, and none of the three
changes a draw of another.

The data are text-only samples, one image, two images, and images without a word; in 10 steps all of them come.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.objective import ImageRows, Moment
from foveate_asvr.objective import Asvr
from foveate_ross.groups import Group
from foveate_ross.heads import DenoisingHead
from foveate_ross.objective import Ross
from foveate_victor.objective import Victor
from tests.distributed.launching import environment, left, torchrun, write
from tests.distributed.train_plain import train_plain
from tests.plugins.ross.reference import TEACHERS, small

OBJECTIVES: dict[str, Any] = {
    "ross": {"teacher": TEACHERS["kl"], "denoiser": small("vit"), "draws": 2},
    "victor": {"pool_size": 40},
    "asvr": {
        "tokenizer": {"depth": 3, "codebook_size": 8, "fit": {"images": 60, "check": 8, "reservoir": 4}},
        "head": {"width": 16, "layers": 2, "heads": 2},
    },
}
SUBSETS = [subset for size in range(4) for subset in itertools.combinations(OBJECTIVES, size)]
WIDE, NARROW = 16384, 60
"""Tokens of a micro-batch: all samples of a process in one; about one sample each."""
STEPS = 10

Image = tuple[int, str, int, int]
"""Step, sample, its place in the epoch, number of the image in it."""
Draws = dict[tuple[str, Image], Tensor]
"""What was drawn, or found, and for which image."""


def named(subset: tuple[str, ...]) -> str:
    return "-".join(subset) or "none"


def recipe(root: Path, corpus: Path, subset: tuple[str, ...], processes: int, budget: int) -> Path:
    """A recipe whose encoder is frozen: its features are what the codes are of."""
    folder = root / str(processes) / str(budget)
    folder.mkdir(parents=True, exist_ok=True)
    rates = dict.fromkeys(("projector", "llm", *subset), 1e-3)
    return write(
        folder / named(subset), corpus, [{"train": rates, "batch_size": 5, "max_steps": STEPS}],
        objectives={name: OBJECTIVES[name] for name in subset},
        hardware={"workers": 0, "tokens_per_microbatch": budget},
    )  # fmt: skip


class Spy:
    """Notes what objectives draw, and what is drawn from: by image, so that the order does not matter."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.draws: Draws = {}
        self.stand_ins = 0
        self._wrap(patch, DenoisingHead, "_draw", self._denoising)
        self._wrap(patch, Group, "randn", self._posterior)
        self._wrap(patch, Victor, "edit_visual_tokens", self._replaced)
        self._wrap(patch, Ross, "loss", self._read)
        self._wrap(patch, Asvr, "loss", self._read)

    @staticmethod
    def _wrap(patch: pytest.MonkeyPatch, owner: type, method: str, note: Callable[..., None]) -> None:
        plain = getattr(owner, method)

        def noting(*arguments: Any) -> Any:
            found = plain(*arguments)
            note(found, *arguments)
            return found

        patch.setattr(owner, method, noting)

    def _note(self, name: str, moment: Moment, image: ImageRows, found: Tensor) -> None:
        if moment.stage != "only":  # the rehearsal before it
            return
        record = image.record
        if record.dummy:
            self.stand_ins += 1
            return
        key = name, (moment.step, record.sample_id, record.occurrence, record.index)
        assert key not in self.draws
        self.draws[key] = found.detach().clone()

    def _denoising(self, found: tuple[Tensor, Tensor], head: DenoisingHead, group: Group) -> None:
        for number, times, noise in zip(group.numbers, *found, strict=True):
            image = group.outputs.images[number]
            self._note("timesteps", group.outputs._moment, image, times)
            self._note("noise", group.outputs._moment, image, noise)

    def _posterior(self, found: Tensor, group: Group, name: str, *shape: int) -> None:
        for number, noise in zip(group.numbers, found, strict=True):
            self._note(name, group.outputs._moment, group.outputs.images[number], noise)

    def _replaced(self, found: Any, objective: Victor, inputs: Any) -> None:
        for image in inputs.images:
            mine = (found.state.where >= image.rows.start) & (found.state.where < image.rows.stop)
            self._note("replaced", inputs._moment, image, found.state.where[mine] - image.rows.start)
            self._note("matched", inputs._moment, image, found.state.rows[mine])

    def _read(self, found: Any, objective: Any, outputs: Any, targets: Any, state: Any) -> None:
        name = "ross" if isinstance(objective, Ross) else "asvr"
        for image, states, record in zip(outputs.images, outputs.split(outputs.states()), targets, strict=True):
            self._note(f"states of {name}", outputs._moment, image, states)
            if name == "asvr":
                self._note("codes", outputs._moment, image, record["semantic"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("subsets")


@pytest.fixture(scope="module")
def alone(folder: Path, shared_corpus: Path) -> dict[tuple[tuple[str, ...], int], Spy]:
    """Runs of every subset with both budgets in this process, as `1/BUDGET/SUBSET/run`, and what was noted of them."""
    spies = {}
    for subset, budget in itertools.product(SUBSETS, (WIDE, NARROW)):
        path = recipe(folder, shared_corpus, subset, 1, budget)
        with pytest.MonkeyPatch.context() as patch:
            spies[subset, budget] = Spy(patch)
            train_plain(path)
    return spies


def numbers(run: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Lines of metrics but for times, and all weights."""
    lines, weights = left(run)
    return [{key: value for key, value in line.items() if not key.endswith("_seconds")} for line in lines], weights


def assert_same(run: Path, other: Path, subset: tuple[str, ...]) -> None:
    """Every part of the loss and every metric of each step, and the weights in the end."""
    (lines, weights), (other_lines, other_weights) = numbers(run), numbers(other)
    assert len(lines) == len(other_lines) == STEPS
    parts = {f"loss/{part}" for part in ("text", *subset)}
    for line, again in zip(lines, other_lines, strict=True):
        assert line.keys() == again.keys() and {key for key in line if key.startswith("loss/")} == parts
        for key, value in line.items():
            near = value if key == "stage" else pytest.approx(value, rel=1e-9, abs=1e-9)
            assert again[key] == near, f"{other}: {key} of step {line['step']}"
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, atol=1e-9, rtol=1e-9, msg=f"{other}: {name}")


@pytest.mark.parametrize("subset", SUBSETS, ids=named)
def test_the_token_budget_changes_nothing(folder: Path, alone: Any, subset: tuple[str, ...]) -> None:
    runs = [folder / "1" / str(budget) / named(subset) / "run" for budget in (WIDE, NARROW)]
    assert_same(*runs, subset)


def test_two_processes_equal_one(folder: Path, alone: Any, shared_corpus: Path) -> None:
    """All subsets and both budgets, one after the other in one launch."""
    cases = list(itertools.product(SUBSETS, (WIDE, NARROW)))
    paths = [recipe(folder, shared_corpus, subset, 2, budget) for subset, budget in cases]
    done = subprocess.run(
        [*torchrun(2), "-m", "tests.distributed.train_plain", *map(str, paths)],
        capture_output=True, text=True, env=environment(folder / "installed"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (subset, _), path in zip(cases, paths, strict=True):
        assert_same(folder / "1" / str(WIDE) / named(subset) / "run", path.parent / "run", subset)


def test_every_objective_changes_what_is_learned(folder: Path, alone: Any) -> None:
    """So equal losses mean something: no two subsets end alike."""
    last = {named(subset): numbers(folder / "1" / str(WIDE) / named(subset) / "run")[0][-1] for subset in SUBSETS}
    assert len({line["loss/text"] for line in last.values()}) == len(SUBSETS)


def test_all_kinds_of_samples_come(alone: dict[tuple[tuple[str, ...], int], Spy]) -> None:
    """One image, two, and images without a word; narrow micro-batches without an image, where one stands in."""
    for (subset, budget), spy in alone.items():
        images = {image for _, image in spy.draws}
        assert not subset or {name[:3] for _, name, _, _ in images} == {"one", "two", "bar"}
        assert not subset or {index for _, _, _, index in images} == {0, 1}
        assert not subset or {step for step, _, _, _ in images} == set(range(STEPS))
        assert bool(spy.stand_ins) == bool(subset and budget == NARROW)


DRAWN = {"ross": ("timesteps", "noise", "posterior"), "victor": ("replaced",), "asvr": ("codes",)}
"""What an objective draws, or makes of the pictures alone; no weight that is trained has a part in it."""


@pytest.mark.parametrize("name", OBJECTIVES)
def test_another_objective_changes_no_draw(alone: dict[tuple[tuple[str, ...], int], Spy], name: str) -> None:
    """Image by image, in each of the steps: the same whoever else is there, and whatever stands in a micro-batch."""
    found = [
        {key: draw for key, draw in spy.draws.items() if key[0] in DRAWN[name]}
        for (subset, _), spy in alone.items()
        if name in subset
    ]
    assert len(found) == 8 and {kind for kind, _ in found[0]} == {*DRAWN[name]}
    for draws in found[1:]:
        assert draws.keys() == found[0].keys()
        assert all(torch.equal(draws[key], draw) for key, draw in found[0].items())
    draws = found[0]
    changing = [kind for kind in DRAWN[name] if kind != "codes"]
    for kind in changing:  # no image has what another has, nor what it has in another epoch
        drawn = [draw.flatten().tolist() for (of, _), draw in draws.items() if of == kind]
        assert len({tuple(values) for values in drawn}) > 0.9 * len(drawn)


def measured(folder: Path, subset: tuple[str, ...], part: str) -> dict[str, float]:
    """The loss of a part and its metrics in the first step, before any update."""
    line = numbers(folder / "1" / str(WIDE) / named(subset) / "run")[0][0]
    return {key: value for key, value in line.items() if key == f"loss/{part}" or key.startswith(f"{part}/")}


@pytest.mark.parametrize("edited", [False, True], ids=["as they are", "edited by victor"])
def test_before_any_update_a_loss_is_the_same_in_any_company(folder: Path, alone: Any, edited: bool) -> None:
    """Bit by bit where the LLM reads the same visual tokens: without ViCToR among the objectives, and with it."""
    subsets = [subset for subset in SUBSETS if ("victor" in subset) == edited]
    for part in ("text", *OBJECTIVES):
        found = [measured(folder, subset, part) for subset in subsets if part in ("text", *subset)]
        assert len(found) == {"text": 4, "victor": 4 * edited}.get(part, 2)
        assert all(one == found[0] for one in found)


def before_updates(spy: Spy, kind: str) -> dict[Image, Tensor]:
    """What was noted in the first step."""
    return {image: value for (of, image), value in spy.draws.items() if of == kind and image[0] == 0}


def test_before_any_update_victor_matches_the_same_rows(alone: dict[tuple[tuple[str, ...], int], Spy]) -> None:
    found = [before_updates(spy, "matched") for (subset, _), spy in alone.items() if "victor" in subset]
    assert len(found) == 8 and found[0]
    for matched in found[1:]:
        assert matched.keys() == found[0].keys()
        assert all(torch.equal(matched[image], rows) for image, rows in found[0].items())


@pytest.mark.parametrize("name", ["ross", "asvr"])
def test_the_others_see_what_victor_has_edited(alone: dict[tuple[tuple[str, ...], int], Spy], name: str) -> None:
    """Before any update: the same states bit by bit in each company without it, and in each with it others."""
    found = {subset: before_updates(alone[subset, WIDE], f"states of {name}") for subset in SUBSETS if name in subset}
    plain, edited = ([states for subset, states in found.items() if ("victor" in subset) == on] for on in (False, True))
    for group in (plain, edited):
        assert len(group) == 2 and group[0].keys() == group[1].keys()
        assert all(torch.equal(group[1][image], states) for image, states in group[0].items())
    assert all((states - edited[0][image]).abs().max() > 1e-3 for image, states in plain[0].items())
