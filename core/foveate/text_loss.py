"""The text loss: LM head and cross-entropy at supervised positions only, in chunks.

The logits of a step never exist together: each chunk's logits are made, turned into the loss and into the gradients of
states and head at once, and dropped. Neither visual nor prompt tokens ever get logits.

Shapes: S supervised positions, D width of the LLM, V size of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 23
"""Logits that exist at a time: 32 MiB in fp32, small enough for a CPU's last cache and a GPU's full speed."""


def linear_cross_entropy(states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of ``states @ weight.T + bias`` against `targets`, and each of them.

    states `[S, D]`, weight `[V, D]`, bias `[V]` or None, targets `[S]` int64 → total (scalar) and `[S]` losses without
    a gradient. Under autocast the products run in its dtype; the softmax and all sums are in fp32, or fp64 where the
    states are.
    """
    device = states.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    total, losses = _LinearCrossEntropy.apply(states, weight, bias, targets, compute)
    return total, losses


def greedy_tokens(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The most likely next token after each state: `[S, D]` → `[S]` int64, chunked like the loss."""
    return torch.cat(
        [F.linear(chunk, weight, bias).argmax(-1) for chunk in states.split(_chunk(weight))]
        or [torch.empty(0, dtype=torch.long, device=states.device)]
    )


def _chunk(weight: Tensor) -> int:
    return max(CHUNK_ELEMENTS // weight.shape[0], 16)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes loss and gradients in one pass over chunks; the backward only scales what is ready."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, compute: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        accumulate = torch.float64 if states.dtype is torch.float64 else torch.float32
        wants_states, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        grad_states = torch.empty_like(states) if wants_states else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias, dtype=accumulate) if wants_bias and bias is not None else None
        losses = torch.empty(states.shape[0], dtype=accumulate, device=states.device)
        with torch.autocast(states.device.type, enabled=False):
            h_SD, w_VD = states.to(compute), weight.to(compute)
            for start in range(0, states.shape[0], _chunk(weight)):
                part = slice(start, start + _chunk(weight))
                h_CD, target_C = h_SD[part], targets[part, None]
                logits_CV = F.linear(h_CD, w_VD).to(accumulate)
                if bias is not None:
                    logits_CV += bias.to(accumulate)
                lse_C = logits_CV.logsumexp(-1, keepdim=True)
                losses[part] = (lse_C - logits_CV.gather(1, target_C)).squeeze(1)
                if not any(ctx.needs_input_grad):
                    continue
                # d loss / d logits = softmax - onehot, in the logits' own memory
                grad_CV = logits_CV.sub_(lse_C).exp_()
                grad_CV.scatter_add_(1, target_C, grad_CV.new_full(target_C.shape, -1.0))
                if grad_bias is not None:
                    grad_bias += grad_CV.sum(0)
                grad_CV = grad_CV.to(compute)
                if grad_states is not None:
                    grad_states[part] = grad_CV @ w_VD
                if wants_weight:
                    if grad_weight is None:
                        grad_weight = (grad_CV.T @ h_CD).to(accumulate)
                    elif compute is accumulate:
                        grad_weight.addmm_(grad_CV.T, h_CD)
                    else:
                        grad_weight += grad_CV.T @ h_CD
        if wants_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight, dtype=accumulate)
        ctx.save_for_backward(grad_states, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        total = losses.sum()
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_states, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        if grad_states is not None:
            grad_states = grad_states * grad_total.to(grad_states.dtype)
        if grad_weight is not None:  # the largest tensor of the step: scaled where it stands, it is used once
            grad_weight = grad_weight.mul_(grad_total).to(weight_dtype)
        if grad_bias is not None:
            grad_bias = (grad_bias * grad_total).to(bias_dtype)
        return grad_states, grad_weight, grad_bias, None, None
