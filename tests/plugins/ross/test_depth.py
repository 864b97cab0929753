"""Depth as a second picture (Table 5 of the paper): two records of a sample, each with its own target and noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from foveate import ImageRef, Learner, Moment, Outputs, assemble
from foveate.data.dataset import SampleError
from foveate.data.images import open_image
from foveate.data.packing import pack
from foveate.data.sample import build_sample, load_pixels
from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.training import train
from tests.corpus import recipe_dict, write_recipe
from tests.plugins.ross import reference
from tests.plugins.ross.reference import TEACHERS, small, spread

MOMENT = Moment(5, "only", 2)
DEPTHS = {"16 bits": np.uint16, "8 bits": np.uint8}


def write_data(folder: Path, depth: Any, samples: int = 6) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """`data.json`: questions about a picture and its depth map, both as large as the encoder's input, and both maps."""
    random, maps, rows = np.random.default_rng(), list[tuple[NDArray[Any], NDArray[Any]]](), list[dict[str, Any]]()
    for kind in ("rgb", "depth"):
        (folder / kind).mkdir()
    for number in range(samples):
        colour = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        far = random.integers(0, np.iinfo(depth).max + 1, (16, 16), dtype=depth)
        Image.fromarray(colour).save(folder / "rgb" / f"{number}.png")
        Image.fromarray(far).save(folder / "depth" / f"{number}.png")
        turns = [{"from": "human", "value": "RGB <image>, depth <image>\nHow far?"}, {"from": "gpt", "value": "Far."}]
        pictures = [f"rgb/{number}.png", f"depth/{number}.png"]
        rows.append({"id": f"room {number}", "image": pictures, "conversations": turns})
        maps.append((colour, far))
    (folder / "data.json").write_text(json.dumps(rows))
    return maps


def recipe(folder: Path, teacher: str, **top: Any) -> Any:
    options = {"teacher": TEACHERS[teacher], "denoiser": small("dit"), "draws": 2}
    content = recipe_dict(folder, objectives={"ross": options}, **top)
    content["stages"][0] |= {
        "data": [{"path": str(folder / "data.json")}], "batch_size": 3, "max_steps": 3, "geometry": "pad",
        "train": {"projector": 1e-2, "llm": 1e-2, "ross": 1e-2},
    }  # fmt: skip
    return load_recipe(write_recipe(folder, content))


@pytest.mark.parametrize("bits", DEPTHS)
@pytest.mark.parametrize("teacher", ["raw", "kl"])
def test_both_pictures_are_reconstructed(bits: str, teacher: str, tmp_path: Path) -> None:
    """In float64: the sample's loss is the sum over both, each by the formulas, and both halves of the states learn."""
    [(_, far), *_] = write_data(tmp_path, DEPTHS[bits])
    made = assemble(recipe(tmp_path, teacher, precision={"compute": "fp64", "teachers": "fp64"}))
    learner: Learner = made.learner.double()
    objective: Any = learner.objectives["ross"]
    spread(objective, 1)
    stage = made.recipe.stages[0]
    rules, [source] = made.data.rules(stage), made.data.sources(stage.data)
    sample = load_pixels(build_sample(source.dataset[0], rules), rules)
    batch = pack([sample], rules.objectives)
    assert [(record.index, record.tokens, record.objectives) for record in batch.images] == [
        (0, 16, ("ross",)), (1, 16, ("ross",)),
    ]  # fmt: skip
    with torch.no_grad():
        seen = learner.look(batch, MOMENT)["ross"]
        total = float(learner(batch, MOMENT).terms["ross"].total)
    outputs, targets = seen.outputs, seen.targets
    one, two = next(iter(targets[0].values())), next(iter(targets[1].values()))
    assert one.shape == two.shape and not torch.allclose(one, two)
    if teacher == "raw":
        torch.testing.assert_close(two, patches(far), rtol=0, atol=1e-6)
    drawn = [torch.randn(16, generator=outputs.generator(number, "draw 0")) for number in (0, 1)]
    assert not torch.equal(*drawn)
    halves = [
        reference.loss(objective, outputs, targets, [[number == mine] * 16 for number in (0, 1)]) for mine in (0, 1)
    ]
    assert min(halves) > 0 and total == pytest.approx(sum(halves), rel=1e-9)
    assert sum(objective.count(objective.options, image.record) for image in outputs.images) == 32
    states = outputs.states().clone().requires_grad_()
    records = [image.record for image in outputs.images]
    mine = Outputs.of(records, {-1: states}, moment=MOMENT, objective="ross")
    loss = objective.loss(mine, targets, None).total
    assert float(loss.detach()) == pytest.approx(total, rel=1e-9)
    loss.backward()
    assert states.grad is not None and all(part.abs().max() > 1e-6 for part in states.grad.split(16))


def patches(far: NDArray[Any]) -> Tensor:
    """A depth map's 4×4 squares, the same in three channels: black 0, white the largest number that its bits hold."""
    grey = far.astype(int) // 256 if far.dtype == np.uint16 else far.astype(int)
    rows = []
    for top in range(0, 16, 4):
        for left in range(0, 16, 4):
            square = torch.from_numpy(grey[top : top + 4, left : left + 4]).double().flatten() / 127.5 - 1
            rows.append(square.repeat(3))
    return torch.stack(rows)


def test_a_run_counts_both(tmp_path: Path) -> None:
    """`foveate train` on pairs: two images a sample, a loss of both, and a head that moves."""
    write_data(tmp_path, np.uint16)
    run = train(recipe(tmp_path, "kl"), display=Display(quiet=True))
    lines = run.metrics()
    assert [line["images"] for line in lines] == [6, 6, 6] and lines[0]["loss/ross"] == pytest.approx(1, abs=0.1)
    assert lines[-1]["loss/ross"] != lines[0]["loss/ross"]


def test_depth_is_read_in_its_whole_range(tmp_path: Path) -> None:
    """16 bits are divided by 256, never clipped to white; numbers without a known range are refused."""
    values = np.arange(65536).reshape(256, 256)
    for kind, suffix in ((np.uint16, "png"), (np.uint16, "tiff"), (np.int32, "tiff")):
        path = tmp_path / f"{kind.__name__}.{suffix}"
        Image.fromarray(values.astype(kind)).save(path)
        opened = open_image(ImageRef(path), "sample 'x'")
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), np.repeat(values[..., None] // 256, 3, axis=2))
    for name, wrong in {"metres": (values / 6553.6).astype(np.float32), "signed": (values - 7).astype(np.int32),
                        "far": (values * 3).astype(np.int32)}.items():  # fmt: skip
        Image.fromarray(wrong).save(tmp_path / f"{name}.tiff")
        with pytest.raises(SampleError, match=rf"{name}.tiff cannot be read .*write it with 8 or 16 bits"):
            open_image(ImageRef(tmp_path / f"{name}.tiff"), "sample 'x'")
