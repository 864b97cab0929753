"""Where a model may start from: a stock Llava folder, a run with another projector, an LLM's folder, timm, scratch."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration, PreTrainedTokenizerFast, Qwen2Config

import foveate.cli
from foveate.data.templates import template_source
from foveate.data.tokenizer import train_tokenizer
from foveate.data_room import DataRoom
from foveate.model.build import blueprint, load_lmm
from foveate.progress import Display
from foveate.recipe import Recipe
from foveate.recipe_file import load_recipe
from foveate.run import Run
from foveate.training import train
from foveate.types import IGNORE_INDEX, Batch
from tests.corpus import ENCODER, LLM, recipe_dict, write_recipe
from tests.models import IMAGE_TOKEN, VOCABULARY, saved_llava

ALL = {"encoder": 1e-3, "projector": 1e-3, "llm": 1e-3}


def recipe(folder: Path, corpus: Path, model: dict[str, Any], name: str = "recipe", **stage: Any) -> Recipe:
    folder.mkdir(exist_ok=True, parents=True)
    content = recipe_dict(corpus, output=str(folder / f"run-{name}"), model=model)
    content["stages"][0] |= {"max_steps": 2, **stage}
    return load_recipe(write_recipe(folder, content, f"{name}.yaml"))


def trained(loaded: Recipe) -> Run:
    return train(loaded, display=Display(quiet=True))


def small_tokenizer(size: int, image: str = "<image>") -> PreTrainedTokenizerFast:
    """At most `size` tokens: `image` is number 5, as a stock Llava's configuration says, then single characters."""
    names = ("<pad>", "<s>", "</s>", "<unk>", "<|im_end|>", image)
    special = [AddedToken(name, normalized=False, special=True) for name in names]
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    letters = sorted(string.ascii_letters + string.digits + ".,:?!'▁\n")
    options: dict[str, Any] = {"special_tokens": special, "initial_alphabet": letters, "show_progress": False}
    texts = ["Which digit? It is 4. Yes, quite sure. Say the word word word."] * 3
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **options))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template_source("vicuna")
    return tokenizer


