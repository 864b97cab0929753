"""The LLM: any causal language model of transformers, run on packed rows through our attention function.

Shapes: T tokens of a packed row, S supervised positions, D width of the LLM, V size of the vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from foveate.errors import ModelError
from foveate.explain import closest
from foveate.model.attention import NAME, Segments
from foveate.model.encoder import DEEPEST, read_pretrained
from foveate.options import FolderOrId, Options


class LanguageModel(nn.Module, ABC):
    """Base of LLMs. `width` is D; parameters of the head belong to the LLM."""

    Options: type[Options] = Options
    width: int
    logit_scale: float = 1.0
    """Logits are ``logit_scale * states @ weight.T + bias``; not 1 for Granite or Cohere."""

    @abstractmethod
    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings: `[T]` int64 → `[T, D]`."""

    @abstractmethod
    def forward(self, embeds: Tensor, position_ids: Tensor, segments: Segments) -> Tensor:
        """States after the final norm: `[T, D]` → `[T, D]`; segments never see each other."""

    @abstractmethod
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[V, D]` and bias `[V]` (or None) that turn states into logits."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, first to last."""

    @abstractmethod
    def resize_vocabulary(self, size: int) -> None:
        """Give embeddings and head at least `size` rows."""

    @abstractmethod
    def portable_options(self) -> dict[str, Any]:
        """Options that rebuild this module without network and without weights."""


class TrainedTokenizer(Options):
    """A byte-level BPE tokenizer trained on the text of all stages of the recipe."""

    vocab_size: int = Field(4096, ge=300, description="Upper bound on tokens; small corpora need fewer.")


class TransformersLLMOptions(Options):
    """Any `AutoModelForCausalLM`, by hub id, local folder, or from scratch by `config`."""

    pretrained: FolderOrId | None = Field(None, description="Hub id or folder of the weights. Default: random ones.")
    revision: str = Field("main", description="Hub revision (branch, tag or commit) of `pretrained`.")
    config: dict[str, Any] | None = Field(
        None, description="The architecture: `model_type` and fields of its transformers config."
    )
    tokenizer: FolderOrId | TrainedTokenizer | None = Field(
        None,
        description="Hub id or folder of a tokenizer, or `{vocab_size: …}` to train one. Default: that of "
        "`pretrained`, or a trained one.",
    )
    trust_remote_code: bool = Field(False, description="Let transformers run code that comes with `pretrained`.")

    @model_validator(mode="after")
    def _something(self) -> TransformersLLMOptions:
        if self.pretrained is None and self.config is None:
            raise ValueError("give `pretrained` (hub id or folder), `config` (from scratch), or both")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs `model_type`, for example qwen2")
        return self


class TransformersLLM(LanguageModel):
    """A causal language model of transformers, body and head apart, so that only supervised positions get logits."""

    Options = TransformersLLMOptions

    def __init__(
        self, options: TransformersLLMOptions, vocab_size: int | None = None, load_weights: bool = True
    ) -> None:
        super().__init__()
        config = read_config(options)
        heads, shared = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
        if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
            raise ModelError(f"the LLM's num_attention_heads, {heads}, is no multiple of num_key_value_heads, {shared}")
        if (count := config.get_text_config().num_hidden_layers) > DEEPEST:
            raise ModelError(f"the LLM has {count} blocks; {DEEPEST} can be built at most")
        if vocab_size is not None and "vocab_size" not in (options.config or {}) and options.pretrained is None:
            config.vocab_size = vocab_size  # from scratch: as large as the tokenizer needs
        config.use_cache = False
        self.model: Any
        if load_weights and options.pretrained is not None:
            self.model, _ = read_pretrained(
                AutoModelForCausalLM, options.pretrained, config=config, revision=options.revision,
                trust_remote_code=options.trust_remote_code,
            )  # fmt: skip
            self.model.float()
        else:
            self.model = AutoModelForCausalLM.from_config(config, trust_remote_code=options.trust_remote_code)
        if vocab_size is not None:
            self.resize_vocabulary(vocab_size)
        self._use_packed_attention()
        self.width = self.model.get_input_embeddings().embedding_dim
        scale = getattr(config, "logit_scale", None)
        self.logit_scale = scale if scale is not None else 1.0 / getattr(config, "logits_scaling", 1.0)

    def _use_packed_attention(self) -> None:
        try:
            self.model.set_attn_implementation(NAME)
        except ValueError as error:
            raise ModelError(
                f"{type(self.model).__name__} does not use transformers' attention interface, so it cannot keep packed "
                f"samples apart: {error}"
            ) from error

    @property
    def body(self) -> nn.Module:
        """The causal LM without its head."""
        return self.model.base_model

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(input_ids)

    def forward(self, embeds: Tensor, position_ids: Tensor, segments: Segments) -> Tensor:
        outputs = self.body(
            inputs_embeds=embeds[None], position_ids=position_ids[None], use_cache=False, segments=segments
        )
        return outputs.last_hidden_state[0]

    def head(self) -> tuple[Tensor, Tensor | None]:
        layer = self.model.get_output_embeddings()
        return layer.weight, getattr(layer, "bias", None)

    def blocks(self) -> list[nn.Module]:
        count = self.model.config.get_text_config().num_hidden_layers
        for module in self.body.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return list(module)
        raise ModelError(f"cannot find the {count} blocks of {type(self.model).__name__}")

    def resize_vocabulary(self, size: int) -> None:
        if size > self.model.get_input_embeddings().num_embeddings:
            self.model.resize_token_embeddings(size, pad_to_multiple_of=64, mean_resizing=False)

    def portable_options(self) -> dict[str, Any]:
        return {"config": {"model_type": self.model.config.model_type, **self.model.config.to_diff_dict()}}


def read_config(options: TransformersLLMOptions) -> PretrainedConfig:
    """The architecture, without weights. Raises `ModelError` when it can neither be read nor fetched."""
    try:
        if options.config is not None:
            fields, kind = dict(options.config), options.config["model_type"]
            if kind not in CONFIG_MAPPING:
                near = closest(str(kind), CONFIG_MAPPING)
                raise ValueError("transformers has none" + (f"; did you mean '{near}'?" if near else ""))
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        return AutoConfig.from_pretrained(
            str(options.pretrained), revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    except Exception as error:
        source, reason = options.config["model_type"] if options.config else options.pretrained, str(error).split()
        raise ModelError(
            f"cannot read the architecture of LLM {source!r}: {' '.join(reason)}. Check the name, use a local folder, "
            f"or a preset of registry.yaml, which carries its config"
        ) from error


@torch.no_grad()
def check_language_model(llm: LanguageModel, device: torch.device, wishes: bool = False) -> None:
    """Refuse an LLM that our packing or our head would compute wrongly. A few tokens; runs once at start-up.

    - Packed = separate: changing one sample must not change a single bit of its neighbour, whose states must equal
      those of a row of its own. Catches models that ignore the boundaries or the positions.
    - Our logits = the model's own: catches scaled, soft-capped or otherwise post-processed logits.
    - With `wishes` (of objectives, for the attention): in a block, the first state must depend on the last token.

    Raises `ModelError` that says what differs.
    """
    training = llm.training
    llm.eval()
    weight, bias = llm.head()
    ids = (torch.arange(24, device=device) * 7919 + 11) % weight.shape[0]
    first, second = ids[:5], ids[5:12]
    name = type(getattr(llm, "model", llm)).__name__

    def states(*samples: Tensor) -> Tensor:
        positions = torch.cat([torch.arange(len(sample), device=device) for sample in samples])
        segments = Segments.of(tuple(len(sample) for sample in samples), device)
        return llm(llm.embed(torch.cat(samples)), positions, segments)

    try:
        packed, alone = states(first, second)[5:], states(second)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise ModelError(f"{name} cannot compute anything with this config: {error}") from error
    if not torch.equal(packed, states(ids[12:17], second)[5:]):
        raise ModelError(f"{name} ignores the boundaries of packed samples: one sample's states depend on another's")
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(packed.dtype, 5e-2)
    gap = float((packed - alone).abs().max() / alone.abs().max().clamp_min(1e-30))
    if not gap <= tolerance:
        raise ModelError(f"{name} computes a packed sample differently from the same sample alone (by {gap:.1e})")
    if wishes:
        block = torch.ones(7, dtype=torch.int64)
        first_of = [
            llm(llm.embed(sample), torch.arange(7, device=device), Segments.of((7,), device, block))[0]
            for sample in (second, torch.cat([second[:-1], ids[12:13]]))
        ]
        if torch.equal(*first_of):
            raise ModelError(f"{name} ignores objectives' wishes for its attention; use those objectives with another")
    if isinstance(llm, TransformersLLM):
        ours = nn.functional.linear(alone * llm.logit_scale, weight, bias)
        theirs = llm.model(
            inputs_embeds=llm.embed(second)[None], position_ids=torch.arange(7, device=device)[None],
            use_cache=False, segments=Segments.of((7,), device),
        ).logits[0]  # fmt: skip
        gap = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
        if not gap <= tolerance:
            raise ModelError(f"{name} does more to its logits than a linear head (they differ by {gap:.1e})")
    llm.train(training)
