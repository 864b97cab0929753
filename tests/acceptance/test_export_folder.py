"""What an export leaves on disk, what it refuses, and that its check finds what is wrong."""

from __future__ import annotations

import functools
import json
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import foveate.cli
import foveate.export
from foveate.data.templates import SHIPPED
from foveate.data.tokenizer import train_tokenizer
from foveate.errors import ModelError, RunError
from foveate.export import export_model, not_stock
from foveate.export.layout import not_exportable
from foveate.export.verify import check_export, expected_logits
from foveate.files import disk_errors
from foveate.model.build import load_lmm
from foveate.model.projector import MLPOptions, MLPProjector
from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.training import train
from tests.corpus import recipe_dict, write_recipe
from tests.exports import MLP, TIMM, encoder, llama_tokenizer, llm, our_rules, pictures, random_model
from tests.objectives import Noisy, plugins_with


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, shared_corpus: Path) -> Path:
    """A model folder that can be a stock Llava: CLIP and Llama."""
    parts = {"encoder": encoder("clip"), "projector": MLP, "llm": llm("llama")}
    return random_model(tmp_path_factory.mktemp("clip"), shared_corpus, parts)


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory, shared_corpus: Path) -> Path:
    """A model folder that cannot."""
    parts = {"encoder": TIMM, "projector": {"type": "pixel_shuffle_mlp", "factor": 3, "normalize": True}}
    return random_model(tmp_path_factory.mktemp("timm"), shared_corpus, {**parts, "llm": llm("qwen2")})


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first, exported."""
    return export_model(model, tmp_path_factory.mktemp("out") / "llava").folder


def test_names_are_those_of_the_hub(exported: Path, shared_corpus: Path, tmp_path: Path) -> None:
    """As in llava-hf/llava-1.5-7b-hf; what CLIP has and nobody reads is there too, so that no loader misses it."""
    names = set(load_file(exported / "model.safetensors"))
    tower = "vision_tower.vision_model."
    assert names >= {
        "language_model.lm_head.weight", "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.mlp.down_proj.weight", "language_model.model.norm.weight",
        "multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_2.weight",
        f"{tower}embeddings.class_embedding", f"{tower}embeddings.patch_embedding.weight",
        f"{tower}pre_layrnorm.weight", f"{tower}post_layernorm.weight", f"{tower}post_layernorm.bias",
        f"{tower}encoder.layers.1.self_attn.out_proj.bias",
    }  # fmt: skip
    starts = ("language_model.model.", "language_model.lm_head.", "multi_modal_projector.linear_", tower)
    assert all(name.startswith(starts) for name in names)
    dinov2 = {"encoder": encoder("dinov2"), "projector": MLP, "llm": llm("qwen2", tied=True)}
    out = export_model(random_model(tmp_path, shared_corpus, dinov2), tmp_path / "out").folder
    names = set(load_file(out / "model.safetensors"))
    assert "vision_tower.embeddings.cls_token" in names and "vision_tower.layernorm.weight" in names
    assert "language_model.lm_head.weight" not in names, "a tied head is written once"


def test_the_folder_is_whole_and_starts_a_recipe(model: Path, exported: Path) -> None:
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    expected |= {"processor_config.json", "preprocessor_config.json", "chat_template.jinja"}
    assert {path.name for path in exported.iterdir()} == expected
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1, "who may read one file may read them all"
    ours, back = load_lmm(model)[0].state_dict(), load_lmm(exported)[0].state_dict()
    assert ours.keys() == back.keys() and all(torch.equal(ours[name], back[name]) for name in ours)
    config = json.loads((exported / "config.json").read_text())
    assert (config["image_seq_length"], config["vision_feature_layer"]) == (9, -1)
    assert config["text_config"]["use_cache"] is True
    tokenizer = AutoProcessor.from_pretrained(exported).tokenizer
    assert config["image_token_index"] == tokenizer.convert_tokens_to_ids("<image>")
    ends = json.loads((exported / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize("template", [name for name in SHIPPED if name != "llama3"])
def test_every_template_and_many_visual_tokens(shared_corpus: Path, tmp_path: Path, template: str) -> None:
    """The check reads a conversation both ways; here an image is 2,500 tokens, more than samples have by default."""
    tokenizer = llama_tokenizer(tmp_path / "tokenizer")
    large = encoder("clip") | {"config": {**encoder("clip")["config"], "image_size": 200}}
    parts = {"encoder": large, "projector": MLP, "llm": llm("llama", tokenizer=tokenizer, max_position_embeddings=4096)}
    folder = random_model(tmp_path, shared_corpus, parts, template=template)
    done = export_model(folder, tmp_path / "out")
    assert done.gap is not None and done.gap < 1e-4
    assert json.loads((done.folder / "config.json").read_text())["image_seq_length"] == 2500


def test_the_page_about_exports_runs(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M)
    monkeypatch.chdir(tmp_path)
    export_model(model, "my-llava-hf")
    Image.open(pictures(tmp_path)[0]).save("scene.png")
    names: dict[str, Any] = {}
    exec(compile(code, "export.md", "exec"), names)
    assert names["prompt"].count("<image>\nWhich digit is north?") == 1
    assert isinstance(names["answer"], str) and names["tokens"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_older_readers_find_what_they_look_for(shared_corpus: Path, tmp_path: Path) -> None:
    """transformers 4, and programs that read the files themselves: names that transformers 5 has changed."""
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    parts = {"encoder": encoder("dinov2"), "projector": MLP, "llm": llm("llama", rope_parameters=scaled)}
    out = export_model(random_model(tmp_path, shared_corpus, parts), tmp_path / "out").folder
    text = json.loads((out / "config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["rope_scaling"]) == (5e5, {"rope_type": "linear", "factor": 2.0})
    back = LlavaForConditionalGeneration.from_pretrained(out).config.text_config
    assert back.rope_parameters == scaled
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert json.loads((out / "preprocessor_config.json").read_text())["image_processor_type"] == "LlavaImageProcessor"
    attention = {name for name in load_file(out / "model.safetensors") if ".layer.0.attention." in name}
    assert "vision_tower.encoder.layer.0.attention.attention.query.weight" in attention


def test_an_answer_ends_where_the_template_teaches_it(shared_corpus: Path, tmp_path: Path) -> None:
    """A tokenizer whose EOS is not what its chat template says at the end of an answer, as Qwen2's base models."""
    tokenizer = train_tokenizer(["Which digit? It is 4."], 300)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    parts = {"encoder": encoder("siglip"), "projector": MLP}
    model = {**parts, "llm": llm("qwen2", tokenizer=str(tmp_path / "tokenizer"))}
    out = export_model(random_model(tmp_path, shared_corpus, model, template="chatml"), tmp_path / "out").folder
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]
    assert AutoProcessor.from_pretrained(out).tokenizer.eos_token == "<|im_end|>", "lmms-eval stops at nothing else"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(model: Path, tmp_path: Path, dtype: str) -> None:
    done = export_model(model, tmp_path / "out", dtype=dtype)
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {wanted}
    assert done.gap is not None and done.gap < 1e-4
    llava = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert llava.dtype is wanted
    whole = load_lmm(model)[0].llm.state_dict()["model.lm_head.weight"]
    assert torch.equal(llava.lm_head.weight, whole.to(wanted))


