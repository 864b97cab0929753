"""`foveate import teacher`: files in LDM's and LlamaGen's layouts, against these models written independently."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from foveate.objective import ObjectiveContext, TeacherInputs
from foveate.registry import load_registry
from foveate.teachers.autoencoders import VQOptions, VQTeacher
from foveate.types import EncoderSpec, ImageRecord
from foveate_ross.tokenizers import convert
from tests.conftest import Command
from tests.plugins.ross.published import Published, published

KL: dict[str, Any] = {"widths": (32, 32, 64), "blocks": 2, "attends": {2}, "z": 5}
VQ: dict[str, Any] = {"widths": (32, 64), "blocks": 1, "attends": {1}, "z": 32, "codes": 40, "width": 6}


Import = Callable[..., str]


@pytest.fixture
def run(foveate_command: Command) -> Import:
    """What the command says; with `fails`, its one paragraph about what is wrong."""

    def call(*words: object, fails: bool = False) -> str:
        status, out, err = foveate_command("import", "teacher", *words)
        assert status == (2 if fails else 0), err
        assert "Traceback" not in err
        return err if fails else out

    return call


def state(model: Published) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def equal(found: Tensor, wanted: Tensor) -> None:
    scale = float(wanted.abs().max())
    assert found.shape == wanted.shape and scale > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-5 * max(scale, 1.0), rtol=1e-5)


@pytest.mark.parametrize("attends", [{2}, {0, 2}, set()])
def test_a_kl_of_ldm_computes_the_same(run: Import, tmp_path: Path, attends: set[int]) -> None:
    model = published("ldm", **{**KL, "attends": attends})
    rest = dict.fromkeys(("loss.logvar", "loss.discriminator.main.0.weight", "model_ema.decay"), torch.zeros(2))
    file, out = tmp_path / "model.ckpt", tmp_path / "new" / "kl"
    torch.save({"epoch": 3, "state_dict": {**state(model), **rest}, "optimizer_states": [{}]}, file)
    told = run(file, out, "--scaling-factor", "0.23", "--shift-factor", "0.1")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = AutoencoderKL.from_pretrained(out, use_safetensors=True).eval()
    assert (loaded.config["scaling_factor"], loaded.config["shift_factor"]) == (0.23, 0.1)
    pixels = torch.randn(2, 3, 16, 24)
    moments = model.encode(pixels)
    equal(loaded.encode(pixels).latent_dist.parameters, moments)
    latents = torch.randn(2, 5, 4, 6)
    equal(loaded.decode(latents).sample, model.decode(latents))
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    where = ", ".join(str(level + 1) for level in sorted(attends))
    levels = f"attention in level {where}" if attends else "no attention"
    parts = ["AutoencoderKL", "LDM", "3 levels of 32, 32, 64 channels, 2 blocks", levels, "4 pixels", f"{count:,} para"]
    for part in (*parts, "2 of loss.*", "1 of model_ema.*", "epoch, optimizer_states"):
        assert part in told, told


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_vq_of_llamagen_gives_the_same_codes_and_pictures(run: Import, tmp_path: Path, suffix: str) -> None:
    model = published("llamagen", **VQ)
    file, out = tmp_path / f"vq{suffix}", tmp_path / "vq"
    if suffix == ".pt":
        torch.save({"model": state(model)}, file)
    else:
        save_file(state(model), file)
    told = run(file, out)
    for part in ("VQModel", "LlamaGen", "40 codes of 6 numbers", "attention in level 2", "norm 1", "codebook_used"):
        assert part in told, told
    loaded = VQModel.from_pretrained(out, use_safetensors=True).eval()
    picture = Image.effect_noise((64, 64), 120).convert("RGB")
    encoder = EncoderSpec(64, (32, 32), 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    where, record = ObjectiveContext("some", 8, 1, (32, 32), encoder), ImageRecord("s", 0, "input", (32, 32), 0)
    teacher = VQTeacher(VQOptions(pretrained=str(out)), where).eval()
    found = teacher.encode(TeacherInputs([record], [VQTeacher.prepare_image(teacher.options, picture, record)]))[0]
    pixels = torch.tensor(list(picture.tobytes())).view(1, 64, 64, 3).permute(0, 3, 1, 2) / 127.5 - 1
    latents = model.encode(pixels)
    equal(loaded.encode(pixels).latents, latents)
    codes = model.nearest_direction(latents)
    assert len(codes.unique()) > 10, "else the test shows little"
    plain = torch.cdist(latents[0].flatten(1).T, model.quantize.embedding.weight).argmin(1)
    assert (plain != codes.flatten()).any(), "the rows of the file are not of one norm"
    assert torch.equal(found["codes"], codes.flatten())
    vectors = F.normalize(model.quantize.embedding.weight, dim=1)[codes]
    equal(found["latents"], vectors.flatten(0, 2))
    maps = vectors.permute(0, 3, 1, 2)
    equal(loaded.decode(maps, force_not_quantize=True).sample, model.decode(maps))


def test_a_codebook_that_was_trained_as_it_is_stays_so(run: Import, tmp_path: Path) -> None:
    model = published("llamagen", **VQ)
    torch.save({"model": state(model)}, tmp_path / "vq.pt")
    assert "norm 1" not in run(tmp_path / "vq.pt", tmp_path / "vq", "--plain-codebook")
    loaded = VQModel.from_pretrained(tmp_path / "vq")
    assert torch.equal(loaded.quantize.embedding.weight, model.quantize.embedding.weight)


def test_the_average_is_taken_where_there_is_one(run: Import, tmp_path: Path) -> None:
    model, average = published("llamagen", **VQ), published("llamagen", **VQ, seed=1)
    torch.save({"model": state(model), "ema": state(average), "steps": 7}, tmp_path / "vq.pt")
    assert "Read from 'ema'; left out beside it: model, steps" in run(tmp_path / "vq.pt", tmp_path / "vq")
    loaded = VQModel.from_pretrained(tmp_path / "vq")
    assert torch.equal(loaded.encoder.conv_in.weight, average.encoder.conv_in.weight)


def test_the_autoencoder_inside_of_a_diffusion_model(run: Import, tmp_path: Path) -> None:
    model = published("ldm", **KL)
    whole = {f"first_stage_model.{key}": tensor for key, tensor in state(model).items()}
    whole |= {"scale_factor": torch.tensor(0.4), "model.diffusion_model.w": torch.ones(2)}
    torch.save({"state_dict": whole}, tmp_path / "ldm.ckpt")
    told = run(tmp_path / "ldm.ckpt", tmp_path / "kl")
    assert "the 1 other entries" in told and "scaling_factor is 1" not in told
    loaded = AutoencoderKL.from_pretrained(tmp_path / "kl")
    assert loaded.config["scaling_factor"] == pytest.approx(0.4)


def test_files_of_lightning_are_read_and_none_of_its_classes(
    run: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published files of LDM name the classes of callbacks, by which torch refuses to load them."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    callback = type("ModelCheckpoint", (), {"__module__": names[-1]})
    sys.modules[names[-1]].ModelCheckpoint = callback  # type: ignore[attr-defined]
    model = published("ldm", **KL)
    torch.save({"state_dict": state(model), "callbacks": {callback: {"best": torch.ones(())}}}, tmp_path / "model.ckpt")
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    told = run(tmp_path / "model.ckpt", tmp_path / "kl")
    assert "callbacks" in told and "scaling_factor is 1" in told and "fit: {steps: 0}" in told
    assert names[0] not in sys.modules


class Harm:
    """What a harmful file does where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["FOVEATE_TEST_HARM"],)


