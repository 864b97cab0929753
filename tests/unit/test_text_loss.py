"""The chunked head and loss against `F.cross_entropy` on full logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate import text_loss
from foveate.text_loss import greedy_tokens, linear_cross_entropy

S, D, V = 83, 12, 41


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=[1 << 25, 16 * V, 29 * V], ids=["one chunk", "chunks of 16", "chunks of 29"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_loss, "CHUNK_ELEMENTS", request.param)


def inputs(dtype: torch.dtype = torch.float64, count: int = S, scale: float = 1.0) -> list[Tensor]:
    """States, weight, bias (leaves that learn) and targets."""
    leaves = [torch.randn(shape, dtype=dtype) * scale for shape in ((count, D), (V, D), (V,))]
    return [*(leaf.requires_grad_() for leaf in leaves), torch.randint(V, (count,))]


def reference(states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(states, weight, bias), targets, reduction="none")


@pytest.mark.parametrize("with_bias", [True, False])
def test_loss_and_gradients_equal_full_logits(chunked: None, with_bias: bool) -> None:
    states, weight, bias, targets = inputs()
    leaves = [states, weight, *([bias] if with_bias else [])]
    total, each = linear_cross_entropy(states, weight, bias if with_bias else None, targets)
    expected = reference(states, weight, bias if with_bias else None, targets)
    torch.testing.assert_close(each, expected.detach(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(total, expected.sum(), atol=1e-12, rtol=1e-12)
    assert not each.requires_grad
    ours = torch.autograd.grad(total * 0.37, leaves)
    theirs = torch.autograd.grad(expected.sum() * 0.37, leaves)
    for mine, stock in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, stock, atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_frozen_inputs_get_no_gradient_and_change_none(chunked: None, frozen: tuple[int, ...]) -> None:
    *leaves, targets = inputs()
    for index in frozen:
        leaves[index].requires_grad_(False)
    linear_cross_entropy(*leaves, targets)[0].backward()
    ours = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    reference(*leaves, targets).sum().backward()
    for index, (mine, leaf) in enumerate(zip(ours, leaves, strict=True)):
        assert (mine is None) == (index in frozen)
        if mine is not None:
            torch.testing.assert_close(mine, leaf.grad, atol=1e-12, rtol=1e-11)


def test_without_supervised_positions() -> None:
    states, weight, bias, targets = inputs(count=0)
    total, each = linear_cross_entropy(states, weight, bias, targets)
    assert each.shape == (0,) and total.item() == 0
    for gradient, leaf in zip(torch.autograd.grad(total, [states, weight, bias]), (states, weight, bias), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()
    assert greedy_tokens(states, weight, bias).shape == (0,)


def test_gradcheck() -> None:
    """Of states and bias: `gradcheck` runs each backward twice, which a head that learns does not allow."""
    states, weight, bias, targets = inputs(count=5)
    head = weight.detach()
    assert torch.autograd.gradcheck(lambda h, b: linear_cross_entropy(h, head, b, targets)[0], (states, bias))


def test_confident_and_hopeless_predictions(chunked: None) -> None:
    """Losses of thousands neither overflow nor underflow, and losses near 0 keep their gradient."""
    states, weight, bias, targets = inputs(scale=30.0)
    targets[::2] = F.linear(states, weight, bias).argmax(-1)[::2]
    expected = reference(states, weight, bias, targets)
    assert expected.max() > 1000 and expected.min() < 1e-6
    total, each = linear_cross_entropy(states, weight, bias, targets)
    torch.testing.assert_close(each, expected.detach(), atol=1e-10, rtol=1e-12)
    ours, theirs = (torch.autograd.grad(loss, [states, weight]) for loss in (total, expected.sum()))
    for mine, stock in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, stock, atol=1e-9, rtol=1e-9)


def test_single_precision(chunked: None) -> None:
    states, weight, bias, targets = inputs(torch.float32)
    total, each = linear_cross_entropy(states, weight, bias, targets)
    assert each.dtype == torch.float32
    exact = [leaf.detach().double().requires_grad_() for leaf in (states, weight, bias)]
    expected = reference(*exact, targets).sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    for leaf, mine, stock in zip(
        exact, torch.autograd.grad(total, [states, weight, bias]), torch.autograd.grad(expected, exact), strict=True
    ):
        assert mine.dtype == torch.float32 and mine.shape == leaf.shape
        torch.testing.assert_close(mine.double(), stock, atol=1e-5, rtol=1e-4)


def test_bf16_autocast_is_as_close_as_stock_autocast(chunked: None) -> None:
    states, weight, bias, targets = inputs(torch.float32)
    exact = [leaf.detach().double().requires_grad_() for leaf in (states, weight, bias)]
    truth = torch.autograd.grad(reference(*exact, targets).sum(), exact)
    gaps = []
    for ours in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            if ours:
                loss = linear_cross_entropy(states, weight, bias, targets)[0]
            else:
                loss = F.cross_entropy(F.linear(states, weight, bias).float(), targets, reduction="sum")
        assert loss.dtype == torch.float32
        gradients = torch.autograd.grad(loss, [states, weight, bias])
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        distances = [float((mine - stock).norm() / stock.norm()) for mine, stock in zip(gradients, truth, strict=True)]
        gaps.append([abs(loss.item() - reference(*exact, targets).sum().item()) / S, *distances])
    for mine, stock in zip(*gaps, strict=True):
        assert mine < max(1.5 * stock, 0.01), gaps


def test_tied_weight_gets_both_gradients() -> None:
    """The embedding is the head: what reaches it through the states adds up with what reaches it as the head."""
    _, weight, _, targets = inputs()
    ids = torch.randint(V, (S,))
    linear_cross_entropy(F.embedding(ids, weight).tanh(), weight, None, targets)[0].backward()
    mine, weight.grad = weight.grad, None
    reference(F.embedding(ids, weight).tanh(), weight, None, targets).sum().backward()
    torch.testing.assert_close(mine, weight.grad, atol=1e-12, rtol=1e-11)


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    """Other factors in between leave no trace; what comes after the last pass is refused, not wrong."""
    *leaves, targets = inputs()
    expected = torch.autograd.grad(linear_cross_entropy(*leaves, targets)[0] * 0.7, leaves)
    total = linear_cross_entropy(*leaves, targets)[0]
    for factor in (3.0, 0.0, 0.7):
        found = torch.autograd.grad(total * factor, leaves, retain_graph=True)
    last = torch.autograd.grad(total * 0.7, leaves, retain_graph=False)
    for first, second, third in zip(expected, found, last, strict=True):
        assert torch.equal(first, second) and torch.equal(first, third)
    with pytest.raises(RuntimeError):
        total.backward()


def test_evaluation_makes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without autograd no product of the size of the head's gradient is computed."""
    states, weight, bias, targets = inputs()
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: pytest.fail("a gradient of the head under no_grad"))
    with torch.no_grad():
        total, _ = linear_cross_entropy(states, weight, bias, targets)
    assert total.item() == pytest.approx(reference(states, weight, bias, targets).sum().item(), rel=1e-12)


def test_nan_reaches_the_loss() -> None:
    states, weight, bias, targets = inputs()
    with torch.no_grad():
        states[3, 2] = float("nan")
    total, each = linear_cross_entropy(states, weight, bias, targets)
    assert total.isnan() and each.isnan().nonzero().tolist() == [[3]]


def test_greedy_tokens(chunked: None) -> None:
    states, weight, bias, _ = inputs()
    torch.testing.assert_close(greedy_tokens(states, weight, bias), (states @ weight.T + bias).argmax(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_cuda_equals_double_precision(chunked: None, autocast: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    states, weight, bias, targets = inputs(torch.float32)
    exact = [leaf.detach().double().requires_grad_() for leaf in (states, weight, bias)]
    expected = reference(*exact, targets).sum()
    leaves = [leaf.detach().cuda().requires_grad_() for leaf in (states, weight, bias)]
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        total, _ = linear_cross_entropy(*leaves, targets.cuda())
    assert total.item() == pytest.approx(expected.item(), rel=1e-2 if autocast else 1e-5)
    for mine, stock in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(expected, exact), strict=True):
        assert float((mine.cpu().double() - stock).norm() / stock.norm()) < (0.03 if autocast else 1e-4)