def test_large_models_are_written_in_shards(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = functools.partial(foveate.export.save_torch_state_dict, max_shard_size="50KB")
    monkeypatch.setattr(foveate.export, "save_torch_state_dict", small)
    done = export_model(model, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2 and done.gap is not None
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == set(index.values())


def test_what_is_no_stock_llava_is_told(shuffled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as left:
        foveate.cli.main(["export", str(shuffled), str(out)])
    told = " ".join(capsys.readouterr().err.split())
    assert left.value.code == 2 and not out.exists()
    for reason in ("timm's", "pixel_shuffle_mlp, not mlp of depth 2", "normalized", "--own-code"):
        assert reason in told
    with pytest.raises(SystemExit) as left:
        foveate.cli.main(["export", str(shuffled), str(out), "--own-code", "--json"])
    done = json.loads(capsys.readouterr().out)
    assert left.value.code == 0 and done["own_code"] and done["gap"] < 1e-4
    code = (out / "modeling_foveate_llava.py").read_text()
    assert "import foveate" not in code and "from foveate" not in code
    assert json.loads((out / "config.json").read_text())["model_type"] == "foveate_llava"


def test_parts_of_plugins_cannot_be_exported(model: Path) -> None:
    class Other(MLPProjector):
        """Computes who knows what."""

    lmm, _ = load_lmm(model)
    assert not_stock(lmm) == not_exportable(lmm) == []
    lmm.projector = Other(MLPOptions(depth=2), 24, 32, (3, 3))
    assert not_exportable(lmm) == ["its projector is a Other, which is a plugin's"]
    assert set(not_exportable(lmm)) <= set(not_stock(lmm))


def test_an_encoder_without_blocks_is_refused(shared_corpus: Path, tmp_path: Path) -> None:
    parts = {"encoder": encoder("clip") | {"layer": 0}, "projector": MLP, "llm": llm("qwen2")}
    folder = random_model(tmp_path, shared_corpus, parts)
    for own_code in (False, True):
        with pytest.raises(ModelError, match=r"cannot be exported: its encoder has no block"):
            export_model(folder, tmp_path / "out", own_code=own_code)


def test_heads_of_objectives_stay_behind(
    shared_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the system message of a run is found, though its model does not carry it."""
    parts = {"encoder": encoder("siglip"), "projector": MLP, "llm": llm("qwen2")}
    content = recipe_dict(shared_corpus, output=str(tmp_path / "run"), model=parts, objectives={"noisy": {}})
    content["stages"][0] |= {"train": {"projector": 1e-2, "noisy": 1e-2}, "max_steps": 1, "system": "Be brief."}
    recipe = load_recipe(write_recipe(tmp_path, content), plugins=plugins_with({"noisy": Noisy}))
    run = train(recipe, display=Display(quiet=True)).folder
    with pytest.raises(SystemExit) as left:
        foveate.cli.main(["export", str(run), str(tmp_path / "out")])
    told = " ".join(capsys.readouterr().err.split())
    assert left.value.code == 0
    assert "a stock LlavaForConditionalGeneration" in told and "the heads of noisy" in told
    assert not any("noisy" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    said = processor.apply_chat_template([{"role": "user", "content": "Hello."}])
    assert said == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n"


def test_what_is_there_is_never_touched(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        export_model(model, out)
    assert [path.read_text() for path in out.iterdir()] == ["mine"]
    with pytest.raises(RunError, match="not empty"):
        export_model(model, out / "mine.txt")
    (out / "mine.txt").unlink()
    assert export_model(model, out, check=False).gap is None
    assert (out / "config.json").is_file()


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is no folder\. Give the folder that `foveate train` wrote"):
        export_model(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(RunError, match="neither a run nor a model folder"):
        export_model(tmp_path, tmp_path / "out")
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(RunError, match=r"has not finished\. Go on with it: foveate train .* --resume"):
        export_model(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more than `size` bytes into a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with files_of_at_most(50_000), pytest.raises(RunError, match=r"out cannot be written: File too large\. Free space"):
        export_model(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    if os.path.exists("/dev/full"):
        with pytest.raises(OSError, match="No space left"), disk_errors():
            train_tokenizer([], 300).backend_tokenizer.save("/dev/full")


def test_a_place_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written: Not a directory"):
        export_model(model, tmp_path / "file" / "out")
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(RunError, match="cannot be written: Permission denied"):
            export_model(model, tmp_path / "out")
        tmp_path.chmod(0o700)


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _weights(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


TAMPERED = {
    "other logits": lambda folder: _weights(folder, lambda state: state["multi_modal_projector.linear_2.bias"].add_(1)),
    "does not load the export whole": lambda folder: _weights(
        folder, lambda state: state.pop("language_model.model.norm.weight")
    ),
    "reads a conversation as": lambda folder: (folder / "chat_template.jinja").write_text(
        (folder / "chat_template.jinja").read_text().replace("<|im_end|>", "<|im_end|> ")
    ),
    "other pixels": lambda folder: _edit(
        folder / "processor_config.json",
        image_processor={**json.loads((folder / "preprocessor_config.json").read_text()), "resample": 2},
    ),
}


@pytest.mark.parametrize("message", TAMPERED)
def test_the_check_finds_what_is_wrong(model: Path, tmp_path: Path, message: str) -> None:
    out = export_model(model, tmp_path / "out").folder
    expected = expected_logits(*our_rules(model))
    assert check_export(out, LlavaForConditionalGeneration, expected) < 1e-4
    TAMPERED[message](out)
    with pytest.raises(ModelError, match=message):
        check_export(out, LlavaForConditionalGeneration, expected)
