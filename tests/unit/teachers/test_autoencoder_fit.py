"""The fit of `autoencoder_kl`: what it reports and scales, computed again by hand; kept in the run, found on resume."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from foveate.errors import DataError, ModelError, RecipeError
from foveate.fitting import told_in_words
from foveate.loaded import load_run
from foveate.objective import TeacherInputs
from foveate.recipe_file import load_recipe
from foveate.session import Interrupted
from foveate.teachers import autoencoder_fit
from foveate.teachers.autoencoder_fit import FitOptions
from foveate.teachers.autoencoders import KLOptions, KLTeacher
from tests.corpus import recipe_dict, write_recipe
from tests.objectives import plugins_with
from tests.unit.teachers.conftest import built, context, inputs
from tests.unit.teachers.test_autoencoders import KL, saved
from tests.unit.teachers.test_teachers_in_training import Regress
from tests.unit.test_objectives_in_training import run

GRID = (3, 4)
SMALL: dict[str, Any] = {"channels": [4, 8], "latent_channels": 3, "batch_size": 4}


@pytest.fixture(scope="session")
def parts(photos: list[Image.Image]) -> list[Image.Image]:
    """24 different parts of photographs."""
    boxes = [(x, y, x + 40, y + 30) for x in range(0, 120, 30) for y in range(0, 75, 25)]
    return [photo.crop(box) for photo in photos for box in boxes]


def teacher_for(fit: dict[str, Any], **options: Any) -> KLTeacher:
    made: KLTeacher = built(KLTeacher, KLOptions(fit=FitOptions(**fit), **options), context(GRID))
    return made.requires_grad_(True)


def again(teacher: KLTeacher, pictures: Sequence[Image.Image]) -> Iterator[TeacherInputs]:
    """The stream that core hands over: batches of three, without end."""
    while True:
        for first in range(0, len(pictures), 3):
            yield inputs(KLTeacher, teacher.options, pictures[first : first + 3], GRID)


def pixels_of(teacher: KLTeacher, pictures: Sequence[Image.Image]) -> Tensor:
    given = inputs(KLTeacher, teacher.options, pictures, GRID).stack("pixels")
    return given.double() / 127.5 - 1


def test_it_reports_and_scales_what_it_says(parts: list[Image.Image]) -> None:
    """PSNR of the pictures that were held out; the others' latents get mean 0 and variance 1."""
    teacher = teacher_for({**SMALL, "steps": 30, "held_out": 2})
    told = teacher.fit(again(teacher, parts))
    assert (told["pictures"], told["held_out"]) == (24, 2)
    teacher.eval().requires_grad_(False).double()
    held, seen = pixels_of(teacher, parts[:2]), pixels_of(teacher, parts[2:])
    made = teacher.model.decode(teacher.model.encode(held).latent_dist.mode()).sample
    errors = (((made.clamp(-1, 1) - held) / 2) ** 2).numpy().mean(axis=(1, 2, 3))
    assert told["psnr_db"] == pytest.approx(float(np.mean(-10 * np.log10(errors))), abs=1e-3)
    moments = teacher.model.quant_conv(teacher.model.encoder(seen))
    mean, variance = moments[:, :3], moments[:, 3:].exp()
    assert told["shift_factor"] == pytest.approx(float(mean.mean()), abs=1e-5)
    total = float(mean.var(correction=0) + variance.mean())
    assert told["scaling_factor"] == pytest.approx(total**-0.5, rel=1e-4)
    assert told["kl"] == pytest.approx(float((mean**2 + variance - 1 - variance.log()).mean() / 2), rel=1e-4)
    found = teacher.encode(inputs(KLTeacher, teacher.options, parts[2:], GRID))
    means, logvars = (torch.stack([record[name] for record in found]) for name in ("mean", "logvar"))
    drawn = teacher.sample(means, logvars, torch.randn(means.shape, generator=torch.Generator().manual_seed(1)))
    assert abs(float(drawn.mean())) < 0.05 and float(drawn.std()) == pytest.approx(1, abs=0.05)
    assert float(means.mean()) == pytest.approx(0, abs=1e-4)
    wanted = (made / 2 + 0.5).clamp(0, 1)
    held_out = teacher.encode(inputs(KLTeacher, teacher.options, parts[:2], GRID))
    rows = torch.stack([record["mean"] for record in held_out])
    torch.testing.assert_close(teacher.decode(rows), wanted, atol=1e-5, rtol=0)


