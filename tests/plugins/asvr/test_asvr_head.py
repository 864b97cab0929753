"""Heads and their loss: a float64 formula written out, depth causality, chunks that change nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.errors import ModelError
from foveate_asvr import blocks
from foveate_asvr.head import CodeHead, DepthHeadOptions, DepthTransformer, LinearHead, LinearHeadOptions, make_head
from foveate_asvr.loss import chunk_rows, code_losses
from foveate_asvr.quantizer import ResidualQuantizer

STATES, VECTORS, DEPTH, SIZE = 6, 5, 4, 11


def parts(rows: int = 9, depth: int = DEPTH, **options: Any) -> tuple[CodeHead, Tensor, Tensor, ResidualQuantizer]:
    """A head with random weights, states, codes and codebooks, in float64."""
    chosen = LinearHeadOptions(type="linear") if options.get("type") == "linear" else DepthHeadOptions(
        **{"width": 8, "heads": 2, "layers": 2, **options}
    )  # fmt: skip
    head = make_head(chosen, STATES, VECTORS, depth, SIZE).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    quantizer = ResidualQuantizer(depth, SIZE, VECTORS).double()
    quantizer.codebooks.normal_()
    states = torch.randn(rows, STATES, dtype=torch.float64, requires_grad=True)
    return head, states, torch.randint(SIZE, (rows, depth)), quantizer


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean() + 1e-6) * weight


def gelu(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x])


def by_hand(head: Any, state: np.ndarray, codes: list[int], books: np.ndarray, released: bool) -> list[np.ndarray]:
    """Logits of every depth for one visual token, vector by vector."""
    weights = {name: value.detach().numpy() for name, value in head.named_parameters()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        bias = weights.get(f"{name}.bias")
        return weights[f"{name}.weight"] @ x + (0 if bias is None else bias)

    sequence = [linear("projector.2", gelu(linear("projector.0", state)))]
    for depth in range(1, len(books)):
        sequence.append(linear("vectors", sum(books[d][codes[d]] for d in range(depth))))
    for layer in range(len(head.layers)):
        name, heads = f"layers.{layer}", head.layers[layer].heads
        normed = [rms(x, weights[f"{name}.attention_norm.weight"]) for x in sequence]
        split = [np.split(linear(f"{name}.qkv", x), 3) for x in normed]
        size, mixed = len(normed[0]) // heads, []
        for at in range(len(sequence)):
            out = np.zeros(len(normed[0]))
            for number in range(heads):
                part = slice(number * size, (number + 1) * size)
                scores = np.array([split[at][0][part] @ split[k][1][part] / math.sqrt(size) for k in range(at + 1)])
                share = np.exp(scores) / np.exp(scores).sum()
                out[part] = sum(share[k] * split[k][2][part] for k in range(at + 1))
            mixed.append(sequence[at] + linear(f"{name}.out", out))
        sequence = []
        for depth, x in enumerate(mixed):
            normed_x = rms(x, weights[f"{name}.ffn_norm.weight"])
            inner = gelu(normed_x @ weights[f"{name}.up.weight"][depth])
            sequence.append((normed_x if released else x) + inner @ weights[f"{name}.down.weight"][depth])
    normed = [rms(x, weights["norm.weight"]) for x in sequence]
    return [linear(f"classifiers.{depth}", x) for depth, x in enumerate(normed)]


@pytest.mark.parametrize("residual", ["standard", "released"])
def test_the_loss_is_its_formula_in_float64(residual: str) -> None:
    head, states, codes, quantizer = parts(residual=residual, expansion=1.5)
    weights = torch.rand(DEPTH, dtype=torch.float64)
    weights /= weights.sum()
    found = code_losses(head, states, codes, quantizer, weights, chunk=4)
    total, losses, hits = 0.0, np.zeros(DEPTH), np.zeros(DEPTH)
    for row in range(len(states)):
        logits = by_hand(
            head, states[row].detach().numpy(), codes[row].tolist(), quantizer.codebooks.numpy(), residual == "released"
        )
        for depth, values in enumerate(logits):
            loss = math.log(np.exp(values).sum()) - values[codes[row, depth]]
            total += float(weights[depth]) * loss
            losses[depth] += loss
            hits[depth] += values.argmax() == codes[row, depth]
    assert float(found.total.detach()) == pytest.approx(total, rel=1e-9)
    np.testing.assert_allclose(found.cross_entropies.numpy(), losses, rtol=1e-9)
    np.testing.assert_array_equal(found.hits.numpy(), hits)


@pytest.mark.parametrize("options", [{}, {"type": "linear"}, {"residual": "released"}], ids=str)
def test_chunks_change_neither_loss_nor_gradients(options: dict[str, Any]) -> None:
    """Against autograd through all logits at once."""
    head, states, codes, quantizer = parts(rows=13, **options)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    given = [states, *head.parameters()]
    logits = head.logits(states, codes, quantizer)
    wanted = (-logits.log_softmax(-1).gather(-1, codes[..., None]).squeeze(-1) * weights).sum()
    expected = torch.autograd.grad(3 * wanted, given, allow_unused=True)
    for chunk in (1, 4, 13, None):
        found = code_losses(head, states, codes, quantizer, weights, chunk=chunk).total
        torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-12, atol=1e-12)
        for grad, other in zip(torch.autograd.grad(3 * found, given, allow_unused=True), expected, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        found = code_losses(head, states, codes, quantizer, weights, chunk=5).total
        assert float(found) == pytest.approx(float(wanted))


def plain(head: Any, states: Tensor, codes: Tensor, quantizer: ResidualQuantizer, weights: Tensor) -> Tensor:
    """The loss of a depth transformer in torch's own operations, tokens first."""
    sums = quantizer.partial_sums(codes[:, :-1]).transpose(0, 1)
    x = torch.cat([head.projector(states)[:, None], head.vectors(sums)], 1)
    rows, depth, width = x.shape
    for layer in head.layers:
        normed = F.rms_norm(x, (width,), layer.attention_norm.weight, 1e-6)
        qkv = F.linear(normed, layer.qkv.weight).view(rows, depth, 3, layer.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).reshape(rows, depth, width)
        x = x + F.linear(mixed, layer.out.weight)
        normed = F.rms_norm(x, (width,), layer.ffn_norm.weight, 1e-6)
        inner = F.gelu(torch.einsum("rqe,qef->rqf", normed, layer.up.weight))
        x = (normed if layer.released else x) + torch.einsum("rqf,qfe->rqe", inner, layer.down.weight)
    normed = F.rms_norm(x, (width,), head.norm.weight, 1e-6)
    logits = torch.stack([head.classifiers[at](normed[:, at]) for at in range(depth)], 2)  # [R, K, Q]
    return (F.cross_entropy(logits, codes, reduction="none") * weights).sum()


