"""What the samplers draw, and the pictures of it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate import Moment
from foveate.testing.models import Bench, tiny_lmm
from foveate_ross.diffusion import Diffusion, betas
from foveate_ross.options import SamplingOptions
from foveate_ross.pictures import GAP, LEAST, TEXT, components
from tests.plugins.ross import reference
from tests.plugins.ross.reference import TEACHERS, chosen, kept, small

WAYS = list(itertools.product(("cosine", "linear"), ("epsilon", "v", "x0"), ("ddim", "ddpm")))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_are_those_of_diffusers(schedule: str) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_schedule={"cosine": "squaredcos_cap_v2", "linear": "linear"}[schedule])
    torch.testing.assert_close(torch.tensor(betas(schedule)), theirs.betas.float(), rtol=1e-5, atol=1e-9)  # type: ignore[arg-type]
    if schedule == "cosine":  # the fact sheet's numbers
        shares = [Diffusion("cosine", "epsilon").signal[time] ** 2 for time in (0, 250, 500, 750, 999)]
        assert [float(share) for share in shares] == pytest.approx([0.99996, 0.846, 0.492, 0.143, 2.4e-9], rel=2e-2)


@pytest.mark.parametrize(("schedule", "prediction", "sampler"), WAYS)
def test_who_knows_the_target_draws_it(schedule: Any, prediction: Any, sampler: Any) -> None:
    """An oracle that predicts from the clean target leads any sampler to it, from any noise."""
    clean, shares = torch.randn(2, 6, 5, dtype=torch.float64), kept(schedule)

    def oracle(rows: torch.Tensor, time: int) -> torch.Tensor:
        signal, sigma = math.sqrt(shares[time]), math.sqrt(1 - shares[time])
        noise = (rows - signal * clean) / sigma
        return {"epsilon": noise, "x0": clean, "v": signal * noise - sigma * clean}[prediction]

    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    drawn = Diffusion(schedule, prediction).sample(
        oracle, torch.randn_like(clean), generators, SamplingOptions(sampler=sampler, steps=20)
    )
    torch.testing.assert_close(drawn, clean, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_ddim_is_its_formula(prediction: Any) -> None:
    """z_s = sqrt(a_s) z0 + sqrt(1 - a_s) e with the predicted z0 and e, for a predictor that is nobody's oracle."""
    shares, steps = kept("cosine"), 10
    start, mix = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64) / 5

    def predict(rows: torch.Tensor, time: int) -> torch.Tensor:
        return torch.tanh(rows @ mix) + time / 1000

    rows = start
    for time in range(900, -1, -100):
        now, then = shares[time], shares[time - 100] if time else 1.0
        made, signal, sigma = predict(rows, time), math.sqrt(now), math.sqrt(1 - now)
        if prediction == "epsilon":
            clean, noise = (rows - sigma * made) / signal, made
        elif prediction == "x0":
            clean, noise = made, (rows - signal * made) / sigma
        else:
            clean, noise = signal * rows - sigma * made, signal * made + sigma * rows
        rows = math.sqrt(then) * clean + math.sqrt(1 - then) * noise
    drawn = Diffusion("cosine", prediction).sample(predict, start, [], SamplingOptions(steps=steps))
    torch.testing.assert_close(drawn, rows, atol=1e-4, rtol=1e-4)


def bench_of(options: dict[str, Any], name: str = "ross") -> Bench:
    bench = Bench(chosen(options, name), tiny_lmm())
    reference.spread(bench.objective, 1)
    if (teacher := bench.teachers.of(name)) is not None:
        reference.spread(teacher, 2)
    return bench


@torch.no_grad()
def drawn(bench: Bench, kinds: list[str], seed: int = 0) -> tuple[Any, dict[str, np.ndarray]]:
    """What the objective sees of these samples, and what it draws, by title."""
    batch = bench.pack([bench.samples[kind] for kind in kinds])
    seen = bench.learner.look(batch, Moment(seed, "align"))[bench.name]
    pictures = bench.objective.visualize(seen.outputs, seen.targets, seen.state)
    return seen, {picture.title: np.asarray(picture.image).astype(int) for picture in pictures}


def tiles_of(sheet: np.ndarray, count: int = 3) -> list[np.ndarray]:
    """The tiles of a sheet, without labels."""
    width = (sheet.shape[1] - GAP) // count - GAP
    tops = sheet[TEXT + 2 * GAP : -GAP]
    return [tops[:, GAP + number * (width + GAP) :][:, :width] for number in range(count)]


