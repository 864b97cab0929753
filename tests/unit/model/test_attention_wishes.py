"""Objectives' wishes of the attention against a dense computation whose mask is the rule in words, pair by pair."""

from __future__ import annotations

import functools
import itertools
import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from foveate.errors import ModelError
from foveate.model import attention
from foveate.model.attention import Segments, image_blocks, packed_attention, prefix_blocks
from foveate.model.language import TransformersLLM, TransformersLLMOptions, check_language_model
from tests.models import VOCABULARY, llm_config

CPU = torch.device("cpu")
WINDOW = {"qwen2": None, "llama": None, "mistral": 6}


class Layer(nn.Module):
    """What a model hands over as itself."""

    is_causal = True


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def seed() -> int:
    """A new one each time; pytest prints it with a failure."""
    number = random.SystemRandom().randrange(2**31)
    torch.manual_seed(number)
    return number


def dense(lengths: tuple[int, ...], blocks: Tensor, groups: Tensor | None = None, window: int | None = None) -> Tensor:
    """`[T, T]` bool, who (rows) sees whom (columns), as the rule says it."""
    sample = [number for number, length in enumerate(lengths) for _ in range(length)]
    block, total = blocks.tolist(), sum(lengths)
    group = [0] * total if groups is None else groups.tolist()
    sees = torch.zeros(total, total, dtype=torch.bool)
    for i in range(total):
        for j in range(total):
            if sample[i] != sample[j]:
                continue
            if window is not None and abs(i - j) >= window:
                continue
            if block[i] != 0 and block[i] == block[j]:
                sees[i, j] = group[j] == 0 or group[j] == group[i]
            else:
                sees[i, j] = j <= i
    return sees