def test_pickled_code_is_refused_and_not_run(run: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_TEST_HARM", str(tmp_path / "harm"))
    for number, (legacy, where) in enumerate([(False, "state_dict"), (True, "state_dict"), (False, "callbacks")]):
        file = tmp_path / f"{number}.ckpt"
        content = {"state_dict": state(published("ldm", **KL)), where: Harm()}
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
        told = run(file, tmp_path / "out", fails=True)
        assert "pickled code" in told if not legacy else "cannot be read" in told
        assert not (tmp_path / "harm").exists() and not (tmp_path / "out").exists()


def broken(run: Import, tmp_path: Path, key: str, value: Any) -> str:
    """What is said about a KL file in which one weight is another, or is left out (None)."""
    weights = {**state(published("ldm", **KL)), key: value}
    if value is None:
        del weights[key]
    torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
    told = run(tmp_path / "a.ckpt", tmp_path / "out", fails=True)
    assert str(tmp_path / "a.ckpt") in told and list(tmp_path.iterdir()) == [tmp_path / "a.ckpt"]
    return told


def test_files_whose_weights_do_not_fit_are_refused(run: Import, tmp_path: Path) -> None:
    cases: list[tuple[str, str, Any]] = [
        ("it lacks encoder.down_blocks.1.resnets.0.norm1.bias", "encoder.down.1.block.0.norm1.bias", None),
        ("it lacks decoder.up_blocks.2.resnets.2.conv2.weight", "decoder.up.0.block.2.conv2.weight", None),
        ("it lacks encoder.down_blocks.2.attentions.1.to_q.weight", "encoder.down.2.attn.1.q.weight", None),
        ("there is no decoder.conv_in.weight", "decoder.conv_in.weight", None),
        ("nothing is known of encoder.film.weight", "encoder.film.weight", torch.ones(3)),
        ("conv_out.bias is 4 and should be 10", "encoder.conv_out.bias", torch.zeros(4)),
        ("not finite", "quant_conv.bias", torch.full((10,), torch.nan)),
        ("'epoch' is no tensor, but int", "epoch", 3),
    ]
    for said, key, value in cases:
        assert said in broken(run, tmp_path, key, value)


def test_files_that_are_no_tokenizer_are_refused(run: Import, tmp_path: Path) -> None:
    torch.save({"state_dict": {"head.weight": torch.ones(2)}}, tmp_path / "other.ckpt")
    assert "neither LDM's nor LlamaGen's" in run(tmp_path / "other.ckpt", tmp_path / "out", fails=True)
    torch.save([1, 2], tmp_path / "list.ckpt")
    assert "holds a list" in run(tmp_path / "list.ckpt", tmp_path / "out", fails=True)
    for name in ("noise.ckpt", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(range(200)))
        assert "cannot be read" in run(tmp_path / name, tmp_path / "out", fails=True)
    AutoencoderKL(block_out_channels=[32]).save_pretrained(tmp_path / "have")
    told = run(tmp_path / "have" / "diffusion_pytorch_model.safetensors", tmp_path / "out", fails=True)
    assert "layout of diffusers already" in told
    assert "no such file" in run(tmp_path / "absent.ckpt", tmp_path / "out", fails=True)
    assert "it is a folder" in run(tmp_path / "have", tmp_path / "out", fails=True)
    assert "not an empty folder" in run(tmp_path / "list.ckpt", tmp_path / "have", fails=True)


def test_options_that_do_not_apply_are_refused(run: Import, tmp_path: Path) -> None:
    torch.save({"model": state(published("llamagen", **VQ))}, tmp_path / "vq.pt")
    torch.save({"state_dict": state(published("ldm", **KL))}, tmp_path / "kl.ckpt")
    assert "VQ model" in run(tmp_path / "vq.pt", tmp_path / "out", "--scaling-factor", "2", fails=True)
    assert "LlamaGen layout" in run(tmp_path / "kl.ckpt", tmp_path / "out", "--plain-codebook", fails=True)
    assert "above 0" in run(tmp_path / "kl.ckpt", tmp_path / "out", "--scaling-factor", "0", fails=True)


@pytest.mark.parametrize(
    ("preset", "arguments"),
    [
        ("kl-16", {"layout": "ldm", "widths": (128, 128, 256, 256, 512), "blocks": 2, "attends": {4}, "z": 16}),
        ("vq-16", {"layout": "llamagen", "widths": (128, 128, 256, 256, 512), "blocks": 2, "attends": {4}, "z": 256,
                   "codes": 16384, "width": 8}),
    ],
)  # fmt: skip
def test_presets_are_what_the_published_files_become(preset: str, arguments: dict[str, Any]) -> None:
    """The models of the published sizes, without memory for their weights."""
    with torch.device("meta"):
        whole = Published(**arguments)
    found = convert(dict(whole.state_dict()), preset)
    told = json.loads(json.dumps(load_registry()[0].presets["teachers"][preset].options["config"]))
    for key, value in told.items():
        if key not in ("scaling_factor", "shift_factor", "sample_size"):
            assert found.config[key] == value, key
    assert load_registry()[0].presets["teachers"][preset].options["type"] == found.kind
