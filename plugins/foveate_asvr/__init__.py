"""ASVR (arXiv 2506.09040): the model predicts discrete semantic codes of what it saw, one after the other."""

from __future__ import annotations

from foveate import hookimpl
from foveate.hookspecs import Register

HOOK_API = 1


@hookimpl
def register_objectives(register: Register) -> None:
    register("asvr", "foveate_asvr.objective:Asvr")


@hookimpl
def register_teachers(register: Register) -> None:
    register("semantic_tokenizer", "foveate_asvr.tokenizer:SemanticTokenizer")
    register("appearance_tokenizer", "foveate_asvr.appearance:AppearanceTokenizer")


@hookimpl
def register_encoders(register: Register) -> None:
    register("quantized", "foveate_asvr.discrete:QuantizedEncoder")


@hookimpl
def register_commands(register: Register) -> None:
    register("asvr fit-tokenizer", "foveate_asvr.commands:fit_tokenizer")
    register("import tokenizer", "foveate_asvr.commands:import_tokenizer")
