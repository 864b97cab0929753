"""Attention over packed rows: samples lie end to end in one row and never see each other.

The function is registered in transformers' `AttentionInterface` under the name `foveate` and is told the boundaries
explicitly, by the keyword `segments` of the LLM's forward. Its cost is linear in the number of samples: no mask of the
whole row is ever made. Causal inside a segment, a sliding window is honoured, anything else that a model may ask of its
attention (soft-capping, sinks, biases) is refused rather than ignored.

Objectives may wish that some tokens also see what comes after them: `Segments` carries such blocks. Only the segments
that hold a block get a mask, made once a forward and shared by all layers.

Shapes: H query heads, K key heads, T tokens of the row, L tokens of one segment, d width of a head.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
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
    """Where the samples of a packed row lie: their `lengths` in row order and `starts` `[n+1]` int32 on the device.

    A token sees itself and what is before it in its segment. `blocks` `[T]` int64 adds: tokens of a segment with the
    same number, 0 apart, see each other in both directions. `groups` `[T]` int64 takes away: of its own block a token
    sees only group 0 and its own group. Both lie on the device; `blocked` says which segments hold a block, so that no
    layer has to ask the device. Made by `Segments.of`.
    """

    lengths: tuple[int, ...]
    starts: Tensor
    blocks: Tensor | None = None
    groups: Tensor | None = None
    blocked: tuple[bool, ...] = ()
    _masks: dict[int | None, list[Tensor | None]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls, lengths: tuple[int, ...], device: torch.device, blocks: Tensor | None = None, groups: Tensor | None = None
    ) -> Segments:
        """Segments of these lengths. `blocks` belong on the CPU (else they are copied there); `groups` anywhere.

        Raises `ModelError` where blocks or groups are not one integer a token, or groups come without blocks.
        """
        starts = list(itertools.accumulate(lengths, initial=0))
        starts_device = torch.tensor(starts, dtype=torch.int32, device=device)
        for name, numbers in (("blocks", blocks), ("groups", groups)):
            if numbers is not None and (numbers.shape != (starts[-1],) or numbers.dtype != torch.int64):
                found = f"{numbers.dtype} {list(numbers.shape)}"
                raise ModelError(f"attention {name} must be one int64 a token, [{starts[-1]}]; they are {found}")
        if blocks is None and groups is not None:
            raise ModelError("attention groups were given without the blocks that they divide")
        blocked = () if blocks is None else tuple(bool(part.any()) for part in blocks.cpu().split(lengths))
        if blocks is None or not any(blocked):
            return cls(lengths, starts_device)
        return cls(lengths, starts_device, blocks.to(device), None if groups is None else groups.to(device), blocked)

    @property
    def longest(self) -> int:
        """At least the longest segment, rounded up to a power of two so that compiled code sees few values."""
        return 1 << max(max(self.lengths) - 1, 0).bit_length()

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Neighbours of equal length as (how many, length): each run is one batched attention call.

        Segments with and without a block are never in one run, so that no sample's arithmetic depends on its neighbour.
        """
        alike = zip(self.lengths, self.blocked or (False,) * len(self.lengths), strict=True)
        return [(len(list(group)), length) for (length, _), group in itertools.groupby(alike)]

    def masks(self, window: int | None) -> list[Tensor | None]:
        """Who sees whom, one a run: `[count, 1, L, L]` or `[L, L]` bool, or None where plain causal attention does.

        With a sliding window a token sees only what is less than `window` tokens away, on either side. Made at the
        first call for a window and kept as long as the segments are.
        """
        if window not in self._masks:
            self._masks[window] = self._make_masks(window)
        return self._masks[window]

    def _make_masks(self, window: int | None) -> list[Tensor | None]:
        masks, start, first = list[Tensor | None](), 0, 0
        for count, length in self.runs:
            part = slice(start, start + count * length)
            if self.blocks is not None and self.blocked[first]:
                blocks = self.blocks[part].view(count, length)
                groups = None if self.groups is None else self.groups[part].view(count, length)
                masks.append(_block_mask(blocks, groups, window)[:, None])
            else:
                banded = window is not None and length > window
                masks.append(_band(length, window, self.starts.device) if banded else None)
            start, first = part.stop, first + count
        return masks


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
    """Attention inside each segment, causal but for the segments' blocks.

    query `[1, H, T, d]`, key and value `[1, K, T, d]` → `[1, T, H, d]`. Raises `ModelError` when the model asks for
    something that this function does not do, or gives no boundaries.
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
        query, key, value = query.to(half), key.to(half), value.to(half)
        if segments.blocks is None:
            return _varlen(query, key, value, segments, scaling, sliding_window, dropout), None
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
    """Torch's variable-length attention: CUDA, 16 bit, no blocks (it takes no mask)."""
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
    runs, masks = segments.runs, segments.masks(window)
    cuts = [count * length for count, length in runs]
    rows = (x[0].split(cuts, dim=1) for x in (query, key, value))
    outputs = []
    for (count, length), mask, *parts in zip(runs, masks, *rows, strict=True):
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in parts)
        if mask is not None and q.is_cuda and q.shape[1] != k.shape[1]:
            # CUDA's memory-efficient kernel takes a mask but no grouped heads; without it, scores are materialised
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
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


def _block_mask(blocks: Tensor, groups: Tensor | None, window: int | None) -> Tensor:
    """The rule of `Segments` for `count` segments: blocks and groups `[count, L]` → `[count, L, L]` bool."""
    length = blocks.shape[1]
    together = (blocks[:, :, None] == blocks[:, None, :]) & (blocks != 0)[:, :, None]
    mask = together | together.new_ones(length, length).tril()
    if groups is not None:
        closed = (groups[:, None, :] != 0) & (groups[:, :, None] != groups[:, None, :])
        mask &= ~(together & closed)
    if window is not None and length > window:
        mask &= mask.new_ones(length, length).triu(1 - window).tril(window - 1)
    return mask


def image_blocks(total: int, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Blocks for the wish `image_bidirectional`: `[total]` int64 on the CPU, n+1 on the n-th span (start, length).

    An empty span makes no block, wherever it starts. Raises `ModelError` where one leaves the row or two overlap.
    """
    blocks = torch.zeros(total, dtype=torch.int64)
    for number, (start, length) in enumerate(spans, start=1):
        if length == 0:
            continue
        part = blocks[start : start + length] if start >= 0 else blocks[:0]
        if length < 0 or len(part) != length:
            raise ModelError(f"tokens {start} to {start + length} of an image lie outside of their row of {total}")
        if part.any():
            raise ModelError(f"tokens {start} to {start + length} of an image overlap those of another")
        part.fill_(number)
    return blocks


def prefix_blocks(lengths: Sequence[int], prompts: Sequence[int]) -> Tensor:
    """Blocks for the wish `prefix_bidirectional`: `[T]` int64 on the CPU, number i+1 on sample i's first `prompts[i]`
    tokens.

    Raises `ModelError` where the samples differ in number, or a prompt is longer than its sample.
    """
    if len(lengths) != len(prompts):
        raise ModelError(f"{len(prompts)} prompts were given for {len(lengths)} samples")
    parts = [torch.zeros(0, dtype=torch.int64)]
    for number, (length, prompt) in enumerate(zip(lengths, prompts, strict=True), start=1):
        if not 0 <= prompt <= length:
            raise ModelError(f"sample {number - 1} of a row has a prompt of {prompt} tokens and a length of {length}")
        parts.append((torch.arange(length) < prompt).long() * number)
    return torch.cat(parts)


AttentionInterface.register(NAME, packed_attention)
