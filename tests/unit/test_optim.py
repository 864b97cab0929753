"""Which parameters are trained, how they are stepped, and what a step may not do silently."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.optimization import get_cosine_schedule_with_warmup

from foveate.errors import ModelError, TrainingError
from foveate.optim import (
    MovementCheck,
    clip_gradients,
    make_optimizer,
    merge_lora,
    part_parameters,
    schedule_factor,
    set_learning_rates,
)

torch.set_num_threads(1)


class Lora(BaseModel):
    r: int = 4
    alpha: int = 8
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"


class Rule(BaseModel):
    """The fields of a recipe's rule, without the recipe around it."""

    lr: float = 1e-3
    weight_decay: float | None = None
    lora: Lora | None = None
    layers: str | None = None


class Llm(nn.Module):
    """A part around a real transformers model with tied embeddings."""

    def __init__(self, layers: int = 3, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        config = Qwen2Config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        self.hf: Any = Qwen2ForCausalLM(config)
        self.to(dtype)

    def blocks(self) -> list[nn.Module]:
        return list(self.hf.model.layers)

    def forward(self, ids: Tensor) -> Tensor:
        return self.hf(ids).logits


def modules(**options: Any) -> Any:
    torch.manual_seed(0)
    projector = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32))
    return {"encoder": nn.Linear(8, 8), "projector": projector, "llm": Llm(**options)}


IDS = torch.arange(24).reshape(2, 12) * 5 % 97


def rules(**kwargs: Any) -> Any:
    return {name.replace("__", "."): Rule(**value) for name, value in kwargs.items()}


def test_parts_without_a_rule_are_frozen_and_the_deepest_name_wins() -> None:
    parts = modules()
    chosen = part_parameters(parts, {"llm": Rule(), "llm.hf.model.norm": Rule(lr=0.5), "projector.0.bias": Rule()})
    assert not any(p.requires_grad for p in parts["encoder"].parameters())
    assert [name for name, p in parts["projector"].named_parameters() if p.requires_grad] == ["0.bias"]
    by_name = {part.name: part for part in chosen}
    assert list(by_name["llm.hf.model.norm"].parameters) == ["llm.hf.model.norm.weight"]
    assert "llm.hf.model.norm.weight" not in by_name["llm"].parameters
    llm = parts["llm"]
    assert sum(len(by_name[name].parameters) for name in ("llm", "llm.hf.model.norm")) == len(list(llm.parameters()))


def test_tied_weights_are_one_parameter() -> None:
    parts = modules()
    (part,) = part_parameters(parts, {"llm": Rule()})
    names = [name for name in part.parameters if "embed_tokens" in name or "lm_head" in name]
    assert names == ["llm.hf.model.embed_tokens.weight"]
    assert sum(p.numel() for p in part.parameters.values()) == parts["llm"].hf.num_parameters()


@pytest.mark.parametrize(("layers", "expected"), [("-2:", {1, 2}), (":1", {0}), ("1:2", {1}), (":", {0, 1, 2})])
def test_layers_selects_blocks(layers: str, expected: set[int]) -> None:
    (part,) = part_parameters(modules(), {"llm": Rule(layers=layers)})
    assert {int(name.split("layers.")[1].split(".")[0]) for name in part.parameters} == expected


@pytest.mark.parametrize(
    ("name", "rule", "words"),
    [
        ("victor", Rule(), ["there is no 'victor'; known: encoder, llm, projector"]),
        ("llm.hf.modell", Rule(), ["there is no 'llm.hf.modell'; did you mean 'llm.hf.model'?"]),
        ("llm", Rule(layers="7:"), ["layers: 7:` is none of the 3 blocks"]),
        ("projector", Rule(layers="-1:"), ["none of the 0 blocks of 'projector'"]),
        ("projector.1", Rule(), ["'projector.1' has no parameters"]),
        ("llm", Rule(lora=Lora(targets=["q_proj", "query"])), ["is called query", "q_proj"]),
        ("projector.2", Rule(lora=Lora()), ["There are: none."]),
    ],
)
def test_a_rule_that_selects_nothing_is_an_error(name: str, rule: Any, words: Sequence[str]) -> None:
    with pytest.raises(ModelError) as caught:
        part_parameters(modules(), {name: rule})
    assert all(word in str(caught.value) for word in words), caught.value


