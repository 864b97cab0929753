"""Small parts to read recipes with, registered the way a third party registers its own."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

import foveate
from foveate import ExistingPath
from foveate.objective import ObjectiveOptions
from foveate.options import Options as Base
from foveate.plugins import Plugins, load_plugins


class TinyEncoder:
    class Options(Base):
        width: int = Field(8, gt=0, description="Channels.")
        pretrained: str | None = Field(None, description="Weights.")
        config: dict[str, Any] = Field({}, description="Architecture.")


class TinyProjector:
    class Options(Base):
        depth: int = Field(2, description="Layers.")
        hidden: int | list[int] = Field(4, description="Widths.")


class TinyTokenizer(Base):
    vocab_size: int = Field(300, ge=300, description="Tokens.")


class TinyLLM:
    class Options(Base):
        pretrained: str | None = Field(None, description="Weights.")
        config: dict[str, Any] | None = Field(None, description="Architecture.")
        tokenizer: str | TinyTokenizer | None = Field(None, description="Tokenizer.")

        @model_validator(mode="after")
        def _something(self) -> TinyLLM.Options:
            if self.pretrained is None and self.config is None:
                raise ValueError("give `pretrained` or `config`")
            return self


class TinyData:
    class Options(Base):
        path: ExistingPath = Field(description="Rows.")
        images: ExistingPath | None = Field(None, description="Pictures.")


class Sharpen:
    """An objective's name and options."""

    Options = ObjectiveOptions


class Accuracy:
    """A metric without options of its own."""


class TinyPlugin:
    HOOK_API = foveate.HOOK_API

    @foveate.hookimpl
    def register_encoders(self, register: Any) -> None:
        register("hf", TinyEncoder)
        register("gone", "no_such_module_of_anybody:Encoder")

    @foveate.hookimpl
    def register_projectors(self, register: Any) -> None:
        register("mlp", TinyProjector)

    @foveate.hookimpl
    def register_llms(self, register: Any) -> None:
        register("hf", TinyLLM)

    @foveate.hookimpl
    def register_datasets(self, register: Any) -> None:
        register("llava", TinyData)

    @foveate.hookimpl
    def register_objectives(self, register: Any) -> None:
        register("sharpen", Sharpen)

    @foveate.hookimpl
    def register_metrics(self, register: Any) -> None:
        register("accuracy", Accuracy)


def tiny_plugins() -> Plugins:
    """Only the parts above."""
    plugins = load_plugins([])
    plugins.add(TinyPlugin(), "tiny-parts (tiny)")
    return plugins


RECIPE = """\
model:
  encoder: {width: 4}
  projector: mlp
  llm: {config: {layers: 2}}
stages:
  - name: align
    data: [{path: rows.json}]
    train: {projector: 1e-3}
    batch_size: 8
    epochs: 1
"""
"""A recipe of ten lines that has nothing wrong, beside a file `rows.json`."""
