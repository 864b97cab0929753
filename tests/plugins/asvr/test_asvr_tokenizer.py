"""Tokenizers as folders: fitted by the command, imported from a published layout, held against the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from asvr_parts import APPEARANCE, OPTIONS, TOKENIZER, write
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from foveate import assemble, load_recipe
from foveate.errors import FoveateError, ModelError, RecipeError
from foveate.model.build import load_lmm
from foveate.progress import Display
from foveate.training import train
from tests.conftest import Command
from tests.corpus import ENCODER

OWN = {"config": {**ENCODER["config"], "hidden_size": 16, "image_size": 20, "patch_size": 5}, "mean": [0.4, 0.5, 0.6]}
"""Another encoder than the model's, on as many patches."""


def targets(recipe: Path, name: str = "asvr") -> tuple[list[Tensor], Any]:
    """What the teacher of a recipe makes of its first step's images, and the assembly."""
    made = assemble(load_recipe(recipe))
    work = next(iter(made.data.stage(made.recipe.stages[0]).steps()))
    found = []
    with torch.no_grad():
        for batch in work.batches:
            found += [record["semantic"] for record in made.learner.look(batch)[name].targets]
    return found, made


@pytest.mark.parametrize("encoder", [None, OWN], ids=["the model's", "its own"])
def test_a_fitted_folder_is_used_by_a_recipe(
    tmp_path: Path, shared_corpus: Path, foveate_command: Command, encoder: Any
) -> None:
    """The command fits as a run does; the folder gives the codes of the tokenizer that was fitted."""
    tokenizer = {**TOKENIZER, **({"encoder": encoder} if encoder else {"layer": 1})}
    recipe = write(tmp_path, shared_corpus, {"asvr": {**OPTIONS, "tokenizer": tokenizer}})
    out = tmp_path / "fitted"
    status, text, errors = foveate_command("asvr", "fit-tokenizer", recipe, "--out", out)
    assert status == 0, errors
    assert "perplexity" in text and f"pretrained: {out}" in errors
    card = json.loads((out / "tokenizer.json").read_text())
    assert (card["depth"], card["codebook_size"], card["shared"], card["kind"]) == (3, 8, False, "semantic")
    assert card["told"]["error/3"] < card["told"]["error/1"] and (out / "encoder.safetensors").exists() == bool(encoder)

    done = train(load_recipe(recipe), display=Display(quiet=True))
    fitted = load_file(done.folder / "teachers" / "asvr" / "weights.safetensors")
    books = load_file(out / "codebooks.safetensors")["quantizer.codebooks"]
    torch.testing.assert_close(fitted["semantic.quantizer.codebooks"], books, rtol=1e-4, atol=1e-4)

    options = {**OPTIONS, "tokenizer": {"pretrained": str(out)}}
    codes, made = targets(write(tmp_path / "use", shared_corpus, {"asvr": options}))
    teacher = made.learner.teachers.of("asvr")["semantic"]
    assert teacher.needs_fit(teacher.options) is False and torch.equal(teacher.quantizer.codebooks, books)
    assert len(codes) > 5 and all(part.shape == (16, 3) for part in codes)
    assert len(torch.cat(codes)[:, 0].unique()) > 2
    status, _, errors = foveate_command("asvr", "fit-tokenizer", recipe, "--out", out)
    assert status == 2 and "exists and is not an empty folder" in errors