def test_weight_decay_spares_vectors_and_rules_override_the_stage() -> None:
    parts = modules()
    parts["encoder"] = nn.Module()
    parts["encoder"].cls = nn.Parameter(torch.zeros(1, 1, 8))
    parts["encoder"].positions = nn.Parameter(torch.zeros(1, 4, 8))
    chosen = part_parameters(parts, rules(encoder={"lr": 0.1}, projector={"lr": 0.2, "weight_decay": 0.5}))
    optimizer = make_optimizer(chosen, weight_decay=0.1, betas=(0.8, 0.9))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decay[id(p)] for part in chosen for name, p in part.parameters.items()}
    assert found == {
        "encoder.cls": 0.0,
        "encoder.positions": 0.1,
        "projector.0.weight": 0.5,
        "projector.0.bias": 0.0,
        "projector.2.weight": 0.0,
        "projector.2.bias": 0.0,
        "projector.3.weight": 0.5,
        "projector.3.bias": 0.0,
    }
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
    assert set_learning_rates(optimizer, 0.5) == {"encoder": 0.05, "projector": 0.1}
    assert set_learning_rates(optimizer, 0.25) == {"encoder": 0.025, "projector": 0.05}


def test_steps_equal_the_adamw_formula_in_float64() -> None:
    parts: Any = {"projector": nn.Linear(3, 2).double()}
    weight = parts["projector"].weight
    w = weight.detach().clone()
    chosen = part_parameters(parts, {"projector": Rule(lr=0.1, weight_decay=0.3)})
    optimizer = make_optimizer(chosen, weight_decay=0.0, betas=(0.9, 0.99))
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(5):
        gradient = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3) * (step + 1)
        rate = 0.1 * schedule_factor("linear", step, 5, 0.4)
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        update = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
        w = w * (1 - rate * 0.3) - rate * update
        weight.grad = gradient
        set_learning_rates(optimizer, schedule_factor("linear", step, 5, 0.4))
        optimizer.step()
    torch.testing.assert_close(weight.detach(), w, atol=1e-12, rtol=1e-12)


def test_cosine_schedule_follows_transformers_after_the_warm_up() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_cosine_schedule_with_warmup(optimizer, 10, 100)
    for step in range(100):
        if step >= 10:
            assert schedule_factor("cosine", step, 100, 0.1) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1, 7, 1000])
