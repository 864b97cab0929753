"""Residual quantisation against brute force in float64, and fits of codebooks against scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from foveate.errors import DataError, ModelError
from foveate_asvr import quantizer as module
from foveate_asvr.clustering import Codebooks, FitOptions, fit_codebooks, kmeans_plus_plus, measure
from foveate_asvr.quantizer import ResidualQuantizer, nearest


def made(depth: int, size: int, width: int, shared: bool = False, offset: float = 0.0) -> ResidualQuantizer:
    quantizer = ResidualQuantizer(depth, size, width, shared).double()
    quantizer.codebooks.normal_()
    quantizer.codebooks[0] += offset
    return quantizer


def brute_force(rows: Tensor, books: list[np.ndarray]) -> np.ndarray:
    """Codes row by row, every distance written out, in float64."""
    codes = []
    for row in rows.double().numpy():
        rest, found = row.copy(), []
        for book in books:
            found.append(int(((rest - book) ** 2).sum(1).argmin()))
            rest = rest - book[found[-1]]
        codes.append(found)
    return np.array(codes)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("elements", [1 << 24, 100])
def test_codes_equal_brute_force(shared: bool, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    quantizer = made(4, 33, 7, shared)
    rows = 2 * torch.randn(101, 7, dtype=torch.float64)
    books = [quantizer.book(depth).numpy() for depth in range(4)]
    codes = quantizer.encode(rows)
    assert codes.dtype is torch.int64 and np.array_equal(codes.numpy(), brute_force(rows, books))
    total = sum(book[codes[:, depth].numpy()] for depth, book in enumerate(books))
    np.testing.assert_allclose(quantizer.decode(codes).numpy(), total, atol=1e-12)
    sums = quantizer.partial_sums(codes[:, :2])
    np.testing.assert_allclose(sums[1].numpy(), books[0][codes[:, 0]] + books[1][codes[:, 1]], atol=1e-12)
    left = quantizer.residuals(rows)[1]
    torch.testing.assert_close(left[-1], rows - quantizer.decode(codes))


def test_rows_of_large_norm_find_their_nearest_in_float32() -> None:
    """Norms around 3,000 as in deep layers: |c|² - 2 r·c alone would be off by more than neighbours differ."""
    book = (300 + torch.randn(512, 96)).float()
    rows = book[torch.randint(512, (400,))] + 0.7 * torch.randn(400, 96)
    distances = (rows.double()[:, None] - book.double()).square().sum(2)
    chosen = distances.gather(1, nearest(rows, book)[:, None]).squeeze(1)
    assert bool((chosen <= distances.amin(1) * (1 + 1e-5)).all())


def test_of_equal_vectors_the_first_is_taken() -> None:
    book = torch.randn(3, 5).repeat(4, 1)
    assert nearest(book[:3].clone(), book).tolist() == [0, 1, 2]


def test_codebooks_stay_in_full_precision() -> None:
    quantizer = ResidualQuantizer(2, 4, 3)
    quantizer.codebooks.normal_()
    before = quantizer.codebooks.clone()
    cast = torch.nn.Sequential(quantizer, torch.nn.Linear(3, 3)).to(torch.bfloat16)
    assert cast[1].weight.dtype is torch.bfloat16 and torch.equal(quantizer.codebooks, before)
    rows = torch.randn(9, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.encode(rows), quantizer.encode(rows.double()))
    assert quantizer.double().codebooks.dtype is torch.float64


def test_what_does_not_fit_is_told() -> None:
    quantizer = made(2, 4, 3)
    with pytest.raises(ModelError, match=r"width 3, and got \[5, 4\]"):
        quantizer.encode(torch.randn(5, 4))
    for wrong in (4, -1):
        with pytest.raises(ModelError, match="for codebooks of 4: they come from another tokenizer"):
            quantizer.decode(torch.tensor([[0, wrong]]))
    with pytest.raises(ModelError, match=r"codes \[1, 3\] for a tokenizer of depth 2"):
        quantizer.decode(torch.zeros(1, 3, dtype=torch.int64))


def pictures(seed: int, clusters: int = 40, width: int = 12, tokens: int = 16) -> Iterator[Tensor]:
    """Rows around centres, endlessly; a seed gives the same ones."""
    random = torch.Generator().manual_seed(seed)
    centres = 100 + 3 * torch.randn(clusters, width, generator=random)
    while True:
        which = torch.randint(clusters, (tokens,), generator=random)
        yield centres[which] + torch.randn(tokens, width, generator=random)


@pytest.mark.parametrize("shared", [False, True])
def test_a_fit_uses_its_codes_and_every_depth_lowers_the_error(shared: bool) -> None:
    quantizer = ResidualQuantizer(4, 32, 12, shared)
    told = fit_codebooks(quantizer, pictures(1), FitOptions(images=600, check=100), seed=3)
    errors = [told[f"error/{depth}"] for depth in range(1, 5)]
    assert errors[0] < 0.75 and all(after < 0.85 * before for before, after in pairwise(errors))
    for depth in range(1, 5):
        least = 0.2 if shared else 0.9  # of a shared codebook each depth takes its part
        assert told[f"used/{depth}"] > least and 16 * least < told[f"perplexity/{depth}"] <= 32


def test_a_fit_is_near_the_best_of_scikit_learn() -> None:
    """Depth 1 alone is k-means; the best of three seeds is within 10 % of the best of ten starts of scikit-learn's."""
    stream = pictures(2)
    seen = torch.cat([next(stream) for _ in range(600)])
    best = KMeans(40, n_init=10, random_state=0).fit(seen.numpy())
    fresh, ours = torch.cat([next(stream) for _ in range(200)]), list[float]()
    for seed in range(3):
        quantizer = ResidualQuantizer(1, 40, 12)
        fit_codebooks(quantizer, pictures(2), FitOptions(images=600, batch_rows=256, decay=0.9, check=1), seed)
        ours.append(float(quantizer.residuals(fresh)[1][0].square().sum()))
    theirs = float(((fresh.numpy() - best.cluster_centers_[best.predict(fresh.numpy())]) ** 2).sum())
    assert min(ours) < 1.1 * theirs and max(ours) < 1.5 * theirs