def dense_attention(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, scale: float) -> Tensor:
    """softmax(QKᵀ)V over the whole row, every key head repeated for its query heads."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights = (q @ k.transpose(-1, -2) * scale).masked_fill(~sees, -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2)


def draw(seed: int) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """Segments, blocks and groups by chance: runs of equal lengths, segments without a block, adjacent blocks, numbers
    that another segment has too, and groups outside of blocks."""
    dice = random.Random(seed)
    lengths: list[int] = []
    while len(lengths) < 7:
        lengths += [dice.randint(1, 13)] * dice.choice((1, 1, 2, 3))
    blocks: list[int] = []
    for length in lengths:
        numbers = [0] * length
        if dice.random() < 0.7:
            cuts = sorted(dice.randint(0, length) for _ in range(3))
            for number, (start, stop) in enumerate(itertools.pairwise(cuts), start=1):
                numbers[start:stop] = [number] * (stop - start)
        blocks += numbers
    groups = [dice.randint(0, 3) for _ in blocks]
    return tuple(lengths), torch.tensor(blocks), torch.tensor(groups)


def row(total: int, heads: int = 6, key_heads: int = 6, width: int = 4) -> list[Tensor]:
    """Query, key and value as models make them: views of `[1, T, heads, width]`."""
    shapes = [(1, total, count, width) for count in (heads, key_heads, key_heads)]
    return [torch.randn(shape, dtype=torch.float64).transpose(1, 2).requires_grad_() for shape in shapes]


def packed(q: Tensor, k: Tensor, v: Tensor, segments: Segments, **wishes: Any) -> Tensor:
    return packed_attention(Layer(), q, k, v, None, segments=segments, **wishes)[0]


@pytest.mark.parametrize("key_heads", [6, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("grouped", [False, True])
def test_equals_dense_attention_by_the_rule(key_heads: int, window: int | None, grouped: bool, seed: int) -> None:
    lengths, blocks, drawn = draw(seed)
    groups = drawn if grouped else None
    q, k, v = row(sum(lengths), key_heads=key_heads)
    ours = packed(q, k, v, Segments.of(lengths, CPU, blocks, groups), scaling=0.7, sliding_window=window)
    theirs = dense_attention(q, k, v, dense(lengths, blocks, groups, window), 0.7)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    weights = torch.randn_like(theirs)
    mine, stock = (torch.autograd.grad((out * weights).sum(), [q, k, v]) for out in (ours, theirs))
    for name, a, b in zip("qkv", mine, stock, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_equally_long_segments_with_other_blocks_each_have_their_own_mask(seed: int) -> None:
    lengths = (8, 8, 8, 8)
    blocks = image_blocks(32, [(0, 8), (9, 3), (16, 2), (18, 2)])  # the last segment has none
    segments = Segments.of(lengths, CPU, blocks)
    assert segments.runs == [(3, 8), (1, 8)] and segments.blocked == (True, True, True, False)
    first, last = segments.masks(None)
    assert first is not None and first.shape == (3, 1, 8, 8) and last is None
    q, k, v = row(32)
    theirs = dense_attention(q, k, v, dense(lengths, blocks), 0.5)
    torch.testing.assert_close(packed(q, k, v, segments), theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("blocks", [None, torch.zeros(31, dtype=torch.int64)], ids=["none", "empty"])
@pytest.mark.parametrize("window", [None, 3])
def test_without_a_block_every_bit_is_plain_causal_attention(
    blocks: Tensor | None, window: int | None, seed: int
) -> None:
    lengths = (6, 6, 1, 1, 9, 8)
    q, k, v = row(31, key_heads=2)
    segments = Segments.of(lengths, CPU, blocks, blocks)
    assert segments.blocks is None and segments.groups is None
    ours = packed(q, k, v, segments, sliding_window=window, scaling=0.3)
    outputs, start = [], 0
    for count, length in ((2, 6), (2, 1), (1, 9), (1, 8)):
        parts = (x[0, :, start : start + count * length].unflatten(1, (count, length)) for x in (q, k, v))
        ones = torch.ones(length, length, dtype=torch.bool)
        band = ones.tril() & ones.triu(1 - window) if window is not None and length > window else None
        out = F.scaled_dot_product_attention(
            *(part.transpose(0, 1) for part in parts), band, is_causal=band is None, scale=0.3, enable_gqa=True
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        start += count * length
    theirs = torch.cat(outputs)[None]
    assert torch.equal(ours, theirs)
    weights = torch.randn_like(ours)
    mine, plain = (torch.autograd.grad((out * weights).sum(), [q, k, v]) for out in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))


def test_a_segment_without_a_block_does_not_feel_its_neighbours_blocks_by_a_single_bit(seed: int) -> None:
    lengths = (7, 5, 9)
    q, k, v = row(21)
    plain = packed(q, k, v, Segments.of(lengths, CPU))
    beside = packed(q, k, v, Segments.of(lengths, CPU, image_blocks(21, [(1, 5), (12, 9)])))
    assert torch.equal(beside[:, 7:12], plain[:, 7:12]) and not torch.equal(beside[:, 12:], plain[:, 12:])


def test_a_segment_with_a_block_does_not_depend_on_its_neighbours_by_a_single_bit(seed: int) -> None:
    lengths = (7, 7, 7, 9)
    segments = Segments.of(lengths, CPU, image_blocks(30, [(0, 7), (8, 4), (15, 3), (21, 9)]))
    q, k, v = row(30)
    before = packed(q, k, v, segments)[:, 7:14]
    with torch.no_grad():
        for tensor in (q, k, v):
            tensor[:, :, :7] += 3
            tensor[:, :, 14:] = float("nan")
    assert torch.equal(packed(q, k, v, segments)[:, 7:14], before)
    q, k, v = row(30)
    for gradient in torch.autograd.grad(packed(q, k, v, segments)[:, 7:14].sum(), [q, k, v]):
        assert not gradient[:, :, :7].any() and not gradient[:, :, 14:].any() and gradient[:, :, 7:14].any()


def test_no_layer_reads_a_value_from_the_device() -> None:
    """Tensors of the meta device have no values: whoever asks for one fails."""
    meta = torch.device("meta")
    segments = Segments.of((5, 5, 3, 8), meta, image_blocks(21, [(1, 3), (14, 6)]), torch.zeros(21, dtype=torch.int64))
    q, k, v = (x.detach().to(meta) for x in row(21, key_heads=2))
    assert packed(q, k, v, segments, sliding_window=4).shape == (1, 21, 6, 4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"blocks": torch.zeros(12, dtype=torch.int64)}, r"blocks must be one int64 a token, \[13\].*\[12\]"),
        ({"blocks": torch.zeros(13)}, "blocks must be one int64 a token.*float32"),
        ({"blocks": torch.ones(13).long(), "groups": torch.zeros(1, 13).long()}, r"groups must be.*\[1, 13\]"),
        ({"groups": torch.zeros(13, dtype=torch.int64)}, "without the blocks"),
    ],
)
def test_blocks_and_groups_that_do_not_fit_are_refused(given: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        Segments.of((5, 8), CPU, **given)


def test_image_blocks() -> None:
    blocks = image_blocks(10, [(6, 3), (-1, 0), (1, 2), (3, 2)])
    assert blocks.tolist() == [0, 3, 3, 4, 4, 0, 1, 1, 1, 0] and blocks.dtype == torch.int64
    assert image_blocks(3, []).tolist() == [0, 0, 0]
    for spans, said in (([(8, 3)], "outside"), ([(-1, 2)], "outside"), ([(1, 4), (4, 2)], "overlap")):
        with pytest.raises(ModelError, match=said):
            image_blocks(10, spans)


def test_prefix_blocks() -> None:
    blocks = prefix_blocks((4, 2, 3), (2, 0, 3))
    assert blocks.tolist() == [1, 1, 0, 0, 0, 0, 3, 3, 3] and blocks.dtype == torch.int64
    assert prefix_blocks((), ()).shape == (0,)
    for prompts, said in (((2, 3, 0), "sample 1.*3 tokens.*length of 2"), ((1, 1), "2 prompts.*3 samples")):
        with pytest.raises(ModelError, match=said):
            prefix_blocks((4, 2, 3), prompts)


# --- Whole models -----------------------------------------------------------------------------------------------------

LENGTHS = (4, 13, 13, 6)
"""Text; text, image, image, text; image first, text; text and an image at the end."""
IMAGES = [(5, 4), (9, 5), (17, 6), (33, 3)]
GROUPED = torch.zeros(36, dtype=torch.int64).index_copy(
    0, torch.tensor([6, 7, 9, 11, 12, 18, 19, 21]), torch.tensor([1, 2, 1, 1, 2, 3, 3, 1])
)
WISHES: dict[str, tuple[Tensor | None, Tensor | None]] = {
    "causal": (None, None),
    "image_bidirectional": (image_blocks(36, IMAGES), None),
    "prefix_bidirectional": (prefix_blocks(LENGTHS, (2, 11, 0, 6)), None),
    "groups": (image_blocks(36, IMAGES), GROUPED),
}


def build(family: str) -> TransformersLLM:
    return TransformersLLM(TransformersLLMOptions(config=llm_config(family))).double().eval()


def positions() -> Tensor:
    return torch.cat([torch.arange(length) for length in LENGTHS])


def rule(wish: str, window: int | None) -> Tensor:
    blocks, groups = WISHES[wish]
    return dense(LENGTHS, torch.zeros(36).long() if blocks is None else blocks, groups, window)


@pytest.mark.parametrize("family", WINDOW)
@pytest.mark.parametrize("wish", WISHES)
@torch.no_grad()
def test_a_token_changes_exactly_the_states_that_may_see_it(family: str, wish: str, seed: int) -> None:
    """Each token in turn is changed. What it reaches through two layers changes; nothing else does, by a single bit:
    no text before an image, no earlier visual token without the wish, no other sample."""
    llm = build(family)
    check_language_model(llm, CPU)
    embeds = llm.embed(torch.randint(VOCABULARY, (36,)))

    def states(inputs: Tensor) -> Tensor:
        return llm(inputs, positions(), Segments.of(LENGTHS, CPU, *WISHES[wish]))

    once = rule(wish, WINDOW[family]).double()
    twice, before = (once @ once) > 0, states(embeds)
    for token in range(36):
        changed = embeds.clone()
        changed[token] += torch.randn(embeds.shape[1], dtype=embeds.dtype)
        moved = (states(changed) != before).any(1)
        assert torch.equal(moved, twice[:, token]), f"token {token}"


@pytest.mark.parametrize("family", WINDOW)
@pytest.mark.parametrize("wish", WISHES)
def test_states_and_gradients_equal_the_stock_model_under_the_same_mask(family: str, wish: str, seed: int) -> None:
    llm = build(family)
    fields = llm_config(family)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields), attn_implementation="sdpa"
    )
    model.double().eval().load_state_dict(llm.model.state_dict())
    embeds = llm.embed(torch.randint(VOCABULARY, (36,))).detach().requires_grad_()
    ours = llm(embeds, positions(), Segments.of(LENGTHS, CPU, *WISHES[wish]))
    mask = rule(wish, WINDOW[family])
    theirs = model.base_model(
        inputs_embeds=embeds[None], position_ids=positions()[None], attention_mask=mask[None, None], use_cache=False
    ).last_hidden_state[0]
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    weights = torch.randn_like(ours)
    (mine,), (stock,) = (torch.autograd.grad((out * weights).sum(), [embeds]) for out in (ours, theirs))
    torch.testing.assert_close(mine, stock, atol=1e-9 * float(stock.abs().max()), rtol=1e-9)


@pytest.mark.parametrize("family", WINDOW)
def test_gradient_checkpointing_changes_no_bit_and_masks_are_made_once(
    family: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, ...]] = []
    make = attention._block_mask

    def counted(blocks: Tensor, groups: Tensor | None, window: int | None) -> Tensor:
        made.append(tuple(blocks.shape))
        return make(blocks, groups, window)

    monkeypatch.setattr(attention, "_block_mask", counted)
    llm = build(family).train()
    embeds = llm.embed(torch.randint(VOCABULARY, (36,))).detach().requires_grad_()
    weights = torch.randn(36, llm.width, dtype=torch.float64)
    trained = [embeds, *(parameter for parameter in llm.body.parameters() if parameter.ndim > 1)][:8]

    def gradients() -> tuple[Tensor, ...]:
        states = llm(embeds, positions(), Segments.of(LENGTHS, CPU, *WISHES["groups"]))
        return torch.autograd.grad((states * weights).sum(), trained, allow_unused=True)

    whole = gradients()
    assert made == [(2, 13), (1, 6)]  # two layers, two runs that hold a block
    calls: list[nn.Module] = []
    for block in llm.blocks():
        block.get_submodule("self_attn").register_forward_hook(lambda module, *_: calls.append(module))
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    again = gradients()
    assert len(calls) == 4 and len(made) == 4  # each block ran twice, with the masks of its first time
    for a, b in zip(whole, again, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    assert whole[0] is not None and whole[0].any()


@pytest.mark.gpu
@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize("window", [None, 37])
def test_cuda_16_bit_equals_dense(key_heads: int, window: int | None, seed: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    lengths = (130, 64, 64, 7)
    blocks = image_blocks(265, [(3, 100), (140, 33), (194, 64)])
    groups = torch.randint(3, (265,))
    q, k, v = row(265, heads=8, key_heads=key_heads, width=64)
    leaves = [x.detach().cuda().bfloat16().requires_grad_() for x in (q, k, v)]
    ours = packed(*leaves, Segments.of(lengths, torch.device("cuda"), blocks, groups), sliding_window=window)
    theirs = dense_attention(q, k, v, dense(lengths, blocks, groups, window), 0.125)
    torch.testing.assert_close(ours.double().cpu(), theirs, atol=0.03, rtol=0.03)
    weights = torch.randn_like(theirs)
    mine = torch.autograd.grad((ours * weights.cuda()).sum(), leaves)
    for a, b in zip(mine, torch.autograd.grad((theirs * weights).sum(), [q, k, v]), strict=True):
        assert float((a.double().cpu() - b).norm() / b.norm()) < 0.03
