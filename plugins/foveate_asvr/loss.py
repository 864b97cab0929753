"""Cross-entropies of residual codes, chunk by chunk: neither logits nor activations of all tokens ever exist together.

For each chunk of visual tokens, head and cross-entropies run, and the gradients of states and head are taken at once;
the next chunk takes the memory. The backward only scales what is ready, so nothing is computed twice.

Shapes: R visual tokens, D width of the LLM, Q depths, K codes of a codebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from foveate_asvr.head import CodeHead, DepthTransformer
from foveate_asvr.quantizer import ResidualQuantizer, check_codes

CHUNK_ELEMENTS = 1 << 28
"""Activations and logits that exist at a time on a CPU, 1 GiB in fp32; four times as many on a GPU. Each chunk passes
over all gradients of the head once, which smaller ones would not pay for."""


@dataclass(frozen=True)
class CodeLosses:
    """`total`: the sum over tokens of the weighted mean over depths, with its gradient.

    By depth, `[Q]` each, without: `cross_entropies`, and `hits`, how often the likeliest code was the right one.
    """

    total: Tensor
    cross_entropies: Tensor
    hits: Tensor


def code_losses(
    head: CodeHead, states: Tensor, codes: Tensor, quantizer: ResidualQuantizer, weights: Tensor, half: bool = False,
    chunk: int | None = None,
) -> CodeLosses:  # fmt: skip
    """Losses of states `[R, D]` against codes `[R, Q]` int64; `weights` `[Q]` sum to 1.

    `half`: matrix products in bf16; softmax and sums are in the states' dtype. `chunk`: tokens of a chunk; default:
    what memory allows. The backward may run once. Raises `ModelError` for codes that the head does not know.
    """
    check_codes(codes, head.size)
    rows = chunk or chunk_rows(head, states)
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    run = _Run(head, codes, quantizer, weights, half, rows)
    if torch.is_grad_enabled() and (parameters or states.requires_grad):
        return CodeLosses(*_InChunks.apply(run, states, *parameters))
    parts = [run.losses(part, states[part]) for part in run.parts(len(states))]
    return CodeLosses(*(torch.stack(sums).sum(0) for sums in zip(*parts, strict=True)))


def chunk_rows(head: CodeHead, states: Tensor) -> int:
    """Tokens of a chunk: chunks of about the same size, as few as the limit allows."""
    layers = len(head.layers) if isinstance(head, DepthTransformer) else 0
    each = head.depth * (3 * head.size + 14 * head.width * layers)  # logits, softmax, gradient; a layer's activations
    elements = (4 if states.device.type == "cuda" else 1) * CHUNK_ELEMENTS
    most = max(elements // each, 64)
    count = max(-(-len(states) // most), 1)
    return max(-(-len(states) // count), 1)


@dataclass(frozen=True)
class _Run:
    """What a chunk needs beside states and parameters."""

    head: CodeHead
    codes: Tensor
    quantizer: ResidualQuantizer
    weights: Tensor
    half: bool
    chunk: int

    def parts(self, rows: int) -> list[slice]:
        """The chunks; one even without rows, so that every parameter has a gradient on every process."""
        return [slice(start, start + self.chunk) for start in range(0, max(rows, 1), self.chunk)]

    def losses(
        self, part: slice, states: Tensor, parameters: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of one chunk: weighted sum, sums of cross-entropies `[Q]`, sums of hits `[Q]`; with other `parameters`."""
        given = states, self.codes[part], self.quantizer
        with torch.autocast(states.device.type, torch.bfloat16, enabled=self.half):
            losses, hits = functional_call(self.head, dict(parameters or {}), given)
        return (losses * self.weights.to(losses)).sum(), losses.detach(), hits


class _InChunks(torch.autograd.Function):
    """Losses and gradients of all chunks, one after the other, in the forward."""

    @staticmethod
    def forward(ctx: Any, run: _Run, states: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad_states = torch.zeros_like(states) if ctx.needs_input_grad[1] else None
        own = run.head.named_parameters()
        leaves = {name: value.detach().requires_grad_(value.requires_grad) for name, value in own}
        sums: list[tuple[Tensor, Tensor, Tensor]] = []
        for part in run.parts(len(states)):
            with torch.enable_grad():
                chunk = states[part].detach().requires_grad_(grad_states is not None)
                total, losses, hits = run.losses(part, chunk, leaves)
            if total.requires_grad:
                total.backward()  # adds to the gradients of the leaves, one after the other
            sums.append((total.detach(), losses, hits))
            if grad_states is not None and chunk.grad is not None:
                grad_states[part] = chunk.grad
        ctx.save_for_backward(grad_states, *(leaf.grad for leaf in leaves.values() if leaf.requires_grad))
        total, losses, hits = (torch.stack(each).sum(0) for each in zip(*sums, strict=True))
        ctx.mark_non_differentiable(losses, hits)
        return total, losses, hits

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # the largest tensors of the step: scaled where they stand, they are used once
        scaled = [None if grad is None else grad.mul_(grad_total.to(grad.dtype)) for grad in ctx.saved_tensors]
        return None, *scaled
