"""Layer taps: the states after chosen blocks of a stack, taken by forward hooks while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from foveate.errors import ModelError
from foveate.objective import Layer

END = -1
"""The end of a stack: after the LLM's final norm, or the features that the projector reads."""


def layer_index(layer: Layer, depth: int) -> int:
    """A layer of a stack of `depth` blocks as 0 (the inputs), k (after block k) or `END`.

    Fractions are relative depths, rounded. Raises `ModelError` for a layer that is not there.
    """
    if layer == END:
        return END
    if isinstance(layer, float) and 0 < layer < 1:
        return round(layer * depth)
    index = int(layer) if layer >= 0 else depth + 1 + int(layer)
    if layer != int(layer) or not 0 <= index <= depth:
        raise ModelError(f"there is no layer {layer}: it has {depth} blocks, so 0 to {depth}, -1, or a fraction of 1")
    return index


@contextlib.contextmanager
def tapped(blocks: Sequence[nn.Module], layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Inside, a forward pass leaves the states before block 1 (layer 0) and after block k (layer k) in the mapping."""
    found: dict[int, Tensor] = {}
    handles = []

    def after(layer: int) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            found[layer] = output if isinstance(output, Tensor) else output[0]

        return hook

    def before(module: nn.Module, arguments: Any, keywords: Any) -> None:
        found[0] = arguments[0] if arguments else keywords["hidden_states"]

    for layer in set(layers) - {END}:
        if layer:
            handles.append(blocks[layer - 1].register_forward_hook(after(layer)))
        else:
            handles.append(blocks[0].register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
