"""Residual quantisation: a row as a sum of vectors, one of each codebook.

r_0 = f; for d = 1…Q: q_d = argmin_k |r_{d-1} - C_d[k]|², r_d = r_{d-1} - C_d[q_d]; the codes of f are q_1 … q_Q, and
the sum of C_d[q_d] is what they say of it. As in the tokenizer of ASVR (arXiv 2506.09040), which is DualToken's.

Shapes: M rows, Q depths, K codes of a codebook, C width of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import ModelError

CHUNK_ELEMENTS = 1 << 24
"""Distances that exist at a time on a CPU, 64 MiB in fp32; sixteen times as many elsewhere."""

CANDIDATES = 4
"""Codes of least approximate distance that are compared exactly."""


class FullPrecision(nn.Module):
    """A module in float32 or more: casts of a surrounding module to half precision move it and leave its values.

    In half precision the codes of the deeper levels are noise.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keeping(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype in (torch.float16, torch.bfloat16) and tensor.dtype in (torch.float32, torch.float64):
                return tensor.to(moved.device)
            return moved

        return super()._apply(keeping, recurse)


class ResidualQuantizer(FullPrecision):
    """Codebooks `[Q, K, C]`, or `[1, K, C]` where all depths share one: a buffer, never trained by gradients."""

    codebooks: Tensor

    def __init__(self, depth: int, size: int, width: int, shared: bool = False):
        super().__init__()
        self.depth, self.size, self.width, self.shared = depth, size, width, shared
        self.register_buffer("codebooks", torch.zeros(1 if shared else depth, size, width))

    def book(self, depth: int) -> Tensor:
        """The codebook of a depth, counted from 0, `[K, C]`."""
        return self.codebooks[0 if self.shared else depth]

    def encode(self, rows: Tensor) -> Tensor:
        """Rows `[M, C]` → codes `[M, Q]` int64, each the nearest vector to what is left of the row."""
        return self.residuals(rows)[0]

    def residuals(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[M, Q]`, and what is left of the rows after each depth, `[Q, M, C]`. Raises `ModelError` by width."""
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ModelError(f"the tokenizer quantises rows of width {self.width}, and got {list(rows.shape)}")
        rest, codes, left = full(rows), [], []
        for depth in range(self.depth):
            book = self.book(depth)
            codes.append(nearest(rest, book))
            rest = rest - book.to(rest.dtype)[codes[-1]]
            left.append(rest)
        return torch.stack(codes, 1), torch.stack(left)

    def partial_sums(self, codes: Tensor) -> Tensor:
        """Codes `[M, q]` of the first q depths → the sums of the vectors up to each, `[q, M, C]`."""
        self.check(codes)
        vectors = [self.book(depth)[column] for depth, column in enumerate(codes.unbind(1))]
        return torch.stack(vectors).cumsum(0) if vectors else self.codebooks.new_zeros(0, len(codes), self.width)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[M, Q]` → the quantised rows `[M, C]`."""
        self.check(codes)
        rows = self.codebooks.new_zeros(len(codes), self.width)
        for depth, column in enumerate(codes.unbind(1)):
            rows = rows + self.book(depth)[column]
        return rows

    def check(self, codes: Tensor) -> None:
        """Raises `ModelError` for codes of more depths than there are, and for codes that no codebook has."""
        if codes.ndim != 2 or codes.shape[1] > self.depth:
            raise ModelError(f"codes {list(codes.shape)} for a tokenizer of depth {self.depth}")
        check_codes(codes, self.size)


def check_codes(codes: Tensor, size: int) -> None:
    """Raises `ModelError` where a code is not among 0…size-1."""
    if codes.numel():
        least, most = (int(bound) for bound in torch.aminmax(codes))
        if least < 0 or most >= size:
            raise ModelError(f"codes from {least} to {most} for codebooks of {size}: they come from another tokenizer")


def nearest(rows: Tensor, book: Tensor) -> Tensor:
    """The number of the nearest vector of `book` `[K, C]` to each of `rows` `[M, C]`: `[M]` int64.

    Chunk by chunk, |c|² - 2 r·c about the book's mean chooses a few candidates, whose distances are then computed as
    differences: rows of norms in the hundreds would else lose the digits that tell neighbours apart.
    """
    rows = full(rows)
    book = book.to(rows.dtype)
    with torch.autocast(rows.device.type, enabled=False):
        centre = book.mean(0)
        shifted = book - centre
        norms, most = shifted.square().sum(1), min(CANDIDATES, len(book))
        elements = CHUNK_ELEMENTS if rows.device.type == "cpu" else 16 * CHUNK_ELEMENTS
        found = []
        for chunk in rows.split(max(elements // len(book), 16)):
            scores = torch.addmm(norms, chunk - centre, shifted.T, alpha=-2)
            close = scores.topk(most, dim=1, largest=False).indices.sort(1).values  # of equals the first, as argmin
            exact = torch.stack([(chunk - book[close[:, k]]).square().sum(1) for k in range(most)], 1)
            found.append(close.gather(1, exact.argmin(1, keepdim=True)).squeeze(1))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=rows.device)


def full(tensor: Tensor) -> Tensor:
    """In float32 or more."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