def test_it_learns_alike_every_time_and_leaves_torch_s_generator_alone(parts: list[Image.Image]) -> None:
    fit = {**SMALL, "learning_rate": 1e-2}
    first, second = teacher_for({**fit, "steps": 50}), teacher_for({**fit, "steps": 50})
    state = torch.get_rng_state()
    told = [teacher.fit(again(teacher, parts)) for teacher in (first, second)]
    assert torch.equal(torch.get_rng_state(), state)
    assert told[0] == told[1]
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    short = teacher_for({**fit, "steps": 1})
    assert told[0]["psnr_db"] > short.fit(again(short, parts))["psnr_db"] + 3


def test_no_step_only_measures_what_was_pretrained(tmp_path: Path, parts: list[Image.Image]) -> None:
    config = {**KL, "latents_mean": [1.0] * 3, "latents_std": [2.0] * 3}
    model = saved(AutoencoderKL, config, tmp_path)
    teacher = teacher_for({"steps": 0}, pretrained=str(tmp_path), patch=2)
    told = teacher.fit(again(teacher, parts))
    for name, tensor in model.state_dict().items():
        assert torch.equal(teacher.model.state_dict()[name], tensor)
    found = teacher.encode(inputs(KLTeacher, teacher.options, parts[3:], GRID))
    mean, logvar = (torch.stack([record[name] for record in found]) for name in ("mean", "logvar"))
    mean, logvar = mean.detach(), logvar.detach()
    assert float(mean.mean()) == pytest.approx(0, abs=1e-3)
    assert float(mean.var(correction=0) + logvar.exp().mean()) == pytest.approx(1, abs=1e-3)
    assert told["held_out"] == 3 and told["psnr_db"] < 20


def test_pictures_are_different_and_no_more_than_asked_for(parts: list[Image.Image]) -> None:
    teacher = teacher_for({**SMALL, "steps": 1})
    stream = [*parts[:5], *parts[:5], *parts[3:9]]
    assert teacher.fit(again(teacher, stream))["pictures"] == 9
    few = teacher_for({**SMALL, "steps": 1, "pictures": 7})
    assert few.fit(again(few, parts))["pictures"] == 7
    with pytest.raises(DataError, match="two different pictures"):
        teacher.fit(again(teacher, parts[:1] * 3))


def test_crops_are_whole_visual_tokens_and_lie_anywhere() -> None:
    rows, columns = torch.meshgrid(torch.arange(24), torch.arange(40), indexing="ij")
    pictures = torch.stack([rows, columns, rows]).expand(2, 3, 24, 40)
    generator, corners = torch.Generator().manual_seed(0), set()
    for _ in range(60):
        part = autoencoder_fit._cropped(pictures, 19, 8, generator)
        assert part.shape == (2, 3, 16, 16)
        corner = int(part[0, 0, 0, 0]), int(part[0, 1, 0, 0])
        assert torch.equal(part, pictures[:, :, corner[0] : corner[0] + 16, corner[1] : corner[1] + 16])
        corners.add(corner)
    assert corners == {(y, x) for y in (0, 8) for x in (0, 8, 16, 24)}
    assert autoencoder_fit._cropped(pictures, 3, 8, generator).shape == (2, 3, 8, 8)
    assert autoencoder_fit._cropped(pictures, None, 8, generator) is pictures
    assert autoencoder_fit._cropped(pictures, 32, 8, generator).shape == (2, 3, 24, 32)


def test_a_fit_that_diverges_says_so(parts: list[Image.Image]) -> None:
    teacher = teacher_for({**SMALL, "steps": 50, "learning_rate": 1e20})
    with pytest.raises(ModelError, match=r"diverged in step \d+: lower `fit.learning_rate`, now 1e\+20"):
        teacher.fit(again(teacher, parts))


@pytest.mark.parametrize("channels", [None, [16, 32, 32, 64, 64], [6, 9], [5, 7], [128, 256]])
def test_its_own_architecture_has_16_pixels_a_visual_token(channels: list[int] | None) -> None:
    options = KLOptions(fit=FitOptions(channels=channels, latent_channels=7))
    spec = KLTeacher.describe(options, context(GRID))
    assert spec.image_size == (48, 64)
    side = 16 // 2 ** (len(channels or (1, 2, 3)) - 1)
    assert spec.width == 7 * side**2
    with torch.device("meta"):
        assert KLTeacher(options, context(GRID)).model.config["block_out_channels"] == list(channels or (8, 16, 32))
    coarse = KLOptions(patch=3, fit=FitOptions(channels=channels))
    assert KLTeacher.describe(coarse, context(GRID)).image_size[0] == 3 * 3 * 16 // side


