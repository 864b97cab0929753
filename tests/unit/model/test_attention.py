"""Attention on packed rows against an independent eager computation, segment by segment."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate.errors import ModelError
from foveate.model.attention import Segments, packed_attention

LENGTHS = [(9,), (5, 12, 1, 7), (4, 4, 4), (6, 6, 3, 3, 3, 11), (1, 1, 1)]


class Layer(nn.Module):
    """What a model hands over as itself."""

    is_causal = True


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def row(lengths: tuple[int, ...], heads: int = 6, key_heads: int = 6, width: int = 4) -> list[Tensor]:
    """Query, key and value as models make them: views of `[1, T, heads, width]`."""
    shape = {"q": heads, "k": key_heads, "v": key_heads}
    made = [torch.randn(1, sum(lengths), count, width, dtype=torch.float64) for count in shape.values()]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in made]


def packed(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], **wishes: Any) -> Tensor:
    return packed_attention(Layer(), q, k, v, None, segments=Segments.of(lengths, q.device), **wishes)[0]


def eager(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, window: int | None) -> Tensor:
    """Softmax over scores, a segment at a time, every key head repeated for its query heads."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    outputs = []
    for start, length in zip(torch.tensor((0, *lengths)).cumsum(0).tolist(), lengths, strict=False):
        part = slice(start, start + length)
        scores = torch.einsum("bhqd,bhkd->bhqk", q[:, :, part], k[:, :, part]) * scale
        age = torch.arange(length)[:, None] - torch.arange(length)
        seen = (age >= 0) & (age < (window or length))
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        outputs.append(torch.einsum("bhqk,bhkd->bqhd", weights, v[:, :, part]))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("key_heads", [6, 2, 1])
@pytest.mark.parametrize("window", [None, 3])
def test_equals_eager_attention_of_each_segment(lengths: tuple[int, ...], key_heads: int, window: int | None) -> None:
    q, k, v = row(lengths, key_heads=key_heads)
    ours = packed(q, k, v, lengths, scaling=0.7, sliding_window=window)
    theirs = eager(q, k, v, lengths, 0.7, window)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
    weights = torch.randn_like(theirs)
    mine, stock = (torch.autograd.grad((out * weights).sum(), [q, k, v]) for out in (ours, theirs))
    for name, a, b in zip("qkv", mine, stock, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_default_scale_is_the_heads_width() -> None:
    q, k, v = row((5, 8), width=16)
    torch.testing.assert_close(packed(q, k, v, (5, 8)), eager(q, k, v, (5, 8), 0.25, None), atol=1e-12, rtol=1e-10)


def test_values_may_be_wider_than_keys() -> None:
    q, k, _ = row((5, 8))
    v = torch.randn(1, 6, 13, 10, dtype=torch.float64)
    torch.testing.assert_close(packed(q, k, v, (5, 8)), eager(q, k, v, (5, 8), 0.5, None), atol=1e-12, rtol=1e-10)


def test_a_segment_does_not_depend_on_its_neighbours_by_a_single_bit() -> None:
    lengths = (7, 7, 5, 9)
    q, k, v = row(lengths)
    alone = packed(q, k, v, lengths)[:, 14:19]
    with torch.no_grad():
        for tensor in (q, k, v):
            tensor[:, :, :14] += 3
            tensor[:, :, 19:] = float("nan")
    assert torch.equal(packed(q, k, v, lengths)[:, 14:19], alone)


def test_gradients_stay_inside_their_segment() -> None:
    q, k, v = row((4, 6, 3))
    for gradient in torch.autograd.grad(packed(q, k, v, (4, 6, 3))[:, 4:10].sum(), [q, k, v]):
        assert not gradient[:, :, :4].any() and not gradient[:, :, 10:].any() and gradient[:, :, 4:10].isfinite().all()


def test_memory_of_the_backward_is_linear_in_the_segments() -> None:
    """Nothing as large as the row is made for each of many segments."""
    lengths = tuple(range(20, 52))
    q, k, v = row(lengths)
    out = packed(q, k, v, lengths)
    with torch.profiler.profile(profile_memory=True) as profile:
        out.sum().backward()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert allocated < 20 * q.numel() * q.element_size()


@pytest.mark.parametrize("window", [1, 9, 100])
def test_sliding_window_at_its_ends(window: int) -> None:
    q, k, v = row((9, 12))
    ours = packed(q, k, v, (9, 12), sliding_window=window, scaling=0.5)
    torch.testing.assert_close(ours, eager(q, k, v, (9, 12), 0.5, window), atol=1e-12, rtol=1e-10)


def test_dropout_is_of_the_weights_and_of_training_only() -> None:
    q, k, v = row((30, 20))
    torch.testing.assert_close(packed(q, k, v, (30, 20), dropout=0.0), packed(q, k, v, (30, 20)), atol=0, rtol=0)
    assert not torch.allclose(packed(q, k, v, (30, 20), dropout=0.5), packed(q, k, v, (30, 20)))


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(6)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"segments": None}, "boundaries"),
        ({"segments": Segments.of((5, 7), torch.device("cpu"))}, "13 tokens came with segments of 12"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wishes_that_packed_rows_do_not_support_are_refused(wish: dict[str, Any], said: str) -> None:
    q, k, v = row((5, 8))
    given = {"segments": Segments.of((5, 8), q.device), **wish}
    with pytest.raises(ModelError, match=said) as error:
        packed_attention(Layer(), q, k, v, None, **given)
    assert "Layer" in str(error.value) or "came with" in str(error.value)


def test_masks_and_bidirectional_attention_are_refused() -> None:
    q, k, v = row((5, 8))
    segments = Segments.of((5, 8), q.device)
    with pytest.raises(ModelError, match="an attention mask"):
        packed_attention(Layer(), q, k, v, torch.zeros(1, 1, 13, 13), segments=segments)
    layer = Layer()
    layer.is_causal = False
    with pytest.raises(ModelError, match="bidirectional"):
        packed_attention(layer, q, k, v, None, segments=segments)


def test_wishes_that_mean_nothing_are_taken() -> None:
    q, k, v = row((5, 8))
    same = packed(q, k, v, (5, 8), softcap=None, use_cache=False, position_ids=torch.arange(13)[None], layer_idx=3)
    assert torch.equal(same, packed(q, k, v, (5, 8)))


def test_segments() -> None:
    segments = Segments.of((4, 4, 9, 4), torch.device("cpu"))
    assert segments.starts.tolist() == [0, 4, 8, 17, 21] and segments.starts.dtype == torch.int32
    assert segments.runs == [(2, 4), (1, 9), (1, 4)]
    assert segments.longest == 16 and Segments.of((1,), torch.device("cpu")).longest == 1


@pytest.mark.gpu
@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize("window", [None, 37])
def test_cuda_16_bit_equals_eager(key_heads: int, window: int | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    lengths = (130, 64, 64, 7)
    q, k, v = row(lengths, heads=8, key_heads=key_heads, width=64)
    leaves = [x.detach().cuda().bfloat16().requires_grad_() for x in (q, k, v)]
    ours, theirs = packed(*leaves, lengths, sliding_window=window), eager(q, k, v, lengths, 0.125, window)
    torch.testing.assert_close(ours.double().cpu(), theirs, atol=0.03, rtol=0.03)
    weights = torch.randn_like(theirs)
    mine = torch.autograd.grad((ours * weights.cuda()).sum(), leaves)
    for a, b in zip(mine, torch.autograd.grad((theirs * weights).sum(), [q, k, v]), strict=True):
        assert float((a.double().cpu() - b).norm() / b.norm()) < 0.03
