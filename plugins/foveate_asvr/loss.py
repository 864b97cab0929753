"""Cross-entropies of residual codes in little memory, which does not grow with the number of visual tokens.

What the backward needs of few visual tokens is kept until then, and each parameter's gradient is added at once to what
is there. Of many, it would be larger than the head: they are taken chunk by chunk, in which head and cross-entropies
run and the gradients of states and head are taken at once; the next chunk takes the memory. The backward then only
scales what is ready, so nothing is computed twice.

Shapes: R visual tokens, D width of the LLM, Q depths, K codes of a codebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from foveate_asvr.head import CodeHead, DepthLayer, DepthTransformer
from foveate_asvr.quantizer import ResidualQuantizer, check_codes

CHUNK_BYTES = 1 << 28
"""What a chunk may keep on a CPU however small the head is; four times as much on a GPU."""


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
    what memory allows. Raises `ModelError` for codes that the head does not know.
    """
    check_codes(codes, head.size)
    run, size = _Run(head, codes, quantizer, weights, half), chunk or chunk_rows(head, states, half)
    parts = [slice(start, start + size) for start in range(0, len(states), size)]
    # also where there is no row, so that every parameter has a gradient on every process
    return CodeLosses(*(run.in_chunks(parts, states) if len(parts) > 1 else run.losses(slice(None), states)))


def chunk_rows(head: CodeHead, states: Tensor, half: bool = False) -> int:
    """Tokens of a chunk: all, if they keep no more bytes than the head has; else chunks that keep half as many.

    Each chunk passes over all gradients of the head once, which smaller ones would not pay for.
    """
    full, product = states.element_size(), 2 if half else states.element_size()
    each = head.width * full + (head.size * product if half else 0)
    for layer in head.layers if isinstance(head, DepthTransformer) else ():
        assert isinstance(layer, DepthLayer)
        each += 2 * head.width * full + (3 * head.width + layer.up.weight.shape[2]) * product
    each = each * head.depth + head.size * full  # the logits of one depth
    size, rows = sum(parameter.nbytes for parameter in head.parameters()), max(len(states), 1)
    room = max(size // 2, (4 if states.device.type == "cuda" else 1) * CHUNK_BYTES)
    if rows * each <= max(size, room):
        return rows
    count = -(-rows // max(room // each, 64))
    return -(-rows // count)  # of about the same size


@dataclass(frozen=True)
class _Run:
    """What is the same for all chunks."""

    head: CodeHead
    codes: Tensor
    quantizer: ResidualQuantizer
    weights: Tensor
    half: bool

    def losses(
        self, part: slice, states: Tensor, parameters: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of one chunk: weighted sum, sums of cross-entropies `[Q]`, sums of hits `[Q]`; with other `parameters`."""
        given = states, self.codes[part], self.quantizer
        with torch.autocast(states.device.type, torch.bfloat16, enabled=self.half):
            losses, hits = functional_call(self.head, dict(parameters or {}), given)
        return (losses * self.weights.to(losses)).sum(), losses.detach(), hits

    def in_chunks(self, parts: list[slice], states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of all chunks, one after the other; where gradients are wanted, they are ready then."""
        own = {name: value for name, value in self.head.named_parameters() if value.requires_grad}
        leaves = {name: value.detach().requires_grad_() for name, value in own.items()}
        learn = torch.is_grad_enabled()
        ready = torch.zeros_like(states) if states.requires_grad and learn else None
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for part in parts:
            chunk = states[part].detach().requires_grad_(ready is not None)
            total, losses, hits = self.losses(part, chunk, leaves)
            if total.requires_grad:
                total.backward()  # adds to the gradients of the leaves, one after the other
            if ready is not None and chunk.grad is not None:
                ready[part] = chunk.grad
            found.append((total.detach(), losses, hits))
        total, losses, hits = (torch.stack(sums).sum(0) for sums in zip(*found, strict=True))
        grads = [(value, leaves[name].grad) for name, value in own.items()] + [(states, ready)]
        return sum((_Ready.apply(total, *pair) for pair in grads if pair[1] is not None), total), losses, hits


class _Ready(torch.autograd.Function):
    """0, with the gradient of a loss with respect to one tensor.

    One of these for each tensor: a backward runs only those that it needs.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, tensor: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return torch.zeros_like(total)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        factor = factor.to(grad.dtype)
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        # the head's are the largest tensors of the step: scaled where they stand when they are used last
        return None, grad * factor if again else grad.mul_(factor), None
