"""What is trained and how it is stepped: parts and their parameters, LoRA, AdamW, schedules, clipping, movement."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from foveate.errors import ModelError, TrainingError

if TYPE_CHECKING:
    from foveate.recipe import LoraOptions, TrainRule

_WATCHED = 1 << 14
"""Elements of a parameter that `MovementCheck` remembers: enough to hit a touched row of a sparse embedding."""


@dataclass(frozen=True)
class TrainedPart:
    """A part (or dotted sub-part) that a recipe trains, its rule, and its parameters by state-dict name."""

    name: str
    rule: TrainRule
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


def part_parameters(modules: Mapping[str, nn.Module], rules: Mapping[str, TrainRule]) -> list[TrainedPart]:
    """Sets `requires_grad` on every parameter of `modules` as `rules` (part → rule) say, and returns what is trained.

    A part without a rule is frozen. A dotted name addresses a sub-module or parameter; the deepest name wins. `lora`
    injects adapters, so call this once a stage; `layers` limits a rule to those blocks. Names in the result are
    `part.parameter`; a tied parameter is there once. Raises `ModelError` for a rule that selects nothing.
    """
    owner: dict[int, str] = {}
    for name, rule in sorted(rules.items(), key=lambda item: len(item[0])):
        owner |= dict.fromkeys(map(id, _selected(modules, name, rule)), name)
    parts = {name: TrainedPart(name, rule) for name, rule in rules.items()}
    seen: set[int] = set()
    for part, module in modules.items():
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(id(parameter) in owner)
            if id(parameter) in owner and id(parameter) not in seen:
                parts[owner[id(parameter)]].parameters[f"{part}.{name}"] = parameter
            seen.add(id(parameter))
    for name, trained in parts.items():
        if not trained.parameters:
            raise ModelError(f"train: '{name}' has no parameters of its own to train. Take it out of `train`.")
    return list(parts.values())


def _selected(modules: Mapping[str, nn.Module], name: str, rule: TrainRule) -> list[nn.Parameter]:
    """The parameters that one rule addresses; adapters are injected where it asks for LoRA."""
    part, _, path = name.partition(".")
    module = modules.get(part)
    if module is None:
        raise ModelError(f"train: there is no part '{part}'. The parts are: {', '.join(modules)}.")
    if path in dict(module.named_parameters()) and not (rule.lora or rule.layers):
        return [module.get_parameter(path)]
    if path not in (names := dict(module.named_modules())):
        depth = path.count(".")
        known = ", ".join(f"{part}.{other}" for other in names if other and other.count(".") <= depth)
        raise ModelError(f"train: '{name}' is no sub-part of {part}. There are: {known or 'none'}.")
    scope = _chosen_blocks(names[path], name, rule.layers) if rule.layers else [names[path]]
    if rule.lora:
        return apply_lora(names[path], rule.lora, scope if rule.layers else None)
    return [parameter for child in scope for parameter in child.parameters()]


def _chosen_blocks(module: nn.Module, name: str, layers: str) -> list[nn.Module]:
    """The blocks of a part that the Python slice `layers` (such as "-4:") selects."""
    if not (blocks := _blocks_of(module)):
        raise ModelError(f"train: '{name}' has no blocks, so `layers: \"{layers}\"` means nothing. Leave `layers` out.")
    start, _, stop = layers.partition(":")
    chosen = blocks[int(start) if start.strip() else None : int(stop) if stop.strip() else None]
    if not chosen:
        raise ModelError(f"train: `layers: \"{layers}\"` selects none of the {len(blocks)} blocks of '{name}'.")
    return chosen


def _blocks_of(module: nn.Module) -> list[nn.Module]:
    list_blocks: Any = getattr(module, "blocks", None)
    return list(list_blocks()) if callable(list_blocks) else []


def apply_lora(module: nn.Module, options: LoraOptions, blocks: list[nn.Module] | None = None) -> list[nn.Parameter]:
    """Injects LoRA adapters (fp32 on a 16-bit base) into the linear layers of a part's blocks; returns their weights.

    peft injects in place, so that only the adapted layers change their state-dict names (`.base_layer.`, `.lora_A.`)
    until `merge_lora` restores them. `targets` are the last names of linear layers; a part without blocks is adapted
    whole. Raises `ModelError` for a target that is not there.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.functional import cast_adapter_dtype
    from transformers.pytorch_utils import Conv1D

    holder = nn.ModuleList(blocks or _blocks_of(module) or [module])  # head and embeddings lie outside the blocks
    linear = [name for name, child in holder.named_modules() if isinstance(child, (nn.Linear, Conv1D))]
    if options.targets != "all-linear":
        missing = set(options.targets) - (known := {name.rpartition(".")[2] for name in linear})
        if missing:
            raise ModelError(
                f"lora: no linear layer is called {', '.join(sorted(missing))}. There are: {', '.join(sorted(known))}."
            )
        linear = [name for name in linear if name.rpartition(".")[2] in options.targets]
    if not linear:
        raise ModelError("lora: the part has no linear layers to adapt. Train it without `lora`.")
    before = set(map(id, holder.parameters()))
    config = LoraConfig(r=options.r, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=linear)
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

    `warmup` is a fraction of `total` below 1, and a number of steps from 1 on. The factor rises linearly to 1 at the
    first step after them, then falls to 0 at `total` (`cosine`, `linear`) or stays (`constant`).
    """
    steps = min(total, math.ceil(warmup * total) if warmup < 1 else int(warmup))
    if step < steps:
        return (step + 1) / (steps + 1)
    if kind == "constant":
        return 1.0
    left = 1 - (step - steps) / max(total - steps, 1)
    return left if kind == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Gives every group its base rate times `factor`; returns part → learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return {group["part"]: group["lr"] for group in optimizer.param_groups}


def clip_gradients(parts: list[TrainedPart], max_norm: float | None, where: str) -> float:
    """Scales all gradients together to at most `max_norm` (None: leaves them); returns their L2 norm before that.

    Raises `TrainingError` that names the part, the parameter and `where` (stage, step, samples) if one is not finite.
    """
    parameters = [parameter for part in parts for parameter in part.parameters.values()]
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if not bool(torch.isfinite(norm)):
        raise TrainingError(f"{_origin(parts)} at {where}. The weights are those before this step.")
    if max_norm is not None:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def _origin(parts: list[TrainedPart]) -> str:
    for part in parts:
        for name, parameter in part.parameters.items():
            if parameter.grad is not None and (bad := int((~torch.isfinite(parameter.grad)).sum())):
                return f"the gradient of '{part.name}' is not finite: {bad} of {parameter.numel()} values of {name}"
    return "every gradient is finite, but their norm is too large for a number"


class MovementCheck:
    """Catches modules that are silently not trained, or trained although frozen.

    Made before a stage's first step, it remembers up to 16,384 evenly spread elements of every parameter and compares
    them bit by bit after the first steps: a trained part must have moved somewhere, a frozen parameter nowhere.
    """

    def __init__(self, modules: Mapping[str, nn.Module], parts: list[TrainedPart]):
        self._parts = parts
        self._before = {
            f"{part}.{name}": (parameter, _sample(parameter).clone())
            for part, module in modules.items()
            for name, parameter in module.named_parameters()
        }

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
        stray = moved.difference(*(part.parameters for part in self._parts))
        if stray:
            raise TrainingError(
                f"{where}: {sorted(stray)[0]} is frozen, but its values have changed ({len(stray)} such parameters). "
                "Something writes to it outside the optimizer: an encoder, a projector or a plugin with a bug."
            )


def _sample(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _WATCHED) | 1][:_WATCHED]
