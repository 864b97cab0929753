"""Heads that predict the residual codes of each visual token from an LLM state: a depth transformer, or a linear map.

p(q_1, …, q_Q | state) = prod_d p(q_d | state, q_1 … q_{d-1}): for each visual token by itself, the depth transformer
reads a sequence of length Q, the projected state and then the sums of the codebooks' vectors of the codes so far, and
has a feed-forward and a classifier of its own for each depth (arXiv 2506.09040, after DualToken).

Shapes: R visual tokens, D width of the LLM, E width of the head, F of its feed-forwards, Q depths, K codes of a
codebook, C width of their vectors. Depth comes first, so that a product for each depth is one batched product.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from foveate import Options
from foveate_asvr.blocks import EPSILON, attention, cross_entropy, feed_forward
from foveate_asvr.quantizer import ResidualQuantizer

FIRST_LOGITS = 0.2
"""Deviation of the logits at the start, so that the first loss is ln K + 0.02."""


class DepthHeadOptions(Options):
    """A transformer over the depths of each visual token, with teacher forcing."""

    type: Literal["depth_transformer"] = Field("depth_transformer", description="Which head.")
    width: int = Field(2048, gt=0, description="Width of the state projector and of the transformer.")
    layers: int = Field(3, gt=0, description="Layers of the transformer.")
    heads: int = Field(16, gt=0, description="Attention heads of a layer; they divide `width`.")
    expansion: float = Field(2.0, gt=0, description="Width of the feed-forwards over `width`.")
    residual: Literal["standard", "released"] = Field(
        "standard", description="`standard`: x + ffn(norm(x)). `released`, the code's: norm(x) + ffn(norm(x))."
    )  # fmt: skip
    ffn_init: Literal["depth", "released"] = Field(
        "depth", description="Fan-in of the feed-forwards' first weights: that of a depth, or, as in the released "
        "code, that of all depths together, which makes them about sqrt(Q) too small."
    )  # fmt: skip

    @model_validator(mode="after")
    def _check(self) -> DepthHeadOptions:
        if self.width % self.heads:
            raise ValueError(f"`heads` must divide `width`: {self.heads} do not divide {self.width}")
        return self


class LinearHeadOptions(Options):
    """A linear map of the state for each depth: cheap, and the depths are independent of each other."""

    type: Literal["linear"] = Field(description="Which head.")


def _named(value: Any) -> Any:
    if isinstance(value, str):
        return {"type": value}
    return {"type": "depth_transformer", **value} if isinstance(value, dict) else value


HeadOptions = Annotated[
    Annotated[DepthHeadOptions | LinearHeadOptions, Field(discriminator="type")], BeforeValidator(_named)
]
"""A head by its name, or `type` (default `depth_transformer`) and its options."""


class CodeHead(nn.Module):
    """Base of heads: `rows` of every depth, a norm, and a classifier for each depth."""

    norm: nn.RMSNorm

    def __init__(self, depth: int, size: int, inner: int):
        super().__init__()
        self.depth, self.size, self.width = depth, size, inner
        self.classifiers = nn.ModuleList(nn.Linear(inner, size, bias=False) for _ in range(depth))
        for classifier in self.classifiers.children():
            nn.init.normal_(classifier.get_parameter("weight"), std=FIRST_LOGITS * inner**-0.5)

    @abstractmethod
    def rows(self, states: Tensor, sums: Tensor) -> Sequence[Tensor]:
        """States `[R, D]` and sums of vectors up to each depth, `[q, R, C]` → q+1 of `[R, E]`; q < Q."""

    def each_depth(self, states: Tensor, codes: Tensor, quantizer: ResidualQuantizer) -> Iterator[Tensor]:
        """Logits `[R, K]` of one depth after the other, the codes `[R, Q]` of those before it being known."""
        for rows, classifier in self._classified(states, codes, quantizer):
            yield classifier(self.norm(rows))

    def forward(self, states: Tensor, codes: Tensor, quantizer: ResidualQuantizer) -> tuple[Tensor, Tensor]:
        """Sums over tokens by depth, `[Q]`: of the cross-entropies, and of how often the likeliest code is right."""
        losses, hits = list[Tensor](), list[Tensor]()
        for (rows, classifier), wanted in zip(self._classified(states, codes, quantizer), codes.unbind(1), strict=True):
            loss, right = cross_entropy(rows, self.norm.weight, classifier.weight, wanted)
            losses.append(loss)
            hits.append(right)
        return torch.stack(losses), torch.stack(hits)

    def _classified(
        self, states: Tensor, codes: Tensor, quantizer: ResidualQuantizer
    ) -> Iterator[tuple[Tensor, nn.Linear]]:
        sums = quantizer.partial_sums(codes[:, : self.depth - 1]).to(states.dtype)
        for rows, classifier in zip(self.rows(states, sums), self.classifiers, strict=True):
            assert isinstance(classifier, nn.Linear)
            yield rows, classifier

    def logits(self, states: Tensor, codes: Tensor, quantizer: ResidualQuantizer) -> Tensor:
        """All of them, `[R, Q, K]`: for inspection; training never makes them."""
        return torch.stack(list(self.each_depth(states, codes, quantizer)), 1)

    @torch.no_grad()
    def greedy(self, states: Tensor, quantizer: ResidualQuantizer) -> Tensor:
        """The likeliest code of each depth, given those chosen before it: `[R, D]` → `[R, Q]`."""
        codes = torch.zeros(len(states), 0, dtype=torch.int64, device=states.device)
        for depth, classifier in enumerate(self.classifiers):
            sums = quantizer.partial_sums(codes).to(states.dtype)
            chosen = classifier(self.norm(self.rows(states, sums)[depth])).argmax(1)
            codes = torch.cat([codes, chosen[:, None]], 1)
        return codes


class PerDepth(nn.Module):
    """Weights `[Q, in, out]` of a linear map for each depth, first uniform in 1/sqrt(`fan_in`) as `nn.Linear`'s."""

    def __init__(self, depth: int, inner: int, outer: int, fan_in: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(depth, inner, outer))
        nn.init.uniform_(self.weight, -(fan_in**-0.5), fan_in**-0.5)


