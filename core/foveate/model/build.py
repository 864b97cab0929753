"""From a recipe's `model:` to an LMM, and from an LMM to a folder and back.

A model folder holds `foveate.json` (the parts' types and options, enough to rebuild them without network), sharded
safetensors, and the tokenizer. `from:` accepts such a folder, a run, or a stock Llava folder or hub id.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from foveate.errors import FoveateError, ModelError
from foveate.files import SEAL, check_seal, read_json
from foveate.model.llava import read_llava
from foveate.model.lmm import LMM, PARTS
from foveate.options import Options
from foveate.plugins import installed_plugins

if TYPE_CHECKING:
    from foveate.recipe import Model
from foveate.types import EncoderSpec, Grid

CARD = "foveate.json"
"""The file that makes a folder a foveate model."""

_KINDS = {"encoder": "encoders", "projector": "projectors", "llm": "llms"}


@dataclass(frozen=True)
class PartPlan:
    """A part before it is built: its class, its options, and whether it brings weights of its own."""

    type: str
    cls: Any
    options: Options
    own_weights: bool = True


@dataclass(frozen=True)
class Blueprint:
    """A model before it is built: everything that data, plan and build need, no weights."""

    parts: Mapping[str, PartPlan]
    tokenizer: Any = None
    """Folder or hub id of the tokenizer, `TrainedTokenizer` options, or None: the LLM type's default."""
    weights: Callable[[], dict[str, Tensor]] | None = None
    """State of the parts that come from `from:`, by full name."""
    card: Mapping[str, Any] = field(default_factory=dict)

    def encoder_spec(self) -> EncoderSpec:
        """The encoder's facts, without weights."""
        part = self.parts["encoder"]
        return part.cls.describe(part.options)

    def visual_grid(self) -> Grid:
        """Rows and columns of visual tokens of an image."""
        part = self.parts["projector"]
        return part.cls.out_grid(part.options, self.encoder_spec().grid)


def blueprint(model: Model) -> Blueprint:
    """Resolve `model:`; `from:` first, then the parts that override it."""
    source = _read_source(model.from_) if model.from_ else Blueprint({})
    parts = dict(source.parts)
    tokenizer = source.tokenizer
    for name in PARTS:
        component = getattr(model, name)
        if component is not None:
            parts[name] = PartPlan(component.type, component.cls, component.options)
            if name == "llm":
                options = component.options
                tokenizer = getattr(options, "tokenizer", None) or getattr(options, "pretrained", None)
    return Blueprint(parts, tokenizer, source.weights, source.card)


def build_lmm(plan: Blueprint, vocab_size: int | None, load_weights: bool = True) -> LMM:
    """Build the parts and give them their weights. `vocab_size`: tokens of the tokenizer.

    Raises `ModelError` when weights are missing, left over, or of another shape.
    """
    encoder, projector, llm = (plan.parts[name] for name in PARTS)
    spec = plan.encoder_spec()
    with _told("llm"):
        language = llm.cls(llm.options, vocab_size, load_weights=load_weights and llm.own_weights)
    with _told("encoder"):
        vision = encoder.cls(encoder.options, load_weights=load_weights and encoder.own_weights)
    with _told("projector"):
        between = projector.cls(projector.options, spec.width, language.width, spec.grid)
    lmm = LMM(vision, between, language)
    if load_weights and plan.weights is not None:
        borrowed = tuple(f"{name}." for name, part in plan.parts.items() if not part.own_weights)
        state = {name: tensor for name, tensor in plan.weights().items() if name.startswith(borrowed)}
        load_strictly(lmm, state, borrowed, "the model that `from` names")
    return lmm


