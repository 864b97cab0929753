"""LLM families on packed rows against the stock models on each sample alone, and those that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from foveate.errors import ModelError
from foveate.model.attention import Segments
from foveate.model.language import LanguageModel, TransformersLLM, TransformersLLMOptions, check_language_model

V = 101
LENGTHS = (3, 11, 11, 1, 17)
CPU = torch.device("cpu")

_TOKENS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
_SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **_TOKENS}
_MHA = {**_SIZE, "intermediate_size": 48}
_GQA = {**_MHA, "num_key_value_heads": 2}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_TOKENS}
_OPT = {**_SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}
_SCALES = {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {**_GQA, "model_type": "qwen2"},
    "qwen2, tied": {**_GQA, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**_GQA, "model_type": "qwen3", "head_dim": 8},
    "llama": {**_GQA, "model_type": "llama"},
    "mistral, window 4": {**_GQA, "model_type": "mistral", "sliding_window": 4, "head_dim": 8},
    "mistral, window 64": {**_GQA, "model_type": "mistral", "sliding_window": 64, "head_dim": 8},
    "phi3": {**_GQA, "model_type": "phi3"},
    "olmo2": {**_GQA, "model_type": "olmo2"},
    "granite": {**_GQA, **_SCALES, "model_type": "granite"},
    "gpt_neox": {**_MHA, "model_type": "gpt_neox"},
    "gpt2": {**_GPT2, "model_type": "gpt2"},
    "gemma": {**_GQA, "model_type": "gemma", "head_dim": 8},
    "opt": {**_OPT, "model_type": "opt"},
    "cohere, scaled logits": {**_GQA, "model_type": "cohere", "logit_scale": 0.25},
    "phi, head with bias": {**_MHA, "model_type": "phi"},
}

SUMS_IN_FP32 = {"gemma", "cohere, scaled logits"}
"""Families that apply the weights of their norms in fp32, whatever the model's dtype: so their gradients are summed."""

_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": ({**_GQA, "model_type": "gemma2", "head_dim": 8}, "Gemma2.*softcap.*not support"),
    "gpt_oss": ({**_GQA, **_EXPERTS, "model_type": "gpt_oss", "head_dim": 8}, "GptOss.*s_aux.*not support"),
    "mamba": (
        {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": V, "state_size": 4},
        "Mamba.*ignores the boundaries",
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(config: dict[str, Any]) -> TransformersLLM:
    return TransformersLLM(TransformersLLMOptions(config=config)).double()


def stock(config: dict[str, Any], llm: TransformersLLM) -> nn.Module:
    """The stock model with its own SDPA attention and the same weights."""
    fields = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **fields), attn_implementation="sdpa"
    )
    model.double().load_state_dict(llm.model.state_dict())
    return model.train(llm.training)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_logits_and_gradients_equal_the_stock_model_on_each_sample(family: str) -> None:
    llm = build(FAMILIES[family]).eval()
    check_language_model(llm, CPU)
    model = stock(FAMILIES[family], llm)
    samples = [torch.randint(V, (length,)) for length in LENGTHS]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    packed = llm(llm.embed(torch.cat(samples)), positions, Segments.of(LENGTHS, CPU))
    logits = nn.functional.linear(packed * llm.logit_scale, *llm.head())
    theirs = [model(input_ids=sample[None], use_cache=False, output_hidden_states=True) for sample in samples]
    states = torch.cat([out.hidden_states[-1][0] for out in theirs])
    torch.testing.assert_close(packed, states, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(logits, torch.cat([out.logits[0] for out in theirs]), atol=1e-9, rtol=1e-9)

    wish = torch.randn_like(packed)
    (packed * wish).sum().backward()
    (states * wish).sum().backward()
    stock_gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in llm.model.named_parameters():
        expected = stock_gradients[name]
        assert (parameter.grad is None) == (expected is None), name
        if expected is not None:
            scale = max(float(expected.abs().max()), 1e-3)
            tolerance = 1e-5 if family in SUMS_IN_FP32 else 1e-9
            torch.testing.assert_close(parameter.grad, expected, atol=tolerance * scale, rtol=tolerance, msg=name)


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot_be_packed_are_refused(family: str) -> None:
    config, said = REFUSED[family]
    llm = build(config)
    if family == "gpt_oss":
        llm = llm.float()  # its grouped products know no float64
    with pytest.raises(ModelError, match=said):
        check_language_model(llm, CPU)


def test_a_family_whose_attention_cannot_be_set_is_refused_where_it_matters() -> None:
    """transformers 5.23 lets Falcon's packed samples mix; 5.24 keeps them apart by itself, and knows no wishes."""
    with pytest.raises(ModelError, match=r"Falcon.*ignores (the boundaries|objectives' wishes)"):
        check_language_model(build({**_SIZE, "model_type": "falcon"}), CPU, wishes=True)


class Toy(LanguageModel):
    """A causal LLM that is no transformers model: running sums of a linear map, if `honest` restarted at boundaries."""

    def __init__(self, honest: bool, uses_positions: bool = True, reads_row: bool = False) -> None:
        super().__init__()
        self.table, self.map = nn.Embedding(V, 8), nn.Linear(8, 8)
        self.width, self.honest, self.uses_positions, self.reads_row = 8, honest, uses_positions, reads_row
        self.double()

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)

    def forward(self, embeds: Tensor, position_ids: Tensor, segments: Segments) -> Tensor:
        if not self.uses_positions:
            position_ids = torch.arange(len(embeds))
        x = self.map(embeds) + position_ids[:, None] / 50
        if self.reads_row:
            x = x * len(embeds)
        parts = x.split(list(segments.lengths)) if self.honest else [x]
        return torch.cat([part.cumsum(0) for part in parts])

    def head(self) -> tuple[Tensor, Tensor | None]:
        return self.table.weight, None

    def blocks(self) -> list[nn.Module]:
        return [self.map]

    def resize_vocabulary(self, size: int) -> None: ...

    def portable_options(self) -> dict[str, Any]:
        return {}


