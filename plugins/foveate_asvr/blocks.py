"""The blocks of a head as autograd functions that keep little: attention over depths, feed-forwards, cross-entropy.

Each keeps its input and what its first product made. Norms, GELUs and attention weights are computed once more in the
backward, which costs no product of note. On a CPU they go through the depths one by one, so that what lies between two
products stays in the cache; on a GPU they take all depths at once. Matrix products are in the dtype of the autocast
that is on, or that of the rows; what adds up is in the dtype of the rows.

Shapes: R visual tokens, Q depths (q: those that are there), E width of the head, F of its feed-forwards, K codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6
"""Of all norms."""

ATTENTION_ELEMENTS = 1 << 19
"""Queries that are copied together on a CPU, 2 MiB in fp32: they and all made of them stay in the cache."""

ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Products in fp32 on a CPU are oneDNN's: torch's default there, MKL, uses half of the width of AVX-512 on AMD."""


def attention(rows: Tensor, norm: Tensor, qkv: Tensor, out: Tensor, heads: int) -> Tensor:
    """x + out(attention(qkv(norm(x)))), causal over the depths of each visual token: `[q, R, E]` → `[q, R, E]`.

    norm `[E]`, qkv `[3E, E]`, out `[E, E]`.
    """
    mixed: Tensor = _Attention.apply(rows, norm, qkv, out, heads, _product_dtype(rows))
    return mixed


def feed_forward(rows: Tensor, norm: Tensor, up: Tensor, down: Tensor, released: bool) -> Tensor:
    """x + gelu(norm(x) @ up) @ down, with weights of each depth's own: `[q, R, E]` → `[q, R, E]`.

    norm `[E]`, up `[Q, E, F]`, down `[Q, F, E]`. `released`: norm(x) in place of x.
    """
    dtype = _product_dtype(rows)
    inner = _Up.apply(rows, norm, up, dtype)
    added: Tensor = _Down.apply(_Normed.apply(rows, norm) if released else rows, inner, down, dtype)
    return added


def cross_entropy(rows: Tensor, norm: Tensor, weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of norm(x) @ weight.T against codes `[R]`, and how often the likeliest is right.

    rows `[R, E]`, norm `[E]`, weight `[K, E]`. The gradient of the logits takes their place at once.
    """
    loss, hits = _CrossEntropy.apply(rows, norm, weight, codes, _product_dtype(rows), torch.is_grad_enabled())
    return loss, hits


class _Up(torch.autograd.Function):
    """norm(x) @ up: a function of its own, as `_Down` is, so that the gradients of both never exist together."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, norm: Tensor, up: Tensor, dtype: torch.dtype) -> Tensor:
        inner = rows.new_empty(*rows.shape[:2], up.shape[2], dtype=dtype)
        with torch.autocast(rows.device.type, enabled=False):
            for part in _depths(rows):
                inner[part] = _product(_Norm(rows[part], norm)().to(dtype), up[part].to(dtype))
        ctx.save_for_backward(rows, norm, up)
        ctx.dtype = dtype
        return inner

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, norm, up = ctx.saved_tensors
        used, dtype = _used(ctx), ctx.dtype
        grad_rows, grad_norm = torch.empty_like(rows), torch.zeros_like(norm) if used[1] else None
        grad_up = _empty(up, len(rows)) if used[2] else None
        with torch.autocast(rows.device.type, enabled=False):
            for part in _depths(rows):
                normed = _Norm(rows[part], norm)
                if grad_up is not None:
                    grad_up[part] = _product(normed().to(dtype).mT, grad[part])
                before = _product(grad[part], up[part].to(dtype).mT).to(rows.dtype)
                grad_rows[part] = normed.backward(before, grad_norm)
        return grad_rows, grad_norm, grad_up, None


class _Down(torch.autograd.Function):
    """x + gelu(inner) @ down."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, inner: Tensor, down: Tensor, dtype: torch.dtype) -> Tensor:
        added = torch.empty_like(rows)
        with torch.autocast(rows.device.type, enabled=False):
            for part in _depths(rows):
                torch.add(rows[part], _product(F.gelu(inner[part]), down[part].to(dtype)), out=added[part])
        ctx.save_for_backward(inner, down)
        ctx.dtype = dtype
        return added

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inner, down = ctx.saved_tensors
        used, dtype = _used(ctx), ctx.dtype
        grad_inner, grad_down = _reused(inner), _empty(down, len(inner)) if used[2] else None
        with torch.autocast(grad.device.type, enabled=False):
            for part in _depths(grad):
                behind = grad[part].to(dtype)
                if grad_down is not None:
                    grad_down[part] = _product(F.gelu(inner[part]).mT, behind)
                before = _product(behind, down[part].to(dtype).mT)
                torch.ops.aten.gelu_backward.grad_input(before, inner[part], grad_input=grad_inner[part])
        return grad, grad_inner, grad_down, None


class _Normed(torch.autograd.Function):
    """norm(x), of which x alone is kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, norm: Tensor) -> Tensor:
        ctx.save_for_backward(rows, norm)
        return _Norm(rows, norm)()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, norm = ctx.saved_tensors
        grad_norm = torch.zeros_like(norm)
        return _Norm(rows, norm).backward(grad.clone(), grad_norm), grad_norm


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, norm: Tensor, qkv: Tensor, out: Tensor, heads: int, dtype: torch.dtype
    ) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            split, weight = rows.new_empty(*rows.shape[:2], len(qkv), dtype=dtype), qkv.to(dtype).T
            for part in _depths(rows):
                split[part] = _product(_Norm(rows[part], norm)().to(dtype), weight)
            mixed = torch.empty_like(rows, dtype=dtype)
            for part in _tokens(rows):
                mixed[:, part] = _Heads(split[:, part], heads).mixed()
            added, weight = torch.empty_like(rows), out.to(dtype).T
            for part in _depths(rows):
                torch.add(rows[part], _product(mixed[part], weight), out=added[part])
        ctx.save_for_backward(rows, norm, qkv, out, split)
        ctx.heads, ctx.dtype = heads, dtype
        return added

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, norm, qkv, out, split = ctx.saved_tensors
        used, dtype = _used(ctx), ctx.dtype
        with torch.autocast(rows.device.type, enabled=False):
            behind, grad_split, mixed = grad.to(dtype), _reused(split), torch.empty_like(rows, dtype=dtype)
            weight = out.to(dtype)
            for part in _depths(rows):
                mixed[part] = _product(behind[part], weight)
            for part in _tokens(rows):  # what comes out takes the place of its gradient
                grad_split[:, part], mixed[:, part] = _Heads(split[:, part], ctx.heads).backward(mixed[:, part])
            grad_out = _product(behind.flatten(0, 1).T, mixed.flatten(0, 1)).to(out.dtype) if used[3] else None
            grad_rows, grad_norm = torch.empty_like(rows), torch.zeros_like(norm) if used[1] else None
            weight, normed_rows = qkv.to(dtype), mixed
            for part in _depths(rows):
                normed = _Norm(rows[part], norm)
                if used[2]:
                    normed_rows[part] = normed()
                before = _product(grad_split[part], weight).to(rows.dtype)
                torch.add(grad[part], normed.backward(before, grad_norm), out=grad_rows[part])
            behind = grad_split.flatten(0, 1)
            grad_qkv = _product(behind.T, normed_rows.flatten(0, 1)).to(qkv.dtype) if used[2] else None
        return grad_rows, grad_norm, grad_qkv, grad_out, None, None


