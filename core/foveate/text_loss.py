"""The text loss: LM head and cross-entropy at supervised positions only, in chunks.

The logits of a step never exist together: each chunk's logits are made, turned into the loss and into the gradients of
states and head at once, and the next chunk takes their memory. Neither visual nor prompt tokens ever get logits.

Shapes: S supervised positions, C positions of a chunk, D width of the LLM, V size of the vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 25
"""Logits that exist at a time on a CPU, 128 MiB in fp32; eight times as many elsewhere. Each chunk passes over the head
and over its gradient once, which fewer positions would not pay for."""


def linear_cross_entropy(states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of ``states @ weight.T + bias`` against `targets`, and each of them.

    states `[S, D]`, weight `[V, D]`, bias `[V]` or None, targets `[S]` int64 → total (scalar) and `[S]` losses without
    a gradient. Under autocast the products run in its dtype; the softmax and all sums are in fp32, or fp64 where the
    states are.
    """
    device = states.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    total, losses = _LinearCrossEntropy.apply(states, weight, bias, targets, compute, torch.is_grad_enabled())
    return total, losses


def greedy_tokens(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The most likely next token after each state: `[S, D]` → `[S]` int64, chunked like the loss."""
    return torch.cat([F.linear(chunk, weight, bias).argmax(-1) for chunk in states.split(_chunk(states, weight))])


def _chunk(states: Tensor, weight: Tensor) -> int:
    """C: chunks of about the same size, as few as the limit allows."""
    elements = CHUNK_ELEMENTS if states.device.type == "cpu" else 8 * CHUNK_ELEMENTS
    most = max(elements // weight.shape[0], 16)
    count = max(math.ceil(states.shape[0] / most), 1)
    return max(math.ceil(states.shape[0] / count), 1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes loss and gradients in one pass over chunks; the backward only scales what is ready."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        compute: torch.dtype,
        learn: bool,
    ) -> tuple[Tensor, Tensor]:
        accumulate = torch.float64 if states.dtype is torch.float64 else torch.float32
        wants_states, wants_weight, wants_bias = (learn and wanted for wanted in ctx.needs_input_grad[:3])
        grad_states = torch.empty_like(states) if wants_states else None
        grad_weight = torch.empty_like(weight, dtype=accumulate) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=accumulate) if wants_bias and bias is not None else None
        losses = torch.empty(states.shape[0], dtype=accumulate, device=states.device)
        with torch.autocast(states.device.type, enabled=False):
            h_SD, w_VD, chunk = states.to(compute), weight.to(compute), _chunk(states, weight)
            memory = torch.empty(chunk, weight.shape[0], dtype=accumulate, device=states.device)
            half = memory if compute is accumulate else torch.empty_like(memory, dtype=compute)
            for start in range(0, states.shape[0], chunk):
                part = slice(start, start + chunk)
                h_CD, target_C = h_SD[part], targets[part, None]
                full_CV, half_CV = memory[: len(h_CD)], half[: len(h_CD)]
                torch.mm(h_CD, w_VD.T, out=half_CV)
                if half is not memory:
                    full_CV.copy_(half_CV)
                if bias is not None:
                    full_CV += bias.to(accumulate)
                loss_C = _softmax_(full_CV, target_C)
                losses[part] = loss_C
                # d loss / d logits = softmax - onehot: at the target p - 1, which is expm1(-loss)
                full_CV.scatter_(1, target_C, torch.expm1(-loss_C)[:, None])
                if grad_bias is not None:
                    grad_bias += full_CV.sum(0)
                if half is not memory:
                    half_CV.copy_(full_CV)
                if grad_states is not None:
                    grad_states[part] = half_CV @ w_VD
                if grad_weight is not None and half is memory:
                    torch.addmm(grad_weight, half_CV.T, h_CD, beta=min(start, 1), out=grad_weight)
                elif grad_weight is not None:
                    product_VD = half_CV.T @ h_CD
                    grad_weight = grad_weight.add_(product_VD) if start else grad_weight.copy_(product_VD)
        if grad_weight is not None and not states.shape[0]:
            grad_weight.zero_()
        ctx.save_for_backward(grad_states, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        if grad_states is not None:
            grad_states = grad_states * grad_total.to(grad_states.dtype)
        if grad_weight is not None:  # the largest tensor of the step: scaled where it stands when it is used last
            again = torch._C._autograd._get_current_graph_task_keep_graph()
            grad_weight = (grad_weight * grad_total if again else grad_weight.mul_(grad_total)).to(weight_dtype)
        if grad_bias is not None:
            grad_bias = (grad_bias * grad_total).to(bias_dtype)
        return grad_states, grad_weight, grad_bias, None, None, None


def _softmax_(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn logits `[C, V]` into probabilities where they stand; the cross-entropies `[C]` against targets `[C, 1]`.

    One fused pass; the log of the sum of exponentials is recovered at the largest logit, whose probability is at least
    1/V and cannot underflow.
    """
    top_C, aimed_C = logits.amax(-1), logits.gather(1, targets).squeeze(1)
    torch.softmax(logits, -1, out=logits)
    return top_C - logits.amax(-1).log() - aimed_C