def test_codes_of_an_encoder_of_its_own_are_of_the_raw_picture(tmp_path: Path, shared_corpus: Path) -> None:
    """Its own size, mean and deviation; against transformers' processor and model, nearest vectors by hand."""
    torch.manual_seed(0)
    fields = {key: value for key, value in OWN["config"].items() if key != "model_type"}
    model = SiglipVisionModel(SiglipVisionConfig(**fields)).eval()
    model.save_pretrained(tmp_path / "siglip")
    size = {"height": 20, "width": 20}
    processor = SiglipImageProcessor(size=size, image_mean=OWN["mean"], resample=Image.Resampling.BICUBIC)
    processor.save_pretrained(tmp_path / "siglip")
    tokenizer = {**TOKENIZER, "encoder": {"pretrained": str(tmp_path / "siglip")}, "layer": 1}
    recipe = write(tmp_path / "r", shared_corpus, {"asvr": {**OPTIONS, "tokenizer": tokenizer}})
    made = assemble(load_recipe(recipe))
    teacher = made.learner.teachers.of("asvr")["semantic"]
    teacher.quantizer.codebooks.normal_()
    rule = made.learner.rules["asvr"]
    picture = Image.open(shared_corpus / "images" / "0.png")
    from foveate.objective import TeacherInputs
    from foveate.types import ImageRecord

    record = ImageRecord("s", 0, "input", (4, 4), 0)
    [found] = made.learner.teachers.encode("asvr", TeacherInputs([record], [rule.prepare(picture, record)]))
    states = model(**processor(picture, return_tensors="pt"), output_hidden_states=True).hidden_states[1][0]
    rest, books = states.detach().double(), teacher.quantizer.codebooks.double()
    for depth in range(3):
        codes = (rest[:, None] - books[depth]).square().sum(2).argmin(1)
        assert torch.equal(found["semantic"][:, depth], codes)
        rest = rest - books[depth][codes]


def checkpoint(path: Path, *, padding: bool = True, depth: int = 3, **changes: Any) -> dict[str, Tensor]:
    """A file in the published layout: SigLIP, semantic codebooks with a padding row each, and other things."""
    torch.manual_seed(1)
    fields = {key: value for key, value in ENCODER["config"].items() if key not in ("model_type", "vision_use_head")}
    model = SiglipVisionModel(SiglipVisionConfig(**{**fields, "num_hidden_layers": 3}))
    state = {f"tok.tower.vision_model.{key}": value for key, value in model.state_dict().items()}
    state = {key.replace("vision_model.vision_model", "vision_model"): value for key, value in state.items()}
    for number in range(depth):
        book = torch.randn(9, 24) / (1 + number)
        book[-1] = 0 if padding else 1
        state[f"tok.quantizer_semantic.codebooks.{number}.weight"] = book
        state[f"tok.quantizer_semantic.codebooks.{number}.cluster_size_ema"] = torch.ones(8)
    state["decoder.conv.weight"] = torch.randn(3, 3)
    state |= changes
    state = {key: value.clone() for key, value in state.items() if value is not None}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)
    return state