def test_a_fit_draws_from_its_own_generators_alone() -> None:
    books = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        quantizer = ResidualQuantizer(2, 16, 12)
        fit_codebooks(quantizer, pictures(5), FitOptions(images=200, check=10), seed=7)
        assert torch.equal(before, torch.get_rng_state())
        books.append(quantizer.codebooks)
    other = ResidualQuantizer(2, 16, 12)
    fit_codebooks(other, pictures(5), FitOptions(images=200, check=10), seed=8)
    assert torch.equal(books[0], books[1]) and not torch.equal(books[0], other.codebooks)


def test_the_first_draws_of_k_means_plus_plus_follow_squared_distances() -> None:
    """Rows on a line; how often each is the second, given the first, against the probabilities written out."""
    rows = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    counts = torch.zeros(4, 4)
    for seed in range(4000):
        first, second = kmeans_plus_plus(rows, 2, torch.Generator().manual_seed(seed), trials=1).flatten()
        counts[int((rows[:, 0] == first).nonzero()), int((rows[:, 0] == second).nonzero())] += 1
    squares = (rows - rows.T).square()
    wanted = squares / squares.sum(1, keepdim=True)
    assert torch.allclose(counts.sum(1) / 4000, torch.full((4,), 0.25), atol=0.03)
    assert torch.allclose(counts / counts.sum(1, keepdim=True), wanted, atol=0.05)


def test_a_moving_average_is_its_formula() -> None:
    """Counts and sums after two updates, code by code in plain Python."""
    quantizer = made(1, 3, 2)
    options = FitOptions(images=1, decay=0.75, batch_rows=8)
    books = Codebooks(quantizer, options, 0)
    first = 3 * torch.randn(12, 2, dtype=torch.float64)
    books.start(first)
    codes = quantizer.encode(first)[:, 0]
    counts = [8 / 12 * float((codes == code).sum()) for code in range(3)]
    sums = [8 / 12 * first[codes == code].sum(0) for code in range(3)]
    for _ in range(2):
        rows = 3 * torch.randn(8, 2, dtype=torch.float64)
        codes = quantizer.encode(rows)[:, 0]
        books.update(rows, revive=False)
        counts = [0.75 * old + 0.25 * float((codes == code).sum()) for code, old in enumerate(counts)]
        sums = [0.75 * old + 0.25 * rows[codes == code].sum(0) for code, old in enumerate(sums)]
        wanted = torch.stack([total / count for total, count in zip(sums, counts, strict=True)])
        torch.testing.assert_close(quantizer.codebooks[0], wanted)


def test_a_dead_code_is_revived_as_a_row() -> None:
    quantizer = ResidualQuantizer(1, 4, 3).double()
    books = Codebooks(quantizer, FitOptions(images=1, decay=0.5, batch_rows=40), 0)
    rows = torch.randn(40, 3, dtype=torch.float64)
    books.start(rows)
    quantizer.codebooks[0, 2] = 1e3  # nothing is near
    books.counts[0, 2] = books.sums[0, 2] = 0
    books.update(rows, revive=True)
    assert any(torch.equal(quantizer.codebooks[0, 2], row) for row in rows)
    assert float(books.counts[0, 2]) == pytest.approx(float(books.counts[0, :2].sum() + books.counts[0, 3]) / 4)


def test_what_a_fit_tells_is_what_it_says() -> None:
    quantizer, rows = made(2, 5, 3), torch.randn(50, 3, dtype=torch.float64)
    told, codes = measure(quantizer, rows), quantizer.encode(rows).numpy()
    spread = ((rows - rows.mean(0)) ** 2).sum().item()
    for depth in (1, 2):
        left = rows - quantizer.partial_sums(torch.tensor(codes[:, :depth]))[-1]
        share = np.bincount(codes[:, depth - 1], minlength=5) / 50
        entropy = -sum(p * math.log(p) for p in share if p)
        assert told[f"error/{depth}"] == pytest.approx((left**2).sum().item() / spread)
        assert told[f"perplexity/{depth}"] == pytest.approx(math.exp(entropy))
        assert (told[f"used/{depth}"], told[f"guess/{depth}"]) == pytest.approx(((share > 0).mean(), share.max()))


def test_too_few_rows_are_an_error() -> None:
    with pytest.raises(DataError, match=r"48 rows for codebooks of 64 codes: raise `fit"):
        fit_codebooks(ResidualQuantizer(1, 64, 12), pictures(0), FitOptions(images=3), seed=0)
