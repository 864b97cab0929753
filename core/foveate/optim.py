"""What is trained and how it is stepped: parts and their parameters, LoRA, AdamW, schedules, clipping, movement."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from foveate.errors import ModelError, TrainingError
from foveate.explain import did_you_mean
from foveate.recipe import LoraOptions, TrainRule

_WATCHED = 1 << 14
"""Elements of a parameter that `MovementCheck` remembers: enough to hit a row of a sparsely used embedding."""


@dataclass(frozen=True)
class TrainedPart:
    """A part (or dotted sub-part) that a stage trains, its rule, and its parameters by state-dict name."""

    name: str
    rule: TrainRule
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


def part_parameters(
    modules: Mapping[str, nn.Module], rules: Mapping[str, TrainRule], fixed: Collection[int] = ()
) -> list[TrainedPart]:
    """Sets `requires_grad` on every parameter of `modules` as `rules` (part → rule) say; returns what is trained.

    What no rule names is frozen; of dotted names (sub-modules, parameters) the deepest wins. A tied parameter is there
    once. `lora` injects adapters, so call this once a stage. `fixed`: ids of parameters that no rule trains (averages
    of an objective). Raises `ModelError` for a rule that selects nothing.
    """
    owner: dict[int, str] = {}
    for name, rule in sorted(rules.items(), key=lambda item: len(item[0])):
        owner |= {id(parameter): name for parameter in _selected(modules, name, rule) if id(parameter) not in fixed}
    parts = {name: TrainedPart(name, rule) for name, rule in rules.items()}
    for part, module in modules.items():
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(id(parameter) in owner)
            if id(parameter) in owner:
                parts[owner[id(parameter)]].parameters[f"{part}.{name}"] = parameter
    if empty := [name for name, part in parts.items() if not part.parameters]:
        raise ModelError(f"train: '{empty[0]}' has no parameters of its own to train. Take it out of `train`.")
    return list(parts.values())


def _selected(modules: Mapping[str, nn.Module], name: str, rule: TrainRule) -> list[nn.Parameter]:
    """The parameters that one rule addresses; adapters are injected where it asks for LoRA."""
    places: dict[str, Any] = {}
    for part, module in modules.items():
        inside = {**dict(module.named_modules()), **dict(module.named_parameters())}
        places |= {f"{part}.{path}".rstrip("."): found for path, found in inside.items()}
    if name not in places:
        near = [place for place in places if place.count(".") <= name.count(".")]
        raise ModelError(f"train: there is no '{name}'{did_you_mean(name, near)}")
    found, blocks = places[name], None
    if rule.layers:
        start, _, stop = (text.strip() for text in rule.layers.partition(":"))
        blocks = _blocks(found)[int(start) if start else None : int(stop) if stop else None]
        if not blocks:
            raise ModelError(f"train: `layers: {rule.layers}` is none of the {len(_blocks(found))} blocks of '{name}'.")
    if rule.lora:
        return apply_lora(found, rule.lora, blocks)
    if blocks:
        return [parameter for block in blocks for parameter in block.parameters()]
    return [found] if isinstance(found, nn.Parameter) else list(found.parameters())


def _blocks(module: Any) -> list[nn.Module]:
    return list(module.blocks()) if hasattr(module, "blocks") else []


def apply_lora(module: nn.Module, options: LoraOptions, blocks: list[nn.Module] | None = None) -> list[nn.Parameter]:
    """Injects LoRA adapters (fp32 on a 16-bit base) into the linear layers of a part's blocks; returns their weights.

    In place: only adapted layers change their state-dict names, until `merge_lora`. `targets` are last names of linear
    layers; a part without blocks is adapted whole. Raises `ModelError` for a target that is not there.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.functional import cast_adapter_dtype
    from transformers.pytorch_utils import Conv1D

    holder = nn.ModuleList(blocks or _blocks(module) or [module])  # head and embeddings lie outside the blocks
    linear = [name for name, child in holder.named_modules() if isinstance(child, (nn.Linear, Conv1D))]
    known = {name.rpartition(".")[2] for name in linear}
    wanted = known if options.targets == "all-linear" else set(options.targets)
    if not linear or wanted - known:
        missing = ", ".join(sorted(wanted - known)) or "anything"
        raise ModelError(f"lora: no linear layer is called {missing}. There are: {', '.join(sorted(known)) or 'none'}.")
    before = set(map(id, holder.parameters()))
    targets = [name for name in linear if name.rpartition(".")[2] in wanted]
    config = LoraConfig(r=options.r, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=targets)
    inject_adapter_in_model(config, holder)
    cast_adapter_dtype(holder, "default")
    return [parameter for parameter in holder.parameters() if id(parameter) not in before]


