"""ROSS, reconstructive visual instruction tuning (arXiv 2410.09575): the model denoises latents of what it saw."""

from __future__ import annotations

from foveate import hookimpl
from foveate.hookspecs import Register

HOOK_API = 1


@hookimpl
def register_objectives(register: Register) -> None:
    register("ross", "foveate_ross.objective:Ross")
    register("ross_generative", "foveate_ross.generative:RossGenerative")


@hookimpl
def register_commands(register: Register) -> None:
    register("import teacher", "foveate_ross.importing:import_teacher")
    register("analyze attention", "foveate_ross.analyze_cli:attention")
    register("analyze conditions", "foveate_ross.analyze_cli:conditions")