@pytest.mark.parametrize("total", [1, 2, 40])
def test_schedule_never_wastes_a_step_and_peaks_after_the_warm_up(kind: str, warmup: float, total: int) -> None:
    factors = [schedule_factor(kind, step, total, warmup) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    steps = min(total, math.ceil(warmup * total) if warmup < 1 else int(warmup))
    assert factors[:steps] == sorted(factors[:steps])
    assert factors[steps:] == sorted(factors[steps:], reverse=True)
    if steps < total:
        assert factors[steps] == 1.0


def test_clipping_equals_a_float64_reference() -> None:
    parts = modules()
    chosen = part_parameters(parts, rules(projector={}, llm={}))
    parts["llm"](IDS).logsumexp(-1).sum().backward()
    gradients = [p.grad.double().clone() for part in chosen for p in part.parameters.values() if p.grad is not None]
    reference = math.sqrt(sum(float((g * g).sum()) for g in gradients))
    assert clip_gradients(chosen, None, "here") == pytest.approx(reference, rel=1e-5)
    assert clip_gradients(chosen, 0.5, "here") == pytest.approx(reference, rel=1e-5)
    after = [p.grad for part in chosen for p in part.parameters.values() if p.grad is not None]
    for gradient, clipped in zip(gradients, after, strict=True):
        torch.testing.assert_close(clipped.double(), gradient * min(1, 0.5 / reference), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_names_its_origin(value: float) -> None:
    parts = modules()
    chosen = part_parameters(parts, rules(projector={}, llm={}))
    for part in chosen:
        for parameter in part.parameters.values():
            parameter.grad = torch.ones_like(parameter)
    grad = parts["projector"][3].weight.grad
    grad[0, :3] = value
    with pytest.raises(TrainingError, match=r"'projector' .* 3 of 1024 .* projector\.3\.weight at align, step 7"):
        clip_gradients(chosen, 1.0, "align, step 7")


def test_movement_of_a_healthy_stage_passes() -> None:
    parts = modules()
    chosen = part_parameters(parts, rules(llm={"lr": 1e-4}))
    optimizer = make_optimizer(chosen, 0.0, (0.9, 0.999))
    check = MovementCheck(parts, chosen)
    before = parts["projector"][0].weight.detach().clone()
    parts["llm"](IDS).logsumexp(-1).sum().backward()
    optimizer.step()
    check.verify("align, step 1")
    assert torch.equal(parts["projector"][0].weight, before)
    with pytest.raises(TrainingError, match="is frozen, but its values have changed"):
        _as_if_frozen(check).verify("align, step 1")


def _as_if_frozen(check: MovementCheck) -> MovementCheck:
    """The same memory of values, of a stage that trains nothing: whatever is seen to have moved is an error."""
    other = copy.copy(check)
    other._parts = []
    return other


def test_a_trained_part_that_does_not_move_is_an_error() -> None:
    parts = modules()
    chosen = part_parameters(parts, rules(projector={}, llm={}))
    optimizer = make_optimizer(chosen, 0.0, (0.9, 0.999))
    check = MovementCheck(parts, chosen)
    parts["llm"](IDS).logsumexp(-1).sum().backward()
    optimizer.step()
    with pytest.raises(TrainingError, match="align, step 1: 'projector' is to be trained"):
        check.verify("align, step 1")
    check.verify("align, step 1", idle={"projector"})


def test_a_frozen_parameter_that_moves_is_an_error() -> None:
    parts = modules()
    chosen = part_parameters(parts, rules(projector={}))
    check = MovementCheck(parts, chosen)
    with torch.no_grad():
        parts["projector"][0].weight.add_(1e-3)
        parts["llm"].hf.model.layers[1].mlp.up_proj.weight[0].add_(1e-6)
    with pytest.raises(TrainingError, match=r"llm\.hf\.model\.layers\.1\.mlp\.up_proj\.weight is frozen"):
        check.verify("align, step 1")


def test_a_large_embedding_of_which_few_rows_are_used_is_seen_to_move() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(50_000, 64)
    parts: Any = {"llm": table}
    chosen = part_parameters(parts, rules(llm={}))
    optimizer = make_optimizer(chosen, 0.0, (0.9, 0.999))
    check = MovementCheck(parts, chosen)
    table(torch.randint(50_000, (100,))).square().sum().backward()
    optimizer.step()
    check.verify("align, step 1")
    with pytest.raises(TrainingError, match="is frozen, but its values have changed"):
        _as_if_frozen(check).verify("align, step 1")


def test_bf16_weights_that_a_small_rate_cannot_move_are_caught() -> None:
    parts: Any = {"projector": nn.Linear(16, 16).to(torch.bfloat16)}
    with torch.no_grad():
        for parameter in parts["projector"].parameters():
            parameter.fill_(1.0)
    chosen = part_parameters(parts, rules(projector={"lr": 1e-5}))
    optimizer = make_optimizer(chosen, 0.0, (0.9, 0.999))
    check = MovementCheck(parts, chosen)
    parts["projector"](torch.ones(1, 16, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    with pytest.raises(TrainingError, match="too small for its dtype"):
        check.verify("align, step 1")


def test_lora_trains_adapters_only_and_merging_restores_names_and_keeps_the_function() -> None:
    parts = modules()
    llm = parts["llm"]
    names, before = list(llm.state_dict()), {name: t.clone() for name, t in llm.state_dict().items()}
    with torch.no_grad():
        plain = llm(IDS)
    (part,) = part_parameters(parts, {"llm": Rule(lr=1e-2, lora=Lora(r=4))})
    linear = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]  # q k v o gate up down
    assert sum(p.numel() for p in part.parameters.values()) == 3 * sum(4 * (a + b) for a, b in linear)
    assert all(p.requires_grad == ("lora_" in name) for name, p in llm.named_parameters())
    assert not any("lm_head" in name or "embed" in name for name in part.parameters)
    with torch.no_grad():
        torch.testing.assert_close(llm(IDS), plain, rtol=0, atol=0)  # B starts at zero

    optimizer = make_optimizer([part], 0.0, (0.9, 0.999))
    check = MovementCheck(parts, [part])
    for _ in range(3):
        optimizer.zero_grad()
        llm(IDS).logsumexp(-1).sum().backward()
        clip_gradients([part], 1.0, "test")
        optimizer.step()
    check.verify("step 3")

    state = llm.state_dict()
    prefix = "hf.model.layers.1.mlp.up_proj"
    product = state[f"{prefix}.lora_B.default.weight"].double() @ state[f"{prefix}.lora_A.default.weight"].double()
    with torch.no_grad():
        trained = llm(IDS)
    merge_lora(llm)
    assert list(llm.state_dict()) == names
    reference = before[f"{prefix}.weight"].double() + product * 8 / 4
    torch.testing.assert_close(llm.state_dict()[f"{prefix}.weight"].double(), reference, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(llm(IDS), trained, rtol=1e-4, atol=1e-5)
    assert (trained - plain).abs().max() > 1e-3


def test_lora_in_some_layers_and_with_chosen_targets() -> None:
    parts = modules()
    (part,) = part_parameters(parts, {"llm": Rule(layers="-1:", lora=Lora(targets=["q_proj", "v_proj"]))})
    where = {name.split(".lora_")[0] for name in part.parameters}
    assert where == {"llm.hf.model.layers.2.self_attn.q_proj", "llm.hf.model.layers.2.self_attn.v_proj"}


def test_lora_in_two_stages_after_one_another() -> None:
    parts = modules()
    for _ in range(2):
        (part,) = part_parameters(parts, {"llm": Rule(lora=Lora())})
        assert len(part.parameters) == 3 * 7 * 2
        merge_lora(parts["llm"])
    assert not any("lora" in name for name in parts["llm"].state_dict())


def test_lora_adapters_of_a_bf16_base_are_fp32_and_a_part_without_blocks_is_adapted_whole() -> None:
    parts = modules(dtype=torch.bfloat16)
    chosen = part_parameters(parts, rules(llm={"lora": Lora()}, projector={"lora": Lora()}))
    assert {p.dtype for part in chosen for p in part.parameters.values()} == {torch.float32}
    assert {name.split(".")[1] for name in chosen[1].parameters} == {"0", "3"}
    assert {p.dtype for p in parts["llm"].parameters() if not p.requires_grad} == {torch.bfloat16}
    parts["llm"](IDS).float().logsumexp(-1).sum().backward()
    merge_lora(parts["llm"])
    assert {p.dtype for p in parts["llm"].parameters()} == {torch.bfloat16}


def test_selection_works_without_weights_on_the_meta_device() -> None:
    with torch.device("meta"):
        parts: Any = {"llm": Llm()}
        (part,) = part_parameters(parts, {"llm": Rule(lora=Lora(r=2))})
    assert all(p.is_meta for p in part.parameters.values())
    assert len(part.parameters) == 3 * 7 * 2
