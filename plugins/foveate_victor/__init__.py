"""ViCToR (arXiv 2410.14332): most visual tokens are replaced by rows of a learned pool, and reconstructed."""

from __future__ import annotations

from foveate import hookimpl
from foveate.hookspecs import Register

HOOK_API = 1


@hookimpl
def register_objectives(register: Register) -> None:
    register("victor", "foveate_victor.objective:Victor")