class _CrossEntropy(torch.autograd.Function):
    """The gradient of the logits is kept in half precision; in full it would be the largest thing kept, and is not."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, norm: Tensor, weight: Tensor, codes: Tensor, dtype: torch.dtype, learn: bool
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(rows.device.type, enabled=False):
            logits = _product(_Norm(rows, norm)().to(dtype), weight.to(dtype).T)
            loss, hits, grad_logits = _softmax(logits, codes)
            kept = logits.copy_(grad_logits) if learn and dtype is not grad_logits.dtype else None
        ctx.save_for_backward(rows, norm, weight, codes, kept)
        ctx.dtype = dtype
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, norm, weight, codes, grad_logits = ctx.saved_tensors
        used, dtype = _used(ctx), ctx.dtype
        grad_rows = grad_norm = grad_weight = None
        with torch.autocast(rows.device.type, enabled=False):
            normed = _Norm(rows, norm)
            if grad_logits is None:
                grad_logits = _softmax(_product(normed().to(dtype), weight.to(dtype).T), codes)[2]
            if used[2]:
                grad_weight = _product(grad_logits.T, normed().mul_(grad).to(dtype)).to(weight.dtype)
            if used[0] or used[1]:
                grad_norm = torch.zeros_like(norm) if used[1] else None
                before = _product(grad_logits, weight.to(dtype)).to(rows.dtype).mul_(grad)
                grad_rows = normed.backward(before, grad_norm)
        return grad_rows, grad_norm, grad_weight, None, None, None


def _softmax(logits: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the cross-entropies, hits, and softmax - onehot, which takes the place of logits in full precision."""
    logits, wanted = logits.to(torch.promote_types(logits.dtype, torch.float32)), codes[:, None]
    (top, likeliest), aimed = logits.max(1), logits.gather(1, wanted).squeeze(1)
    torch.softmax(logits, 1, out=logits)
    # the log of the sum of exponentials, at the largest logit, whose share is at least 1/K
    losses = top - logits.amax(1).log() - aimed
    logits.scatter_(1, wanted, torch.expm1(-losses)[:, None])  # at the code p - 1
    return losses.sum(), (likeliest == codes).sum(), logits


