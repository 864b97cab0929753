"""The example `foveate-jarvis`, as installed: found, trained by a recipe, looked at; its own tests; its size."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from foveate import Learner, Moment, ObjectiveContext, Reads
from foveate.errors import FoveateError
from foveate.plugins import installed_plugins
from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.testing.models import tiny_batches, tiny_lmm, tiny_rules
from foveate.training import train
from tests.corpus import LLM, recipe_dict, write_recipe
from tests.distributions import install_project, on_path

PROJECT = Path(__file__).parents[3] / "examples" / "plugins" / "foveate-jarvis"

TEACHER = {
    "type": "features",
    "encoder": {
        "config": {
            "model_type": "dinov2", "hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
            "mlp_ratio": 2, "image_size": 24, "patch_size": 4,
        },
        "layer": -1,
    },
}  # fmt: skip
"""A grid of 6x6, where the model's is 4x4."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    """A folder on the path that has the distribution, as pip would leave it."""
    with on_path(tmp_path / "site") as folder:
        install_project(folder, PROJECT)
        yield folder


def recipe(corpus: Path, folder: Path, **options: Any) -> dict[str, Any]:
    """Three steps with `jarvis` on an LLM of four blocks."""
    content = recipe_dict(corpus, output=str(folder / "run"), objectives={"jarvis": {"teacher": TEACHER, **options}})
    content["model"]["llm"] = copy.deepcopy(LLM)
    content["model"]["llm"]["config"]["num_hidden_layers"] = 4
    content["stages"][0] |= {"max_steps": 3, "train": {"projector": 1e-3, "llm": 1e-3, "jarvis": 1e-2}}
    return content


def test_a_recipe_trains_it(site: Path, tmp_path: Path, shared_corpus: Path) -> None:
    found = installed_plugins().find("objectives", "jarvis")
    assert found is not None and found.owner.startswith("foveate-jarvis ")
    content = recipe(shared_corpus, tmp_path, probability=1)
    result = train(load_recipe(write_recipe(tmp_path, content)), display=Display(quiet=True))
    lines = result.metrics()
    assert len(lines) == 3
    for line in lines:
        assert line["loss/jarvis"] == pytest.approx(1 - line["jarvis/cosine"], abs=1e-6)
    head = load_file(result.folder / "model" / "objectives" / "jarvis" / "weights.safetensors")
    assert {name: tuple(weight.shape) for name, weight in head.items()} == {
        "mask": (32,), "head.0.weight": (32, 32), "head.0.bias": (32,), "head.2.weight": (20, 32), "head.2.bias": (20,),
    }  # fmt: skip


def test_some_steps_are_text_only(site: Path, tmp_path: Path, shared_corpus: Path) -> None:
    """By default it sits out a fifth of the steps, and nothing of it is in them."""
    content = recipe(shared_corpus, tmp_path, probability=0.5)
    content["stages"][0]["max_steps"] = 12
    lines = train(load_recipe(write_recipe(tmp_path, content)), display=Display(quiet=True)).metrics()
    assert 0 < sum("loss/jarvis" in line for line in lines) < 12
    assert all(("loss/jarvis" in line) == ("jarvis/cosine" in line) for line in lines)


def test_a_layer_that_is_the_input_is_refused(site: Path, tmp_path: Path, shared_corpus: Path) -> None:
    content = recipe(shared_corpus, tmp_path, layer=0.1)
    with pytest.raises(FoveateError, match=r"objectives\.jarvis\.layer: 0\.1 of 4 layers is the input"):
        train(load_recipe(write_recipe(tmp_path, content)), display=Display(quiet=True))


def test_a_target_block_sees_itself_and_the_context_and_text_sees_all(site: Path) -> None:
    """A nudge of one visual token moves the last states of just those that may see it, in float64; two images."""
    from foveate_jarvis.objective import Jarvis

    class Nudged(Jarvis):
        nudge: Tensor | float = 0.0

        @classmethod
        def reads(cls, options: Any) -> Reads:
            return Reads(llm=(0.25, -1))

        def edit_visual_tokens(self, inputs: Any) -> Any:
            edit = super().edit_visual_tokens(inputs)
            tokens = torch.where(edit.edited[:, None], edit.tokens, inputs.tokens) + self.nudge
            return replace(edit, tokens=tokens, edited=torch.ones_like(edit.edited), state=edit.groups)

    lmm = tiny_lmm(6)
    context = ObjectiveContext("jarvis", lmm.llm.width, len(lmm.llm.blocks()), (6, 6), lmm.encoder.spec)
    objective = Nudged(Nudged.Options(teacher="features"), context).double()
    learner = Learner(lmm, {"jarvis": objective})
    batch = tiny_batches(tiny_rules(lmm, tuple(learner.rules.values())))["adjacent images"]
    moment = Moment(int(torch.randint(1 << 30, ())), "only", 0)

    @torch.no_grad()
    def states(nudge: Tensor | float) -> tuple[Tensor, Tensor, Tensor, float]:
        objective.nudge = nudge
        seen = learner.look(batch, moment)["jarvis"]
        text = learner(batch, moment).text_by_sample
        return seen.outputs.states(0.25), seen.outputs.states(-1), seen.state, float(text)

    *before, groups, text = states(0.0)
    second = torch.arange(72) >= 36
    assert set(groups[:36].tolist()) >= {0, 4}
    for row in range(72):
        nudge = torch.zeros(72, lmm.llm.width, dtype=torch.float64)
        nudge[row] = torch.randn(lmm.llm.width, dtype=torch.float64)
        *after, _, other = states(nudge)
        own = (second == second[row]) & ((groups == groups[row]) if groups[row] else True)
        may = own | (second & (row < 36))
        for old, new in zip(before, after, strict=True):
            torch.testing.assert_close((new - old).abs().amax(1) > 1e-9, may)
        assert abs(other - text) > 1e-9


def test_its_own_tests_pass(site: Path) -> None:
    paths = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(PROJECT / "tests")]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_it_is_small() -> None:
    """At most 150 lines, all counted."""
    assert sum(len(path.read_text().splitlines()) for path in (PROJECT / "foveate_jarvis").glob("*.py")) <= 150