GIVEN = ("--heads", 2, "--image-size", 16)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_published_checkpoint_round_trips(
    tmp_path: Path, shared_corpus: Path, foveate_command: Command, suffix: str
) -> None:
    """Codes are those of the file's own SigLIP, run by transformers, and of its codebooks without padding."""
    path, out = tmp_path / f"ckpt{suffix}", tmp_path / "imported"
    state = checkpoint(path)
    status, _, told = foveate_command("import", "tokenizer", path, out, *GIVEN)
    assert status == 0, told
    assert "3 codebooks of 8 codes, 24 wide" in told and "block 2 of 3, 16 pixels, 4 x 4 rows" in told
    assert "not read: decoder, 1 tensors" in told and "not read: tok, 3 tensors" in told
    options = {"asvr": {**OPTIONS, "tokenizer": {"pretrained": str(out)}}}
    made = assemble(load_recipe(write(tmp_path / "use", shared_corpus, options)))
    teacher = made.learner.teachers.of("asvr")["semantic"]
    books = torch.stack([state[f"tok.quantizer_semantic.codebooks.{number}.weight"][:-1] for number in range(3)])
    assert torch.equal(teacher.quantizer.codebooks, books)
    fields = {key: value for key, value in ENCODER["config"].items() if key not in ("model_type", "vision_use_head")}
    stock = SiglipVisionModel(SiglipVisionConfig(**{**fields, "num_hidden_layers": 3})).eval()
    weights = {key.removeprefix("tok.tower.vision_model."): value for key, value in state.items() if "tower" in key}
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in stock.state_dict()) else ""
    stock.load_state_dict({f"{prefix}{key}": value for key, value in weights.items()})
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        features = stock(pixel_values=pixels, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(teacher.features.encoder(pixels), features, rtol=1e-5, atol=1e-5)
    status, _, told = foveate_command("import", "tokenizer", path, out, *GIVEN)
    assert status == 2 and "exists and is not an empty folder" in told


def test_the_models_pass_is_reused_only_where_weights_are_the_same_bit_for_bit(
    tmp_path: Path, shared_corpus: Path, foveate_command: Command
) -> None:
    path, out = tmp_path / "ckpt.bin", tmp_path / "imported"
    state = checkpoint(path)
    assert foveate_command("import", "tokenizer", path, out, *GIVEN)[0] == 0
    weights = {key.removeprefix("tok.tower.vision_model."): value for key, value in state.items() if "tower" in key}
    fields = {key: value for key, value in ENCODER["config"].items() if key not in ("model_type", "vision_use_head")}
    stock = SiglipVisionModel(SiglipVisionConfig(**{**fields, "num_hidden_layers": 3}))
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in stock.state_dict()) else ""
    stock.load_state_dict({f"{prefix}{key}": value for key, value in weights.items()})

    def recipe(name: str, reuse: bool, nudge: float = 0.0, **encoder: Any) -> Path:
        with torch.no_grad():
            stock.get_parameter(f"{prefix}encoder.layers.1.mlp.fc1.bias")[3] += nudge
        stock.save_pretrained(tmp_path / name / "siglip")
        model = {"encoder": {"pretrained": str(tmp_path / name / "siglip"), "layer": -1, **encoder}}
        content = {**write_model(shared_corpus), **model}
        tokenizer = {"pretrained": str(out), "reuse": reuse}
        return write(tmp_path / name, shared_corpus, {"asvr": {**OPTIONS, "tokenizer": tokenizer}}, model=content)

    own, _ = targets(recipe("own", False))
    reused, made = targets(recipe("reused", True))
    assert all(torch.equal(first, second) for first, second in zip(own, reused, strict=True))
    assert made.learner.teachers.of("asvr")["semantic"].features.encoder is None
    half = targets_in(made, torch.bfloat16)
    assert len(half) == len(own), "the model's frozen encoder may be in bf16"
    with pytest.raises(ModelError, match=r"an encoder with other weights\. Set `reuse: false`"):
        targets(recipe("other", True, nudge=1e-6))
    targets(recipe("unequal", False))
    with pytest.raises(FoveateError, match=r"pixel mean \(0.5, 0.5, 0.5\), the model's has \(0.1, 0.5, 0.5\)"):
        targets(recipe("mean", True, mean=[0.1, 0.5, 0.5]))


def write_model(corpus: Path) -> dict[str, Any]:
    """`model:` of the recipes here."""
    from tests.corpus import recipe_dict

    return dict(recipe_dict(corpus)["model"])


def targets_in(made: Any, dtype: torch.dtype) -> list[Tensor]:
    """Targets where the model's encoder is frozen in another dtype, the check of weights not done yet."""
    made.lmm.encoder.to(dtype)
    teacher = made.learner.teachers.of("asvr")["semantic"]
    teacher._known = False
    work = next(iter(made.data.stage(made.recipe.stages[0]).steps()))
    with torch.no_grad():
        return [record["semantic"] for batch in work.batches for record in made.learner.look(batch)["asvr"].targets]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tok.quantizer_semantic.codebooks.1.weight": None}, "for D from 0 on, once each; there are 0, 2"),
        ({"tok.quantizer_semantic.codebooks.1.weight": torch.zeros(7, 24)}, "codebooks of different shapes"),
        ({"tok.tower.vision_model.encoder.layers.1.mlp.fc1.weight": None}, "1 missing"),
        ({"tok.tower.vision_model.embeddings.patch_embedding.weight": None}, "holds no encoder"),
        ({"x.embeddings.patch_embedding.weight": torch.zeros(2)}, "holds 2 encoders"),
        ({"tok.tower.vision_model.embeddings.strange": torch.zeros(2)}, "1 unexpected"),
        ({"tok.quantizer_semantic.codebooks.0.weight": torch.full((9, 24), torch.nan)}, "not the padding"),
    ],
    ids=["a codebook", "shapes", "a weight", "no encoder", "two encoders", "unknown weight", "nan"],
)  # fmt: skip
def test_an_incomplete_checkpoint_is_an_error(
    tmp_path: Path, foveate_command: Command, changes: dict[str, Any], told: str
) -> None:
    path, out = tmp_path / "ckpt.bin", tmp_path / "imported"
    checkpoint(path, **changes)
    status, _, errors = foveate_command("import", "tokenizer", path, out, *GIVEN)
    assert status == 2 and told in errors and "Traceback" not in errors
    assert not out.exists()


