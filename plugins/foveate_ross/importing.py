"""`foveate import teacher`: a published image tokenizer, in the layout of its authors, becomes a diffusers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.errors import UserError


def import_teacher(
    checkpoint: Annotated[Path, typer.Argument(help="File of weights: .ckpt, .pt, .pth or .safetensors.")],
    out: Annotated[Path, typer.Argument(help="Folder to make; it must not exist, or be empty.")],
    scaling_factor: Annotated[
        float | None, typer.Option(help="Of the latents of a KL autoencoder: 1 / their standard deviation.")
    ] = None,
    shift_factor: Annotated[float | None, typer.Option(help="Their mean.")] = None,
    plain_codebook: Annotated[
        bool, typer.Option("--plain-codebook", help="LlamaGen layout, trained with codebook_l2_norm off.")
    ] = False,
) -> None:
    """Turn a checkpoint in the layout of LDM (KL-16) or LlamaGen (VQ-16) into a folder that teachers load."""
    if not checkpoint.is_file():
        hint = ": it is a folder, give the file in it" if checkpoint.is_dir() else ""
        raise UserError(f"no such file: {checkpoint}{hint}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: choose another, or remove it first.")
    if scaling_factor is not None and not 0 < scaling_factor < float("inf"):
        raise UserError("--scaling-factor must be above 0.")

    from foveate_ross.tokenizers import convert, read_checkpoint  # torch and diffusers, only where they are needed

    found = convert(read_checkpoint(checkpoint), str(checkpoint), plain_codebook)
    if found.kind == "vq" and (scaling_factor is not None or shift_factor is not None):
        raise UserError(f"{checkpoint} is a VQ model: codebook vectors are taken as they are, without scale and shift.")
    if plain_codebook and found.layout != "LlamaGen":
        raise UserError(f"--plain-codebook is for the LlamaGen layout, and {checkpoint} has that of {found.layout}.")
    if found.kind == "autoencoder_kl":
        found.set_scale(scaling_factor, shift_factor)
    found.save(out)
    typer.echo(f"{out}: {found.describe()}")
    for line in found.notes:
        typer.echo(line)
    typer.echo(f"In a recipe: teacher: {{type: {found.kind}, pretrained: {out}}}")