class LinearHead(CodeHead):
    """logits_d = W_d norm(state)."""

    def __init__(self, states: int, depth: int, size: int):
        super().__init__(depth, size, states)
        self.norm = nn.RMSNorm(states, eps=EPSILON)

    def rows(self, states: Tensor, sums: Tensor) -> Sequence[Tensor]:
        return [states] * (len(sums) + 1)


class DepthTransformer(CodeHead):
    """State projector D → E → E, layers of attention over the depths, feed-forward and classifier for each depth."""

    def __init__(self, options: DepthHeadOptions, states: int, vectors: int, depth: int, size: int):
        super().__init__(depth, size, options.width)
        width = options.width
        self.projector = nn.Sequential(nn.Linear(states, width), nn.GELU(), nn.Linear(width, width))
        self.vectors = nn.Linear(vectors, width) if depth > 1 else None
        self.layers = nn.ModuleList(DepthLayer(options, depth) for _ in range(options.layers))
        self.norm = nn.RMSNorm(width, eps=EPSILON)

    def rows(self, states: Tensor, sums: Tensor) -> Sequence[Tensor]:
        inputs = [self.projector(states)[None]]
        if self.vectors is not None and len(sums):
            inputs.append(self.vectors(sums))
        rows = torch.cat(inputs).to(states.dtype)  # what adds up stays in full precision
        for layer in self.layers:
            rows = layer(rows)
        return rows.unbind()


class DepthLayer(nn.Module):
    """x + attention(norm(x)), causal over the depths of a visual token; then a feed-forward of each depth's own."""

    def __init__(self, options: DepthHeadOptions, depth: int):
        super().__init__()
        width, inner = options.width, round(options.width * options.expansion)
        scale = depth if options.ffn_init == "released" else 1
        self.heads, self.released = options.heads, options.residual == "released"
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width, eps=EPSILON), nn.RMSNorm(width, eps=EPSILON)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up = PerDepth(depth, width, inner, fan_in=width * scale)
        self.down = PerDepth(depth, inner, width, fan_in=inner * scale)

    def forward(self, rows: Tensor) -> Tensor:
        """`[q, R, E]` → `[q, R, E]`."""
        rows = attention(rows, self.attention_norm.weight, self.qkv.weight, self.out.weight, self.heads)
        return feed_forward(rows, self.ffn_norm.weight, self.up.weight, self.down.weight, self.released)


def make_head(options: Any, states: int, vectors: int, depth: int, size: int) -> CodeHead:
    """The head that options ask for; `states` is D, `vectors` C."""
    if isinstance(options, LinearHeadOptions):
        return LinearHead(states, depth, size)
    return DepthTransformer(options, states, vectors, depth, size)