def test_options_that_contradict_each_other_are_refused(tmp_path: Path, shared_corpus: Path) -> None:
    with pytest.raises(ValidationError, match="only measures"):
        KLOptions(fit=FitOptions(steps=0))
    with pytest.raises(ValidationError, match="only measures"):
        KLOptions(fit=FitOptions(steps=0), config=KL)
    with pytest.raises(ValidationError, match="without `config` and `pretrained`"):
        KLOptions(fit=FitOptions(channels=[4]), config=KL)
    teachers = {"one": {"type": "vq", "fit": {}}, "two": {"type": "autoencoder_kl", "fit": {"channels": []}}}
    recipe = recipe_dict(shared_corpus, objectives={name: {"teacher": teacher} for name, teacher in teachers.items()})
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path, recipe), plugins=plugins_with(dict.fromkeys(teachers, Regress)))
    told = str(caught.value)
    assert "one.teacher.fit: teacher vq cannot be fitted; `type: autoencoder_kl` can" in told
    assert "two.teacher.fit.channels" in told


def test_a_preset_whose_weights_have_to_be_imported_says_how(tmp_path: Path, shared_corpus: Path) -> None:
    told = "model.ckpt in some.zip: get that file, run `foveate import teacher FILE FOLDER`"
    for options in (KLOptions(config=KL, published="model.ckpt in some.zip"),
                    KLOptions(config=KL, published="model.ckpt in some.zip", fit=FitOptions(steps=0))):  # fmt: skip
        assert KLTeacher.describe(options, context(GRID)).image_size == (12, 16)
        with pytest.raises(ModelError) as caught:
            built(KLTeacher, options, context(GRID))
        assert told in str(caught.value)
    saved(AutoencoderKL, KL, tmp_path)
    options = KLOptions(config=KL, published="model.ckpt in some.zip", pretrained=str(tmp_path))
    assert built(KLTeacher, options, context(GRID)).config["scaling_factor"] == 0.37


def test_it_is_kept_in_the_run_found_on_resume_and_by_others(
    tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = {**SMALL, "steps": 5, "pictures": 20}
    objectives = {"regress": {"teacher": {"type": "autoencoder_kl", "patch": 2, "fit": fit}}}
    types = {"regress": Regress}
    unbroken, weights, whole = run(tmp_path / "a", shared_corpus, objectives, types=types, max_steps=4)
    loss = Regress.loss

    def interrupting(self: Regress, outputs: Any, *others: Any) -> Any:
        if outputs._moment.step == 1:
            signal.raise_signal(signal.SIGINT)
        return loss(self, outputs, *others)

    monkeypatch.setattr(Regress, "loss", interrupting)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", shared_corpus, objectives, types=types, max_steps=4)
    monkeypatch.undo()
    monkeypatch.setattr(KLTeacher, "fit", None)  # a resumed run fits no more
    resumed, other, result = run(tmp_path / "b", shared_corpus, objectives, types=types, max_steps=4, resume=True)
    assert [line["loss/regress"] for line in resumed] == [line["loss/regress"] for line in unbroken]
    assert all(torch.equal(other[name], weight) for name, weight in weights.items())
    folder = result.folder / "teachers" / "regress"
    told = json.loads((folder / "fit.json").read_text())["told"]
    assert told == json.loads((whole.folder / "teachers" / "regress" / "fit.json").read_text())["told"]
    assert 0 < told["psnr_db"] < 60 and told["pictures"] == 20
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert f"teacher of regress fitted: shift_factor {told['shift_factor']:.4g}" in page
    assert f"psnr_db {told['psnr_db']:.4g}" in page
    opened = load_run(result.folder, plugins=plugins_with(types), device="cpu").learner.teachers.of("regress")
    assert isinstance(opened, KLTeacher)
    where = opened.context
    plain = built(KLTeacher, KLOptions(pretrained=str(folder), patch=2), where)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    records = [teacher.encode(inputs(KLTeacher, teacher.options, [picture], where.visual_grid))[0]
               for teacher in (opened, plain)]  # fmt: skip
    assert float(records[0]["mean"].std()) > 0.01
    for name in ("mean", "logvar"):
        torch.testing.assert_close(records[1][name], records[0][name], atol=1e-5, rtol=1e-5)




def test_numbers_by_depth_stand_behind_one_another() -> None:
    told = {"semantic/error/1": 0.5, "psnr": 22.123456, "semantic/error/2": 0.25, "loss/t": 1.0}
    assert told_in_words(told) == "semantic/error by depth 0.5 0.25, psnr 22.12, loss/t 1"