@pytest.mark.parametrize("together", [False, True], ids=["depth by depth", "all depths at once"])
@pytest.mark.parametrize("options", [{}, {"residual": "released", "expansion": 1.5, "heads": 4}], ids=str)
def test_gradients_are_those_of_torchs_own_operations(
    together: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways through the depths, that of a CPU and that of a GPU, with tokens attended one by one or together."""
    every = [slice(None)]
    monkeypatch.setattr(blocks, "ATTENTION_ELEMENTS", 1 if not together else 1 << 19)
    if together:
        monkeypatch.setattr(blocks, "_depths", lambda _: every)
    head, states, codes, quantizer = parts(rows=7, **options)
    weights = torch.rand(DEPTH, dtype=torch.float64)
    given = [states, *head.parameters()]
    wanted = plain(head, states, codes, quantizer, weights)
    found = code_losses(head, states, codes, quantizer, weights).total
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
    expected = torch.autograd.grad(wanted, given)
    for grad, other in zip(torch.autograd.grad(found, given), expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-12)


def test_gradients_in_single_precision_are_those_in_double() -> None:
    """Products in fp32 have a path of their own on some CPUs."""
    head, states, codes, quantizer = parts(rows=40, width=32, heads=4)
    weights = torch.full((DEPTH,), 1 / DEPTH)
    exact = torch.autograd.grad(
        code_losses(head, states, codes, quantizer, weights).total, [states, *head.parameters()]
    )
    head, quantizer, single = head.float(), quantizer.float(), states.detach().float().requires_grad_()
    total = code_losses(head, single, codes, quantizer, weights).total
    assert total.dtype is torch.float32
    for grad, other in zip(torch.autograd.grad(total, [single, *head.parameters()]), exact, strict=True):
        assert float((grad - other).norm()) < 1e-4 * float(other.norm())


@pytest.mark.parametrize("options", [{}, {"type": "linear"}, {"residual": "released"}], ids=str)
@pytest.mark.parametrize("chunk", [4, 13])
def test_a_backward_may_run_again_with_any_factor(chunk: int, options: dict[str, Any]) -> None:
    """For other parameters, for all of them, with 0, and what earlier ones returned stays as it was."""
    head, states, codes, quantizer = parts(rows=13, **options)
    weights, given = torch.rand(DEPTH, dtype=torch.float64), [states, *head.parameters()]
    exact = torch.autograd.grad(code_losses(head, states, codes, quantizer, weights, chunk=13).total, given)
    before = torch.ones((), dtype=torch.float64, requires_grad=True)
    total = code_losses(head, states * before, codes, quantizer, weights, chunk=chunk).total
    found = [(2, torch.autograd.grad(2 * total, states, retain_graph=True))]
    found += [(each, torch.autograd.grad(each * total, given, retain_graph=True)) for each in (3, 0, -0.5)]
    (5 * total).backward(retain_graph=True)
    (7 * total).backward()
    found.append((12, [tensor.grad for tensor in given]))
    for factor, grads in found:
        for grad, other in zip(grads, exact, strict=False):
            torch.testing.assert_close(grad, factor * other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk", [4, 13])
def test_gradients_of_weights_are_not_made_where_only_those_of_states_are_asked_for(chunk: int) -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.update(tuple(each.shape) for each in (out,) if isinstance(each, Tensor))
            return out

    head, states, codes, quantizer = parts(rows=13)
    weights = torch.full((DEPTH,), 1 / DEPTH, dtype=torch.float64)
    large = {tuple(parameter.shape) for parameter in head.parameters() if parameter.ndim == 3}
    total, made = code_losses(head, states, codes, quantizer, weights, chunk=chunk).total, set[tuple[int, ...]]()
    with Watch():
        torch.autograd.grad(total, states, retain_graph=True)
    assert made and not made & large
    with Watch():
        total.backward()
    assert made & large


def test_a_frozen_part_has_no_gradient_and_changes_no_other() -> None:
    head, states, codes, quantizer = parts()
    weights = torch.full((DEPTH,), 1 / DEPTH)
    code_losses(head, states, codes, quantizer, weights).total.backward()
    exact = {name: value.grad for name, value in head.named_parameters()}
    for frozen in ("layers.1.", "norm", "up", "classifiers", "projector"):
        head.zero_grad()
        for name, value in head.named_parameters():
            value.requires_grad_(frozen not in name)
        for chunk in (4, 9):
            head.zero_grad()
            code_losses(head, states, codes, quantizer, weights, chunk=chunk).total.backward()
            for name, value in head.named_parameters():
                if value.requires_grad:
                    torch.testing.assert_close(value.grad, exact[name], rtol=1e-9, atol=1e-12)
                else:
                    assert value.grad is None


def test_a_frozen_head_passes_gradients_on_and_frozen_states_do_not() -> None:
    head, states, codes, quantizer = parts()
    weights = torch.full((DEPTH,), 1 / DEPTH)
    head.requires_grad_(False)
    code_losses(head, states, codes, quantizer, weights).total.backward()
    assert states.grad is not None and float(states.grad.abs().sum()) > 0
    head.requires_grad_(True)
    code_losses(head, states.detach(), codes, quantizer, weights).total.backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_without_a_row_the_loss_is_zero_and_every_parameter_has_a_gradient() -> None:
    head, states, codes, quantizer = parts(rows=0)
    found = code_losses(head, states, codes, quantizer, torch.full((DEPTH,), 1 / DEPTH))
    found.total.backward()
    assert float(found.total.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("options", [{}, {"type": "linear"}], ids=str)
def test_a_code_moves_the_logits_of_later_depths_only(options: dict[str, Any]) -> None:
    head, states, codes, quantizer = parts(**options)
    before = head.logits(states, codes, quantizer)
    for depth in range(DEPTH):
        other = codes.clone()
        other[3, depth] = (other[3, depth] + 1) % SIZE
        moved = (head.logits(states, other, quantizer) - before).abs().amax(-1) > 1e-12
        wanted = torch.zeros_like(moved)
        wanted[3, depth + 1 :] = not isinstance(head, LinearHead)  # whose depths are independent
        assert torch.equal(moved, wanted)


def test_each_depth_has_weights_of_its_own() -> None:
    """What a depth's feed-forward and classifier hold moves the logits of no depth before it."""
    head, states, codes, quantizer = parts(layers=1)
    assert isinstance(head, DepthTransformer)
    before = head.logits(states, codes, quantizer)
    for depth in range(DEPTH):
        for name, only in (("layers.0.up.weight", True), ("layers.0.down.weight", True)):
            weight = head.get_parameter(name)
            kept = weight.detach().clone()
            with torch.no_grad():
                weight[depth] += 1
            moved = (head.logits(states, codes, quantizer) - before).abs().amax((0, 2)) > 1e-12
            assert moved.tolist() == [only and each == depth for each in range(DEPTH)], name
            with torch.no_grad():
                weight.copy_(kept)


def test_the_first_loss_is_that_of_a_guess() -> None:
    """ln K for K codes, also where states are large."""
    torch.manual_seed(0)
    size = 16384
    for options in (DepthHeadOptions(width=128, heads=4, layers=2), LinearHeadOptions(type="linear")):
        head = make_head(options, 64, 24, 3, size)
        quantizer = ResidualQuantizer(3, size, 24)
        quantizer.codebooks.normal_(std=50)
        codes = torch.randint(size, (60, 3))
        found = code_losses(head, 5 * torch.randn(60, 64), codes, quantizer, torch.full((3,), 1 / 3))
        assert (found.cross_entropies / 60).sub(math.log(size)).abs().max() < 0.2
        assert found.cross_entropies.sum() / 180 == pytest.approx(float(found.total.detach()) / 60, rel=1e-5)


def test_feed_forwards_begin_with_the_fan_in_of_one_depth() -> None:
    torch.manual_seed(0)
    for init, scale in (("depth", 1), ("released", 8)):
        head = make_head(DepthHeadOptions(width=64, heads=2, layers=1, ffn_init=init), 8, 8, 8, 4)
        for name, fan_in in (("up", 64), ("down", 128)):
            weight = head.get_parameter(f"layers.0.{name}.weight")
            assert weight.shape == ((8, 64, 128) if name == "up" else (8, 128, 64))
            bound = (fan_in * scale) ** -0.5  # uniform in ±bound, as nn.Linear: deviation bound / sqrt(3)
            assert float(weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
            assert float(weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)


def test_logits_of_all_chunks_never_exist_together() -> None:
    """In chunks, no tensor of forward or backward is as large as the logits of a quarter of the tokens.

    One chunk is enough where what it keeps is smaller than the head itself: an image under the paper's head.
    """
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    torch.manual_seed(0)
    rows, size = 256, 700
    head = make_head(DepthHeadOptions(width=8, heads=1, layers=1), 6, 5, 4, size)
    quantizer = ResidualQuantizer(4, size, 5)
    states, codes = torch.randn(rows, 6, requires_grad=True), torch.randint(size, (rows, 4))
    with Watch():
        code_losses(head, states, codes, quantizer, torch.full((4,), 0.25), chunk=16).total.backward()
    assert 0 < largest <= 16 * 4 * size < rows * 4 * size / 4
    with torch.device("meta"):
        large = make_head(DepthHeadOptions(), 8, 8, 8, 16384)
        size = sum(parameter.nbytes for parameter in large.parameters())
        kept = 8 * 4 * (16384 + 2048 + 3 * (2 * 2048 + 3 * 2048 + 4096))  # gradients of logits, norms, layers
        for rows in (1, 729, 1458, 2916, 100_000):
            chunk = chunk_rows(large, torch.zeros(rows, 8))
            assert (chunk == rows) is (rows * kept <= size)
            assert chunk * kept <= size


def test_greedy_codes_are_the_likeliest_given_themselves() -> None:
    head, states, _, quantizer = parts(rows=20)
    codes = head.greedy(states, quantizer)
    assert torch.equal(head.logits(states, codes, quantizer).argmax(-1), codes)


def test_half_precision_is_for_products_alone() -> None:
    torch.manual_seed(0)
    head = make_head(DepthHeadOptions(width=32, heads=2, layers=2), 16, 8, 3, 50)
    quantizer = ResidualQuantizer(3, 50, 8)
    quantizer.codebooks.normal_()
    states, codes = torch.randn(40, 16, requires_grad=True), torch.randint(50, (40, 3))
    weights = torch.full((3,), 1 / 3)
    full, half = (code_losses(head, states, codes, quantizer, weights, half=half) for half in (False, True))
    assert half.total.dtype is torch.float32 and float(half.total.detach()) != float(full.total.detach())
    assert float(half.total.detach()) == pytest.approx(float(full.total.detach()), rel=1e-2)
    grads = [torch.autograd.grad(found.total, [states, *head.parameters()]) for found in (full, half)]
    for exact, rough in zip(*grads, strict=True):
        assert rough.dtype is torch.float32 and float((rough - exact).norm()) < 0.05 * float(exact.norm())


def test_codes_out_of_range_are_an_error() -> None:
    head, states, codes, quantizer = parts()
    codes[2, 1] = SIZE
    with pytest.raises(ModelError, match=f"to {SIZE} for codebooks of {SIZE}: they come from another tokenizer"):
        code_losses(head, states, codes, quantizer, torch.full((DEPTH,), 1 / DEPTH))


def test_options_name_a_head_and_say_what_is_wrong() -> None:
    from foveate_asvr.head import HeadOptions

    check = TypeAdapter(HeadOptions).validate_python
    assert check("linear") == LinearHeadOptions(type="linear")
    assert check({"width": 64}) == DepthHeadOptions(width=64)
    for wrong, told in (
        ({"width": 10, "heads": 3}, "3 do not divide 10"), ({"type": "linear", "width": 8}, "width"), ("mlp", "linear"),
    ):  # fmt: skip
        with pytest.raises(ValidationError, match=told):
            check(wrong)
