"""Attention over packed rows: samples lie end to end in one row and never see each other.

The function is registered in transformers' `AttentionInterface` under the name `foveate` and is told the boundaries
explicitly, by the keyword `segments` of the LLM's forward. Its cost is linear in the number of samples: no mask of the
whole row is ever made. Causal inside a segment, a sliding window is honoured, anything else that a model may ask of its
attention (soft-capping, sinks, biases) is refused rather than ignored.

Shapes: H query heads, K key heads, T tokens of the row, d width of a head.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from foveate.errors import ModelError

NAME = "foveate"
"""The attention implementation's name in transformers."""

_HARMLESS = {
    "position_ids", "position_embeddings", "cache_position", "use_cache", "past_key_values", "output_attentions",
    "output_hidden_states", "return_dict", "is_causal", "layer_idx",
}  # fmt: skip
"""Keywords that models pass along and that do not change what causal attention without a cache computes."""


@dataclass(frozen=True)
class Segments:
    """Where the samples of a packed row lie: their `lengths` in row order and `starts` `[n+1]` int32 on the device."""

    lengths: tuple[int, ...]
    starts: Tensor

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> Segments:
        starts = list(itertools.accumulate(lengths, initial=0))
        return cls(lengths, torch.tensor(starts, dtype=torch.int32, device=device))

    @property
    def longest(self) -> int:
        """At least the longest segment, rounded up to a power of two so that compiled code sees few values."""
        return 1 << max(max(self.lengths) - 1, 0).bit_length()

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Neighbours of equal length as (how many, length): each run is one batched attention call."""
        return [(len(list(group)), length) for length, group in itertools.groupby(self.lengths)]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment. query `[1, H, T, d]`, key and value `[1, K, T, d]` → `[1, T, H, d]`.

    Raises `ModelError` when the model asks for something that this function does not do, or gives no boundaries.
    """
    unknown = sorted(name for name, wish in others.items() if wish is not None and name not in _HARMLESS)
    if unknown or attention_mask is not None or not getattr(module, "is_causal", True):
        wish = ", ".join(unknown) or ("an attention mask" if attention_mask is not None else "bidirectional attention")
        raise ModelError(f"{type(module).__name__} asks its attention for {wish}, which packed rows do not support")
    if segments is None:
        raise ModelError(f"{type(module).__name__} does not hand the boundaries of packed samples to its attention")
    if query.shape[2] != segments_total(segments):
        raise ModelError(f"a row of {query.shape[2]} tokens came with segments of {segments_total(segments)} in total")
    if query.is_cuda and (half := _half_precision(query)) is not None:
        return _varlen(query.to(half), key.to(half), value.to(half), segments, scaling, sliding_window, dropout), None
    return _segmentwise(query, key, value, segments, scaling, sliding_window, dropout), None


def segments_total(segments: Segments) -> int:
    """Tokens of the row."""
    return sum(segments.lengths)


def _half_precision(query: Tensor) -> torch.dtype | None:
    """The 16-bit dtype in which attention runs, if it does."""
    if query.dtype in (torch.bfloat16, torch.float16):
        return query.dtype
    if query.dtype is torch.float32 and torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    return None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None, p: float
) -> Tensor:
    """Torch's variable-length attention: CUDA, 16 bit."""
    from torch.nn.attention.varlen import varlen_attn

    if p:
        raise ModelError("attention dropout is not available with packed rows on CUDA; set the LLM's to 0")
    q_THd, k_TKd, v_TKd = (x[0].transpose(0, 1) for x in (query, key, value))
    out_THd = varlen_attn(
        q_THd, k_TKd, v_TKd, segments.starts, segments.starts, segments.longest, segments.longest,
        scale=scaling, window_size=(window - 1 if window else -1, 0), enable_gqa=q_THd.shape[1] != k_TKd.shape[1],
    )  # fmt: skip
    assert isinstance(out_THd, Tensor)
    return out_THd[None]


@torch.compiler.disable
def _segmentwise(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None, p: float
) -> Tensor:
    """One `scaled_dot_product_attention` per run of equally long segments, on views of the row.

    The row is cut by `split`, whose backward is one concatenation; a slice a segment would make a gradient of the whole
    row for each of them.
    """
    runs = segments.runs
    cuts = [count * length for count, length in runs]
    outputs = []
    for (count, length), *parts in zip(runs, *(x[0].split(cuts, dim=1) for x in (query, key, value)), strict=True):
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in parts)
        mask = _band(length, window, query.device) if window is not None and length > window else None
        out = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=p, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).reshape(count * length, q.shape[1], v.shape[-1]))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]


@functools.lru_cache(maxsize=8)
def _band(length: int, window: int, device: torch.device) -> Tensor:
    """`[length, length]` bool: each token sees itself and the `window - 1` tokens before it."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)


AttentionInterface.register(NAME, packed_attention)
