"""A plugin of foveate. This module is imported by every foveate command, so it imports nothing heavy."""

from typing import Any

from foveate import hookimpl

HOOK_API = 1  # the version of foveate's hooks that this is written for


@hookimpl
def register_objectives(register: Any) -> None:
    register("align", "foveate_align.objective:AlignLoss")  # imported when a recipe asks for it
