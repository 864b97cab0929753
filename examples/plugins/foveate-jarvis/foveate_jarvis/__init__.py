"""JARVIS for foveate: the objective `jarvis`. Imported by every foveate command, so it imports nothing heavy."""

from typing import Any

from foveate import hookimpl

HOOK_API = 1


@hookimpl
def register_objectives(register: Any) -> None:
    register("jarvis", "foveate_jarvis.objective:Jarvis")