def merge_lora(module: nn.Module) -> None:
    """Adds every LoRA adapter of `module` to the weight it adapts and takes it out; names are the original again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())


def make_optimizer(parts: list[TrainedPart], weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW with a group per (part, decayed or not). Vectors (norms, biases, class tokens) are never decayed."""
    groups: list[dict[str, Any]] = []
    for part in parts:
        decay = weight_decay if part.rule.weight_decay is None else part.rule.weight_decay
        for vectors in (False, True):
            chosen = [parameter for parameter in part.parameters.values() if _is_vector(parameter) == vectors]
            group = {"part": part.name, "base_lr": part.rule.lr, "lr": part.rule.lr}
            if chosen:
                groups.append({**group, "params": chosen, "weight_decay": 0.0 if vectors else decay})
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def _is_vector(parameter: Tensor) -> bool:
    return parameter.ndim < 2 or (parameter.ndim > 2 and parameter.numel() == parameter.shape[-1])


def schedule_factor(kind: str, step: int, total: int, warmup: float) -> float:
    """What the learning rate of step `step` (from 0) of `total` is multiplied with: 0 < factor <= 1.

    `warmup`: a fraction of `total` below 1, steps from 1 on. The factor rises linearly to 1 at the first step after
    them, then falls to 0 at `total` (`cosine`, `linear`) or stays (`constant`).
    """
    steps = min(total, math.ceil(warmup * total) if warmup < 1 else int(warmup))
    if step < steps:
        return (step + 1) / (steps + 1)
    left = 1 - (step - steps) / max(total - steps, 1)
    return {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[kind]


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Gives every group its base rate times `factor`; returns part → learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return {group["part"]: group["lr"] for group in optimizer.param_groups}


def clip_gradients(parts: list[TrainedPart], max_norm: float | None, where: str) -> float:
    """Scales all gradients together to at most `max_norm` (None: leaves them); returns their L2 norm before that.

    Raises `TrainingError` that names the part, the parameter and `where` (stage, step, samples) if one is not finite.
    """
    named = {name: (part.name, p) for part in parts for name, p in part.parameters.items() if p.grad is not None}
    norm = get_total_norm([parameter.grad for _, parameter in named.values()])  # type: ignore[misc]
    if not torch.isfinite(norm):
        origin = "every gradient is finite, but their norm is too large for a number"
        for name, (part, parameter) in reversed(named.items()):
            if bad := int((~torch.isfinite(parameter.grad)).sum()):  # type: ignore[arg-type]
                origin = f"the gradient of '{part}' is not finite: {bad} of {parameter.numel()} values of {name}"
        raise TrainingError(f"{origin} at {where}. The weights are those before this step.")
    if max_norm is not None:
        clip_grads_with_norm_([parameter for _, parameter in named.values()], max_norm, norm)
    return float(norm)


class MovementCheck:
    """Catches modules that are silently not trained, or trained although frozen.

    Made before a stage's first step, it remembers up to 16,384 evenly spread elements of every parameter and compares
    them after the first steps: a trained part must have moved somewhere, a frozen parameter nowhere. `fixed`: ids of
    those that somebody else moves.
    """

    def __init__(self, modules: Mapping[str, nn.Module], parts: list[TrainedPart], fixed: Collection[int] = ()):
        self._parts = parts
        named = {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}
        named = {name: parameter for name, parameter in named.items() if id(parameter) not in fixed}
        self._before = {name: (parameter, _sample(parameter).clone()) for name, parameter in named.items()}

    def verify(self, where: str, idle: Collection[str] = ()) -> None:
        """Raises `TrainingError` that names what has moved or not moved against the recipe; `idle` parts may rest."""
        moved = {name for name, (parameter, before) in self._before.items() if not _sample(parameter).equal(before)}
        for part in self._parts:
            if part.name not in idle and moved.isdisjoint(part.parameters):
                raise TrainingError(
                    f"{where}: '{part.name}' is to be trained (lr {part.rule.lr:g}), but none of its "
                    f"{len(part.parameters)} parameters has moved. Nothing in the loss depends on it, or its learning "
                    "rate is too small for its dtype: freeze it (take it out of `train`) or raise the rate."
                )
        if stray := sorted(moved.difference(*(part.parameters for part in self._parts))):
            raise TrainingError(
                f"{where}: {stray[0]} is frozen, but its values have changed ({len(stray)} such parameters). "
                "Something writes to it outside the optimizer: an encoder, a projector or a plugin with a bug."
            )


def _sample(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _WATCHED) | 1][:_WATCHED]
