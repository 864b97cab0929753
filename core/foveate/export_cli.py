"""`foveate export RUN OUT`: a trained model as a folder that transformers opens by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    run: Annotated[Path, typer.Argument(help="A run, or a model folder.", metavar="RUN", show_default=False)],
    out: Annotated[Path, typer.Argument(help="A folder that is not there yet.", metavar="OUT", show_default=False)],
    own_code: Annotated[
        bool,
        typer.Option("--own-code", help="With a modelling file: for models that are no stock Llava."),
    ] = False,
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Of the weights that are written.")] = "fp32",
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Load it with transformers and compare it with the model.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to stdout, for programs.")] = False,
) -> None:
    """Write a run's model as a stock LlavaForConditionalGeneration folder, with processor, tokenizer, chat template."""
    from foveate.export import export_model
    from foveate.progress import Display

    done, display = export_model(run, out, own_code=own_code, dtype=dtype, check=check), Display()
    kind = "a Llava with its own modelling file" if done.own_code else "a stock LlavaForConditionalGeneration"
    if as_json:
        typer.echo(json.dumps({**vars(done), "folder": str(done.folder)}, indent=2))
        return
    display.say(f"{out}: {kind}, {done.parameters:,} parameters in {done.dtype}")
    if done.gap is not None:
        display.say(f"checked: transformers loads it, and its logits differ from the model's by {done.gap:.1e} at most")
    if done.left_out:
        display.say(f"left out, because answering needs none of it: the heads of {', '.join(done.left_out)}")
    trust, name = (", trust_remote_code=True" if done.own_code else ""), repr(str(out))
    display.say("load it:")
    display.say("  from transformers import AutoModelForImageTextToText, AutoProcessor")
    display.say(f"  model = AutoModelForImageTextToText.from_pretrained({name}{trust})")
    display.say(f"  processor = AutoProcessor.from_pretrained({name}{trust})")