def test_other_files_are_no_checkpoints(tmp_path: Path, foveate_command: Command) -> None:
    out = tmp_path / "imported"

    class Harm:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harm",)

    torch.save({"x": Harm()}, tmp_path / "harm.bin")
    (tmp_path / "text.bin").write_text("no tensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    torch.save({"x": 1}, tmp_path / "number.bin")
    checkpoint(tmp_path / "unpadded.bin", padding=False)
    checkpoint(tmp_path / "sound.bin")
    cases: list[tuple[str, tuple[Any, ...], str]] = [
        ("harm.bin", (), "cannot be read as tensors alone"), ("text.bin", (), "cannot be read as tensors alone"),
        ("text.safetensors", (), "cannot be read as tensors alone"), ("number.bin", (), "is no mapping"),
        ("nowhere.bin", (), "no such file"), ("unpadded.bin", GIVEN, "is not the padding (zeros)"),
        ("sound.bin", (), "give --heads and --image-size"), 
        ("sound.bin", ("--heads", 5, "--image-size", 16), "5 heads"),
        ("sound.bin", (*GIVEN, "--layer", 4), "has 3 blocks"),
    ]  # fmt: skip
    for name, words, told in cases:
        status, _, errors = foveate_command("import", "tokenizer", tmp_path / name, out, *words)
        assert status == 2 and told in errors, name
    assert not out.exists() and not (tmp_path / "harm").exists()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, shared_corpus: Path) -> Path:
    """A folder with a tokenizer of the model's own encoder, and `own`, one with an encoder of its own; `appearance`."""
    from foveate_asvr.fitting import fit

    folder = tmp_path_factory.mktemp("fitted")
    for name, options in {
        "model": {"tokenizer": TOKENIZER}, "own": {"tokenizer": {**TOKENIZER, "encoder": OWN}},
        "appearance": {"target": "appearance", "appearance": APPEARANCE},
    }.items():  # fmt: skip
        recipe = write(folder / "recipe", shared_corpus, {"asvr": {**OPTIONS, **options}})
        list(fit(load_recipe(recipe), "asvr", folder / name))
    return folder


def test_a_tokenizer_that_does_not_match_the_model_is_an_error(
    fitted: Path, tmp_path: Path, shared_corpus: Path
) -> None:
    def attempt(name: str, encoder: Any = None, config: Any = None, seed: int = 0, **options: Any) -> None:
        chosen = {**ENCODER, **(encoder or {}), "config": {**ENCODER["config"], **(config or {})}}
        changes = {"model": {**write_model(shared_corpus), "encoder": chosen}, "seed": seed}
        tokenizer = {"pretrained": str(fitted / "model"), **options}
        targets(write(tmp_path / name, shared_corpus, {"asvr": {**OPTIONS, "tokenizer": tokenizer}}, **changes))

    for name, arguments, told in (
        ("width", {"config": {"hidden_size": 32}}, "width 24, the model's has 32"),
        ("grid", {"config": {"image_size": 20}}, "grid of features is 4 x 4, that of the visual tokens 5 x 5"),
        ("size", {"config": {"image_size": 20}, "resample": True}, "image size 16, the model's has 20"),
        ("mean", {"encoder": {"mean": [0.1, 0.2, 0.3]}}, "pixel mean"),
        ("std", {"encoder": {"std": [0.1, 0.2, 0.3]}}, "pixel deviation"),
        ("weights", {"seed": 1}, "an encoder with other weights. Take the encoder"),
    ):  # fmt: skip
        with pytest.raises(FoveateError, match=told):
            attempt(name, **arguments)  # type: ignore[arg-type]
    attempt("sound")