@contextmanager
def _told(part: str) -> Iterator[None]:
    """Whatever libraries raise for numbers that make no model, or none that fits into memory, is a `ModelError`."""
    try:
        yield
    except FoveateError:
        raise
    except Exception as error:
        what = " ".join(str(error).split())[:500]
        raise ModelError(f"model.{part} cannot be built from these options: {type(error).__name__}: {what}") from error


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], prefixes: tuple[str, ...], source: str) -> None:
    """Copy `state` into `module`; every name under `prefixes` must be there, none else, all shapes equal.

    A tied weight needs to be there once. A vocabulary that has grown keeps its new rows.
    """
    own = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if name.startswith(prefixes)}
    present = {own[name].data_ptr() for name in state if name in own}
    missing = [name for name, tensor in own.items() if name not in state and tensor.data_ptr() not in present]
    unexpected = [name for name in state if name not in own]
    if missing or unexpected:
        raise ModelError(
            f"the weights of {source} do not fit: "
            + "; ".join(
                f"{len(names)} {what} ({', '.join(sorted(names)[:4])}{' …' if len(names) > 4 else ''})"
                for what, names in (("missing", missing), ("unexpected", unexpected))
                if names
            )
        )
    with torch.no_grad():
        for name, tensor in state.items():
            target, rows = own[name], slice(None)
            if tensor.shape != target.shape:
                grown = tensor.ndim and tensor.shape[1:] == target.shape[1:] and tensor.shape[0] < target.shape[0]
                if not (grown and name.startswith("llm.")):
                    raise ModelError(
                        f"{name} of {source} has shape {tuple(tensor.shape)}, the model needs {tuple(target.shape)}"
                    )
                rows = slice(0, tensor.shape[0])
            target[rows].copy_(tensor) if tensor.ndim else target.copy_(tensor)


def save_lmm(
    lmm: LMM, plan: Blueprint, folder: Path, tokenizer: PreTrainedTokenizerBase, facts: Mapping[str, Any]
) -> None:
    """Write a model folder. `facts` (template, geometry, image token) go into `foveate.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    unique: dict[int, str] = {}
    state = {
        name: tensor.detach()
        for name, tensor in lmm.state_dict().items()
        if not tensor.numel() or unique.setdefault(tensor.data_ptr(), name) == name
    }
    save_torch_state_dict(state, folder)
    parts = {
        name: {"type": plan.parts[name].type, "options": getattr(lmm, name).portable_options()}
        for name in PARTS
    }
    (folder / CARD).write_text(json.dumps({"format": 1, "parts": parts, **facts}, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)


def _read_source(name: str) -> Blueprint:
    """What `from:` names: a model folder, a run, a stock Llava folder, or a hub id."""
    for folder in (Path(name), Path(name) / "model"):
        if (folder / CARD).is_file():
            return _read_folder(folder)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        kinds = f"neither a run, nor a model folder ({CARD}), nor a stock Llava folder (config.json)"
        raise ModelError(f"model.from: {name} is {kinds}")
    llava = read_llava(name)
    plugins = installed_plugins()
    parts = {
        part: _part(plugins, part, entry["type"], entry["options"], f"model.from {name}")
        for part, entry in llava.parts.items()
    }
    return Blueprint(parts, llava.tokenizer, llava.state, llava.facts)


def _read_folder(folder: Path) -> Blueprint:
    """A folder that `save_lmm` wrote. Raises `RunError` where it is sealed and damaged."""
    recipe = folder.parent / "recipe.yaml"
    again = f"delete {folder}, and `foveate train {recipe} --resume` writes it again from the last checkpoint"
    advice = f"Restore it from a copy{'; or ' + again if recipe.is_file() else ''}."
    if (folder / SEAL).is_file():
        check_seal(folder, f"{advice} If you changed it on purpose, delete {folder / SEAL}.")
    plugins, card = installed_plugins(), read_json(folder / CARD)
    try:
        parts = {
            name: _part(plugins, name, entry["type"], entry["options"], str(folder))
            for name, entry in ((name, card["parts"][name]) for name in PARTS)
        }
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder / CARD} is damaged, or of another release of foveate ({why}). {advice}") from error

    def weights() -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as tensors:
                    state.update({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{file} cannot be read: {error}. {advice}") from error
        return state

    return Blueprint(parts, str(folder), weights, card)


def _part(plugins: Any, part: str, type_name: str, options: Mapping[str, Any], source: str) -> PartPlan:
    entry = plugins.find(_KINDS[part], type_name)
    if entry is None:
        raise ModelError(f"{source} needs the {part} type '{type_name}', which no installed plugin registers")
    cls = entry.load()
    return PartPlan(type_name, cls, cls.Options.model_validate(options), own_weights=False)


def load_lmm(folder: str | Path) -> tuple[LMM, Blueprint]:
    """Load a model folder or a run's model, strictly. Raises `ModelError` when it is none."""
    plan = _read_source(str(folder))
    return build_lmm(plan, None), plan