class _Norm:
    """RMS norm of some rows, and its backward."""

    def __init__(self, rows: Tensor, weight: Tensor):
        mean = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_().div_(rows.shape[-1])
        self.scale, self.weight = mean.add_(EPSILON).rsqrt_(), weight
        self.unit = rows * self.scale

    def __call__(self) -> Tensor:
        return self.unit * self.weight

    def backward(self, grad: Tensor, grad_weight: Tensor | None) -> Tensor:
        """The rows' gradient, from that of what came out, which is overwritten; adds the weight's to `grad_weight`."""
        product = grad * self.unit
        if grad_weight is not None:
            grad_weight += product.flatten(0, -2).sum(0)
        mean = torch.matmul(product, self.weight).div_(product.shape[-1])
        return grad.mul_(self.weight).addcmul_(self.unit, mean[..., None], value=-1).mul_(self.scale)


class _Heads:
    """Causal attention over the depths of some visual tokens, queries, keys and values being `[q, R, 3E]`."""

    def __init__(self, split: Tensor, heads: int):
        self.depths, self.count = split.shape[:2]
        self.heads, self.dtype = heads, split.dtype
        self.full = torch.promote_types(split.dtype, torch.float32)
        parts = split.view(self.depths, self.count, 3, heads, -1).permute(2, 1, 3, 0, 4).to(self.full)
        self.queries, self.keys, self.values = parts.reshape(3, self.count * heads, self.depths, -1).unbind()
        self.factor = self.queries.shape[-1] ** -0.5
        later = torch.full((self.depths, self.depths), -torch.inf, dtype=self.full, device=split.device).triu_(1)
        self.shares = torch.baddbmm(later, self.queries, self.keys.mT, alpha=self.factor).softmax(-1)

    def mixed(self) -> Tensor:
        """`[q, R, E]`."""
        return self._merge(torch.bmm(self.shares, self.values))

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of queries, keys and values `[q, R, 3E]`, and what comes out, from the gradient of that."""
        split = grad.view(self.depths, self.count, self.heads, -1).permute(1, 2, 0, 3).to(self.full)
        behind = split.reshape(self.queries.shape)
        grad_shares = torch.bmm(behind, self.values.mT)
        mean = (grad_shares * self.shares).sum(-1, keepdim=True)
        grad_scores = grad_shares.sub_(mean).mul_(self.shares).mul_(self.factor)
        pairs = (grad_scores, self.keys), (grad_scores.mT, self.queries), (self.shares.mT, behind)
        return torch.cat([self._merge(torch.bmm(*pair)) for pair in pairs], -1), self.mixed()

    def _merge(self, heads: Tensor) -> Tensor:
        merged = heads.view(self.count, self.heads, self.depths, -1).permute(2, 0, 1, 3)
        return merged.to(self.dtype).reshape(self.depths, self.count, -1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right: matrices, or batches of them; a batch of one is a matrix."""
    if left.ndim == right.ndim == 3 and len(left) == 1:
        return _product(left[0], right[0])[None]
    if left.ndim == 3 and right.ndim == 2:
        return _product(left.flatten(0, 1), right).view(*left.shape[:2], right.shape[1])
    if ONEDNN and left.ndim == 2 and left.numel() and left.device.type == "cpu" and left.dtype is torch.float32:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
        return product
    return left @ right


def _product_dtype(rows: Tensor) -> torch.dtype:
    device = rows.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype


def _empty(weight: Tensor, depths: int) -> Tensor:
    """Memory for the gradient of weights `[Q, …]`, zero where not all depths are there."""
    return torch.empty_like(weight) if depths == len(weight) else torch.zeros_like(weight)


def _reused(kept: Tensor) -> Tensor:
    """Memory for the gradient of what was kept: its own where this backward is the last to read it."""
    again = torch._C._autograd._get_current_graph_task_keep_graph()
    return torch.empty_like(kept) if again else kept.data


def _depths(rows: Tensor) -> Iterator[slice]:
    """The depths that are worked on at a time."""
    step = 1 if rows.device.type == "cpu" else max(len(rows), 1)
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _tokens(rows: Tensor) -> Iterator[slice]:
    """The visual tokens whose attention is computed together."""
    depths, count, width = rows.shape
    step = max(ATTENTION_ELEMENTS // (depths * width), 1) if rows.device.type == "cpu" else max(count, 1)
    return (slice(start, start + step) for start in range(0, count, step))


def _used(ctx: Any) -> list[bool]:
    """Of the tensors, which come first, those whose gradients the running backward uses.

    Those of weights are not where `torch.autograd.grad` is asked for those of states alone.
    """
    return [node is not None and _asked(node) for node, _ in ctx.next_functions]


def _asked(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # raised for a leaf that `torch.autograd.grad` was given
        return True
