"""foveate: train large multimodal models that are supervised on what they see, not only on what they say.

Public names are imported on first use, so that ``import foveate`` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

from foveate.errors import FoveateError
from foveate.hookspecs import HOOK_API, hookimpl

__version__ = "0.1.0"

_LAZY = {
    "Batch": "foveate.types",
    "Conversation": "foveate.types",
    "EncoderSpec": "foveate.types",
    "Grid": "foveate.types",
    "IGNORE_INDEX": "foveate.types",
    "ImageRecord": "foveate.types",
    "ImageRef": "foveate.types",
    "Sample": "foveate.types",
    "Turn": "foveate.types",
    "Options": "foveate.options",
    "ExistingPath": "foveate.options",
    "RecipePath": "foveate.options",
    **dict.fromkeys(
        (
            "AttentionWish", "Edit", "EditInputs", "ImageRows", "Layer", "LossTerm", "Moment", "ObjectiveContext",
            "ObjectiveOptions", "Outputs", "Picture", "Reads", "Targets", "Teacher", "TeacherInputs", "TeacherSpec",
            "VisionObjective", "resize_rows",
        ),
        "foveate.objective",
    ),
    "TeacherChoice": "foveate.recipe_fields",
    "EncoderChoice": "foveate.recipe_fields",
    "ConversationDataset": "foveate.data.dataset",
    "Encoder": "foveate.model.encoder",
    "Projector": "foveate.model.projector",
    "LanguageModel": "foveate.model.language",
    "LMM": "foveate.model.lmm",
    "Learner": "foveate.learner",
    "Metric": "foveate.metrics",
    "assemble": "foveate.assembly",
    "LoadedRun": "foveate.loaded",
    "load_recipe": "foveate.recipe_file",
    "load_run": "foveate.loaded",
    "Register": "foveate.hookspecs",
    "train": "foveate.training",
}

__all__ = ["HOOK_API", "FoveateError", "__version__", "hookimpl", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'foveate' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)