def test_a_partial_folder_is_an_error_and_never_a_random_tokenizer(
    fitted: Path, tmp_path: Path, shared_corpus: Path
) -> None:
    def attempt(folder: Path, **options: Any) -> None:
        tokenizer = {"pretrained": str(folder), **options}
        recipe = load_recipe(write(tmp_path / "r", shared_corpus, {"asvr": {**OPTIONS, "tokenizer": tokenizer}}))
        made = assemble(recipe)
        made.learner.teachers.of("asvr")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(fitted / "own", tmp_path / name))

    for name, file in (("a", "tokenizer.json"), ("b", "codebooks.safetensors"), ("c", "encoder.safetensors")):
        (copy(name) / file).unlink()
        with pytest.raises(FoveateError, match=file):
            attempt(tmp_path / name)
    (copy("d") / "tokenizer.json").write_text("{")
    with pytest.raises(FoveateError, match="cannot be read"):
        attempt(tmp_path / "d")
    state = load_file(copy("e") / "encoder.safetensors")
    state.popitem()
    save_file(state, tmp_path / "e" / "encoder.safetensors")
    with pytest.raises(FoveateError, match="1 missing"):
        attempt(tmp_path / "e")
    books = load_file(copy("f") / "codebooks.safetensors")
    books["quantizer.codebooks"][0, 0, 0] = torch.inf
    save_file(books, tmp_path / "f" / "codebooks.safetensors")
    with pytest.raises(FoveateError, match="not finite"):
        attempt(tmp_path / "f")
    save_file({"quantizer.codebooks": torch.zeros(3, 7, 16)}, tmp_path / "f" / "codebooks.safetensors")
    with pytest.raises(FoveateError, match=r"has shape \(3, 7, 16\)"):
        attempt(tmp_path / "f")
    with pytest.raises(FoveateError, match="is a tokenizer of kind 'appearance'"):
        attempt(fitted / "appearance")
    with pytest.raises(RecipeError, match="brings its own depth: leave these out"):
        attempt(fitted / "own", depth=2)


def test_a_grid_that_differs_has_to_be_said(tmp_path: Path, shared_corpus: Path) -> None:
    encoder = {"config": {**OWN["config"], "image_size": 30}}
    tokenizer = {**TOKENIZER, "encoder": encoder}
    options = {"asvr": {**OPTIONS, "tokenizer": tokenizer}}
    with pytest.raises(FoveateError, match="grid of features is 6 x 6, that of the visual tokens 4 x 4: set `resample"):
        assemble(load_recipe(write(tmp_path / "a", shared_corpus, options)))
    tokenizer["resample"] = True
    codes, _ = targets(write(tmp_path / "b", shared_corpus, options))
    assert codes[0].shape == (16, 3)


def test_a_pretrained_appearance_tokenizer_decodes_as_the_fitted_one(
    fitted: Path, tmp_path: Path, shared_corpus: Path
) -> None:
    appearance = {"pretrained": str(fitted / "appearance")}
    recipe = write(tmp_path, shared_corpus, {"asvr": {**OPTIONS, "target": "appearance", "appearance": appearance}})
    teacher = assemble(load_recipe(recipe)).learner.teachers.of("asvr")["appearance"]
    weights = load_file(fitted / "appearance" / "codebooks.safetensors")
    for name, weight in weights.items():
        assert torch.equal(teacher.state_dict()[name], weight), name
    pixels = teacher.decode(torch.randint(8, (2, 16, 3)))
    assert pixels.shape == (2, 3, 16, 16) and 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
    card = json.loads((fitted / "appearance" / "tokenizer.json").read_text())
    assert card["options"]["decoder"]["patch_px"] == 4 and card["told"]["psnr"] > 0