def enlarged(pixels: torch.Tensor) -> np.ndarray:
    """`[3, H, W]` in 0…1, as large as a tile."""
    values = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return np.asarray(Image.fromarray(values).resize((LEAST, LEAST), Image.Resampling.BICUBIC)).astype(int)


@pytest.mark.parametrize("variant", ["denoise", "regress_latents", "regress_latents_to_pixels"])
def test_a_sheet_shows_original_ceiling_and_model(variant: str) -> None:
    options: dict[str, Any] = {"variant": variant, "teacher": TEACHERS["flux"]}
    options |= {"denoiser": small("vit"), "sampling": {"steps": 5}} if variant == "denoise" else {}
    bench = bench_of(options)
    seen, sheets = drawn(bench, ["two images", "wide picture"])
    assert [title.split(":")[0] for title in sheets] == [
        "image 0 of two images/0", "image 1 of two images/0", "image 0 of wide picture/0",
    ]  # fmt: skip
    teacher = seen.outputs.teacher
    for number, sheet in enumerate(sheets.values()):
        original, ceiling, model = tiles_of(sheet)
        with torch.no_grad():
            own = teacher.decode(seen.targets[number]["mean"][None])[0]
        assert np.array_equal(ceiling, enlarged(own))
        size, bicubic = (LEAST, LEAST), Image.Resampling.BICUBIC
        assert np.array_equal(original, np.asarray(seen.outputs.picture(number).resize(size, bicubic)))
        assert np.abs(model - ceiling).mean() > 1
        if variant != "denoise":
            with torch.no_grad():
                made = bench.objective.head.mlp(seen.outputs.split(seen.outputs.states())[number])  # type: ignore[union-attr]
                assert np.array_equal(model, enlarged(teacher.decode(made[None])[0]))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_sampled_picture_is_its_images_own(sampler: str) -> None:
    """The same alone and beside others; another with another seed, or other steps."""
    options = {"teacher": TEACHERS["kl"], "denoiser": small("dit"), "sampling": {"sampler": sampler, "steps": 4}}
    bench = bench_of(options)
    _, together = drawn(bench, ["one image", "two images"])
    _, alone = drawn(bench, ["two images"])
    assert all(np.array_equal(together[title], sheet) for title, sheet in alone.items()) and len(alone) == 2
    _, other = drawn(bench, ["two images"], seed=1)
    more = bench_of({**options, "sampling": {"sampler": sampler, "steps": 8}})
    _, longer = drawn(more, ["two images"])
    for title, sheet in alone.items():
        for different in (other, longer):
            assert np.abs(tiles_of(different[title])[2] - tiles_of(sheet)[2]).mean() > 1
            assert np.array_equal(tiles_of(different[title])[1], tiles_of(sheet)[1])


@pytest.mark.parametrize("teacher", ["features", "patches"])
def test_rows_without_a_decoder_are_drawn_as_components(teacher: str) -> None:
    """By a singular value decomposition of the target, written down here; one scale for target and model."""
    options = {"teacher": TEACHERS[teacher], "denoiser": small("mlp"), "sampling": {"steps": 3}}
    bench = bench_of(options)
    seen, sheets = drawn(bench, ["one image"])
    [target_NC] = [next(iter(record.values())).numpy() for record in seen.targets]
    centred = target_NC - target_NC.mean(0)
    axes = np.linalg.svd(centred)[2][:3]
    values = centred @ axes.T
    share = (values - values.min(0)) / np.ptp(values, 0)
    tile = tiles_of(next(iter(sheets.values())))[1]
    half = LEAST // 8
    found = tile[half :: 2 * half, half :: 2 * half].reshape(-1, 3) / 255
    for channel in range(3):  # the sign of a component is nobody's choice
        wanted = (share[:, channel], 1 - share[:, channel])
        assert min(np.abs(found[:, channel] - one).max() for one in wanted) < 0.01


def test_components_of_few_tokens_or_channels() -> None:
    for shape, grid in (((6, 2), (2, 3)), ((2, 5), (1, 2)), ((4, 4), (2, 2))):
        target, made = torch.ones(shape), torch.randn(shape)
        for picture in components(target, made, grid):  # a target without any variance too
            assert picture.size[0] * grid[0] == picture.size[1] * grid[1] and min(picture.size) >= LEAST