def test_any_llm_that_honours_the_boundaries_passes() -> None:
    check_language_model(Toy(honest=True), CPU)


@pytest.mark.parametrize(
    ("llm", "said"),
    [
        (lambda: Toy(honest=False), "Toy ignores the boundaries"),
        (lambda: Toy(honest=True, uses_positions=False), "Toy computes a packed sample differently"),
        (lambda: Toy(honest=True, reads_row=True), "Toy computes a packed sample differently"),
    ],
    ids=["boundaries", "positions", "row"],
)
def test_a_plugins_llm_that_mixes_samples_is_refused(llm: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        check_language_model(llm(), CPU)


def test_a_head_that_does_more_than_a_product_is_refused() -> None:
    llm = build(FAMILIES["cohere, scaled logits"])
    llm.logit_scale = 1.0
    with pytest.raises(ModelError, match=r"Cohere.* does more to its logits"):
        check_language_model(llm, CPU)


def test_the_check_leaves_the_mode_alone_and_dropout_out() -> None:
    llm = build({**FAMILIES["gpt2"], "attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5})
    check_language_model(llm.train(), CPU)
    assert llm.training and llm.model.training
    check_language_model(llm.eval(), CPU)
    assert not llm.training


def test_check_in_single_precision() -> None:
    check_language_model(build(FAMILIES["llama"]).float(), CPU)


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "gpt2", "opt"])
def test_blocks_are_those_that_run(family: str) -> None:
    llm = build(FAMILIES[family])
    seen: list[nn.Module] = []
    for block in llm.blocks():
        block.register_forward_hook(lambda module, *_: seen.append(module))
    llm(llm.embed(torch.arange(5)), torch.arange(5), Segments.of((5,), CPU))
    assert seen == llm.blocks() and len(seen) == 2


@pytest.mark.parametrize("tied", [False, True])
def test_a_larger_vocabulary_keeps_what_was_learned(tied: bool) -> None:
    llm = build({**FAMILIES["qwen2"], "tie_word_embeddings": tied})
    table, head = llm.embed(torch.arange(V)).detach().clone(), llm.head()[0].detach().clone()
    llm.resize_vocabulary(V - 1)
    assert len(llm.head()[0]) == V
    llm.resize_vocabulary(V + 5)
    assert len(llm.head()[0]) >= V + 5 and llm.embed(torch.tensor([V + 4])).shape == (1, 32)
    assert torch.equal(llm.embed(torch.arange(V)), table) and torch.equal(llm.head()[0][:V], head)
    assert (llm.head()[0] is llm.model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("family", FAMILIES)
def test_portable_options_rebuild_the_model(family: str) -> None:
    llm = build(FAMILIES[family])
    again = TransformersLLM(TransformersLLMOptions(**llm.portable_options()), load_weights=False).double()
    again.load_state_dict(llm.state_dict())
    row, positions, segments = torch.arange(7), torch.arange(7), Segments.of((7,), CPU)
    llm.eval(), again.eval()
    assert torch.equal(llm(llm.embed(row), positions, segments), again(again.embed(row), positions, segments))
    assert again.logit_scale == llm.logit_scale


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give `pretrained`"),
        ({"config": {"hidden_size": 8}}, "needs `model_type`"),
        ({"config": {"model_type": "qwen2"}, "depth": 2}, "depth"),
        ({"pretrained": "/no/such/folder"}, "no such folder: /no/such/folder"),
    ],
)
def test_options_that_make_no_model(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TransformersLLMOptions(**options)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    for options in ({"config": {"model_type": "qwen-two"}}, {"pretrained": str(tmp_path)}):
        with pytest.raises(ModelError, match=rf"qwen-two|{tmp_path}"):
            TransformersLLM(TransformersLLMOptions.model_validate(options))