def test_codes_of_appearance_tell_more_of_pixels_the_deeper_they_are(shared_corpus: Path, tmp_path: Path) -> None:
    """A longer fit: its PSNR beats that of painting every picture in the mean colour by far."""
    fit = {**APPEARANCE["fit"], "images": 900, "lr": 3e-3}
    appearance = {**APPEARANCE, "codebook_size": 32, "decoder": {"width": 24, "blocks": 1, "patch_px": 4}, "fit": fit}
    from foveate_asvr.fitting import fit as fit_recipe

    options = {"asvr": {**OPTIONS, "target": "appearance", "appearance": appearance}}
    [(_, _, told)] = fit_recipe(load_recipe(write(tmp_path, shared_corpus, options)), "asvr", tmp_path / "out")
    pixels = torch.cat([
        torch.tensor(list(Image.open(path).convert("L").resize((16, 16)).getdata())) / 255.0
        for path in (shared_corpus / "images").glob("*.png")
    ])  # fmt: skip
    blank = -10 * float(torch.log10(pixels.var()))
    assert told["psnr"] > blank + 3
    assert told["error/3"] < 0.8 * told["error/1"]


def test_discrete_inputs(fitted: Path, tmp_path: Path, shared_corpus: Path) -> None:
    """Encoder `quantized`: sums of codebook vectors in place of features; saved and loaded as part of a model."""
    model = {**write_model(shared_corpus), "encoder": {"type": "quantized", "tokenizer": str(fitted / "own")}}
    recipe = load_recipe(write(tmp_path, shared_corpus, {}, model=model))
    made = assemble(recipe)
    encoder: Any = made.lmm.encoder
    assert (encoder.spec.width, encoder.spec.grid, encoder.spec.mean) == (16, (4, 4), (0.4, 0.5, 0.6))
    pixels = torch.randn(2, 3, 20, 20)
    features = encoder.wrapped(pixels)
    found = encoder(pixels)
    books = encoder.quantizer.codebooks
    vectors = {
        tuple(round(float(x), 4) for x in books[0][a] + books[1][b] + books[2][c])
        for a in range(8) for b in range(8) for c in range(8)
    }  # fmt: skip
    assert found.shape == features.shape
    assert all(tuple(round(x, 4) for x in row) in vectors for row in found[0].tolist())
    [weight] = torch.autograd.grad(found.sum(), [encoder.wrapped.blocks()[0].layer_norm1.weight])
    [straight] = torch.autograd.grad(features.sum(), [encoder.wrapped.blocks()[0].layer_norm1.weight])
    torch.testing.assert_close(weight, straight)
    done = train(recipe, display=Display(quiet=True))
    again, _ = load_lmm(done.folder)
    torch.testing.assert_close(again.encoder(pixels), found.detach())
    model["encoder"] = {"type": "quantized", "tokenizer": str(fitted / "model")}
    with pytest.raises(FoveateError, match="has no encoder of its own"):
        assemble(load_recipe(write(tmp_path / "b", shared_corpus, {}, model=model)))
    model["encoder"] = {"type": "quantized"}
    with pytest.raises(RecipeError, match="give `tokenizer`"):
        load_recipe(write(tmp_path / "c", shared_corpus, {}, model=model))


def test_fit_tokenizer_says_what_it_cannot_do(
    fitted: Path, tmp_path: Path, shared_corpus: Path, foveate_command: Command
) -> None:
    cases: tuple[tuple[dict[str, Any], tuple[str, ...], str], ...] = (
        ({}, (), "this one has none"),
        ({"asvr": OPTIONS, "b": {"type": "asvr", **OPTIONS}}, (), "by --objective (asvr, b)"),
        ({"asvr": OPTIONS}, ("--objective", "c"), "--objective c"),
        ({"asvr": {**OPTIONS, "tokenizer": {"pretrained": str(fitted / "own")}}}, (), "has nothing to fit"),
    )
    for number, (objectives, words, told) in enumerate(cases):
        recipe = write(tmp_path / str(number), shared_corpus, objectives)
        status, _, errors = foveate_command("asvr", "fit-tokenizer", recipe, "--out", tmp_path / "out", *words)
        assert status == 2 and told in errors
    recipe = write(tmp_path / "both", shared_corpus, {"asvr": {**OPTIONS, "target": "both"}})
    status, text, errors = foveate_command("asvr", "fit-tokenizer", recipe, "--out", tmp_path / "out", "--json")
    assert status == 0, errors
    told = json.loads(text)
    assert set(told) == {str(tmp_path / "out" / "semantic"), str(tmp_path / "out" / "appearance")}
    assert "psnr" in told[str(tmp_path / "out" / "appearance")]