def samples_of(batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Token ids, labels and pictures of each sample of a packed row."""
    labels = torch.full_like(batch.input_ids, IGNORE_INDEX)
    labels[batch.target_positions + 1] = batch.target_ids
    pictures = [
        batch.pixels[[row for row, image in enumerate(batch.images) if image.sample_id == name]]
        for name in batch.sample_ids
    ]
    pieces = [tensor.split(list(batch.lengths)) for tensor in (batch.input_ids, labels)]
    return list(zip(*pieces, pictures, strict=True))


@torch.no_grad()
def stock_loss(stock: LlavaForConditionalGeneration, loaded: Recipe) -> float:
    """What transformers computes for the first step's samples, each alone: the mean over supervised tokens."""
    room = DataRoom(loaded, blueprint(loaded.model))
    total, count = torch.zeros(()), 0
    for batch in next(iter(room.stage(loaded.stages[0]).steps())).batches:
        for ids, labels, pictures in samples_of(batch):
            logits = stock(input_ids=ids[None], pixel_values=pictures if len(pictures) else None).logits[0]
            total += torch.nn.functional.cross_entropy(
                logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum"
            )
            count += int((labels[1:] != IGNORE_INDEX).sum())
    assert count > 100
    return float(total / count)


@pytest.mark.parametrize(("vision", "llm"), [("clip", "llama"), ("siglip", "qwen2"), ("dinov2", "qwen2")])
@pytest.mark.parametrize("size", [VOCABULARY - 15, VOCABULARY])
def test_from_a_stock_llava_folder(vision: str, llm: str, size: int, tmp_path: Path, shared_corpus: Path) -> None:
    """The first loss is transformers' own; the model's vocabulary keeps its rows where the tokenizer has fewer."""
    stock = saved_llava(vision, llm, tmp_path / "llava")
    tokenizer = small_tokenizer(size)
    assert len(tokenizer) == size and tokenizer.convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    tokenizer.save_pretrained(tmp_path / "llava")
    loaded = recipe(tmp_path, shared_corpus, {"from": "llava"}, train=ALL)
    expected = stock_loss(stock, loaded)
    run = trained(loaded)
    first, second = (line["loss"] for line in run.metrics())
    assert first == pytest.approx(expected, rel=1e-5) and second != first
    lmm, plan = load_lmm(run.folder)
    assert lmm.llm.head()[0].shape[0] == VOCABULARY and plan.visual_grid() == (3, 3)


def test_a_tokenizer_without_image_token_makes_the_vocabulary_grow(tmp_path: Path, shared_corpus: Path) -> None:
    stock = saved_llava("clip", "qwen2", tmp_path / "llava")
    small_tokenizer(VOCABULARY, image="<other>").save_pretrained(tmp_path / "llava")
    run = trained(recipe(tmp_path, shared_corpus, {"from": "llava"}, train={"projector": 1e-3}))
    lmm, _ = load_lmm(run.folder)
    weight, _ = lmm.llm.head()
    assert len(run.metrics()) == 2 and weight.shape[0] > VOCABULARY
    assert torch.equal(weight[:VOCABULARY], stock.lm_head.weight)
    assert lmm.llm.embed(torch.tensor([VOCABULARY])).shape == (1, 32)


def test_a_folder_that_is_no_model_is_refused(
    tmp_path: Path, shared_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    err = refused(tmp_path, shared_corpus, {"from": "folder"}, capsys)
    assert f"{tmp_path / 'folder'} is neither a run, nor a model folder (foveate.json), nor a stock Llava" in err


def test_from_a_run_with_another_projector(tmp_path: Path, shared_corpus: Path) -> None:
    base = {"encoder": ENCODER, "projector": {"type": "mlp", "depth": 2}, "llm": LLM}
    first = trained(recipe(tmp_path, shared_corpus, base, "first", train=ALL))
    model = {"from": "run-first", "projector": {"type": "linear", "bias": False}}
    second = trained(recipe(tmp_path, shared_corpus, model, "second", train={"projector": 1e-3}))
    old, new = (load_lmm(run.folder)[0] for run in (first, second))
    ours = new.state_dict()
    assert {name for name in ours if name.startswith("projector.")} == {"projector.layers.0.weight"}
    kept = {name: tensor for name, tensor in old.state_dict().items() if not name.startswith("projector.")}
    assert kept and all(torch.equal(ours[name], tensor) for name, tensor in kept.items())
    files = [(run.folder / "model" / "tokenizer.json").read_text() for run in (first, second)]
    assert files[0] == files[1]
    third = trained(recipe(tmp_path, shared_corpus, {"from": "run-second"}, "third", train={"projector": 1e-3}))
    assert load_lmm(third.folder)[1].parts["projector"].type == "linear"


def test_an_llm_from_a_folder_beside_the_recipe_with_lora(
    tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`../llms/tiny` is read from the recipe's folder, wherever the command runs; adapters end up in the weights."""
    torch.manual_seed(0)
    fields = {key: value for key, value in LLM["config"].items() if key != "model_type"}  # type: ignore[attr-defined]
    stock = AutoModelForCausalLM.from_config(Qwen2Config(**fields, vocab_size=512))
    stock.save_pretrained(tmp_path / "llms" / "tiny")
    train_tokenizer(["Which digit? It is 4."], 400).save_pretrained(tmp_path / "llms" / "tiny")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = {"encoder": ENCODER, "projector": "mlp", "llm": {"pretrained": "../llms/tiny"}}
    rules = {"projector": 1e-3, "llm": {"lr": 1e-2, "lora": {"r": 2}}}
    loaded = recipe(tmp_path / "recipes", shared_corpus, model, train=rules)
    assert loaded.resolved()["model"]["llm"]["pretrained"] == str(tmp_path / "llms" / "tiny")
    run = trained(loaded)
    weights = load_lmm(run.folder)[0].llm.state_dict()
    before = stock.state_dict()
    assert {name.removeprefix("model.") for name in weights} == set(before)
    moved = {name for name, tensor in before.items() if not torch.equal(weights[f"model.{name}"], tensor)}
    assert moved == {name for name in before if "_proj.weight" in name}
    apart = {"config": LLM["config"], "tokenizer": "../llms/tiny"}
    other = trained(recipe(tmp_path / "recipes", shared_corpus, {**model, "llm": apart}, "apart", train=ALL))
    assert (other.folder / "model" / "tokenizer.json").read_text() == (
        (run.folder / "model" / "tokenizer.json").read_text()
    )


def refused(folder: Path, corpus: Path, model: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """Trains by the command what must be refused with exit status 2; returns its one error."""
    content = recipe_dict(corpus, output=str(folder / "run"), model=model)
    with pytest.raises(SystemExit) as leaving:
        foveate.cli.main(["train", str(write_recipe(folder, content))])
    err = capsys.readouterr().err
    assert leaving.value.code == 2 and "Traceback" not in err and err.count("error: ") == 1
    assert not (folder / "run").exists()
    return err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mamba", "state_size": 4}, "Mamba"),
        ({"model_type": "gemma2", "head_dim": 8, "num_key_value_heads": 1}, "softcap"),
        ({"model_type": "gpt99"}, "gpt99"),
    ],
)
def test_an_llm_family_that_would_be_computed_wrongly_is_refused(
    config: dict[str, Any], said: str, tmp_path: Path, shared_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    llm = {"config": {**size, **config}, "tokenizer": {"vocab_size": 400}}
    err = refused(tmp_path, shared_corpus, {"encoder": ENCODER, "projector": "mlp", "llm": llm}, capsys)
    assert said in err


@pytest.mark.parametrize(("content", "said"), [(None, "from safetensors only"), ("half", "lacks 1 weights")])
def test_an_llm_folder_without_all_its_weights_is_refused(
    content: str | None, said: str, tmp_path: Path, shared_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {key: value for key, value in LLM["config"].items() if key != "model_type"}  # type: ignore[attr-defined]
    AutoModelForCausalLM.from_config(Qwen2Config(**fields, vocab_size=512)).save_pretrained(tmp_path / "tiny")
    train_tokenizer(["Which digit?"], 300).save_pretrained(tmp_path / "tiny")
    file = tmp_path / "tiny" / "model.safetensors"
    if content:
        tensors = load_file(file)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, file, {"format": "pt"})
    else:
        file.rename(tmp_path / "tiny" / "pytorch_model.bin")
    llm = {"pretrained": "tiny"}
    err = refused(tmp_path, shared_corpus, {"encoder": ENCODER, "projector": "mlp", "llm": llm}, capsys)
    assert f"'{tmp_path / 'tiny'}'" in err and said in err


@pytest.mark.parametrize(("folder", "key"), [("./no-llm", "pretrained"), ("../no-tokenizer", "tokenizer")])
def test_a_folder_that_is_not_there_is_an_error_of_the_recipe(
    folder: str, key: str, tmp_path: Path, shared_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = {"config": LLM["config"], key: folder}
    err = refused(tmp_path, shared_corpus, {"encoder": ENCODER, "projector": "mlp", "llm": llm}, capsys)
    assert f"model.llm.{key}" in err and f"no such folder: {(tmp_path / folder).resolve()}" in err


TIMM = {
    "type": "timm", "name": "vit_tiny_patch16_224", "image_size": 32,
    "args": {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8},
}  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "grid"),
    [
        ({"projector": {"type": "pixel_shuffle_mlp", "factor": 2}}, [2, 2]),
        ({"projector": {"type": "linear", "normalize": True}}, [4, 4]),
        ({"encoder": TIMM}, [4, 4]),
        ({"encoder": TIMM, "projector": {"type": "pixel_shuffle_mlp", "factor": 4, "depth": 1}}, [1, 1]),
    ],
)
def test_other_encoders_and_projectors_train(
    parts: dict[str, Any], grid: list[int], tmp_path: Path, shared_corpus: Path
) -> None:
    model = {"encoder": ENCODER, "projector": "mlp", "llm": LLM, **parts}
    run = trained(recipe(tmp_path, shared_corpus, model, train=ALL))
    lines = run.metrics()
    assert len(lines) == 2 and lines[1]["loss"] != lines[0]["loss"] and lines[0]["grad_norm"] > 0
    assert json.loads((run.folder / "model" / "foveate.json").read_text())["visual_grid"] == grid
    lmm, plan = load_lmm(run.folder)
    assert plan.visual_grid() == tuple(grid)
    again = trained(recipe(tmp_path, shared_corpus, {"from": str(run.folder)}, "again", train={"llm": 1e-3}))
    kept = load_lmm(again.folder)[0].encoder.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in lmm.encoder.state_dict().items())
