"""The teacher `semantic_tokenizer`: residual codes of features of a frozen encoder, one row of codes a visual token.

Shapes: I images, N = h*w visual tokens of an image, C width of the features, Q depths, K codes of a codebook.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from foveate import (
    EncoderChoice,
    EncoderSpec,
    ExistingPath,
    ImageRecord,
    Layer,
    Moment,
    ObjectiveContext,
    Options,
    Teacher,
    TeacherInputs,
    TeacherSpec,
)
from foveate.errors import ModelError
from foveate.objective import Grid
from foveate.registry import Component
from foveate.teachers.features import FeatureOptions, FeatureTeacher
from foveate_asvr.clustering import FitOptions, fit_codebooks
from foveate_asvr.folder import (
    CODEBOOKS,
    ENCODER,
    Card,
    check_model,
    check_weights,
    digests,
    load_weights,
    read_card,
    write_folder,
)
from foveate_asvr.quantizer import ResidualQuantizer

OF_THE_FOLDER = ("encoder", "layer", "depth", "codebook_size", "shared", "fit", "decoder")
"""Options that a fitted tokenizer brings along."""


class TokenizerOptions(Options):
    """Residual codes of features: fitted to the stage's pictures, or, with `pretrained`, taken from a folder."""

    pretrained: ExistingPath | None = Field(
        None, description="Folder of `foveate asvr fit-tokenizer` or `foveate import tokenizer`. Default: fit one."
    )  # fmt: skip
    reuse: bool = Field(
        False, description="Of a folder with an encoder of its own: read the pass of the model's encoder instead, "
        "whose weights must be the same bit for bit."
    )  # fmt: skip
    encoder: EncoderChoice | None = Field(
        None, description="A preset, or `type` (default `hf`) and its options. Default: the model's own, whose pass is "
        "read: there is no second one."
    )  # fmt: skip
    layer: Layer | None = Field(
        None, description="Features after block k, 0.5 at half the depth. Default: what the projector reads; of an "
        "`encoder`, the layer among its options."
    )  # fmt: skip
    depth: int = Field(8, gt=0, description="Codes of a visual token, each of what those before it leave.")
    codebook_size: int = Field(16384, gt=1, description="Codes of a codebook.")
    shared: bool = Field(False, description="One codebook for all depths.")
    resample: bool = Field(
        False, description="Interpolate features to the grid of visual tokens where it is another one. Else an error."
    )  # fmt: skip
    fit: FitOptions = Field(FitOptions(), description="How the codebooks are learned.")

    @model_validator(mode="after")
    def _check(self) -> TokenizerOptions:
        if self.pretrained is not None:
            fields = type(self).model_fields
            known = [name for name in OF_THE_FOLDER if name in fields]
            if odd := [name for name in known if getattr(self, name) != fields[name].default]:
                raise ValueError(f"a `pretrained` tokenizer brings its own {', '.join(odd)}: leave these out")
        elif self.reuse:
            raise ValueError("`reuse` is for `pretrained`; without an `encoder` the model's pass is read anyway")
        if self.encoder is not None and self.layer is not None:
            _with_layer(self.encoder, self.layer)
        return self


def _with_layer(encoder: Component, layer: Layer) -> Component:
    """An encoder that is read at a layer. ValueError where its type cannot."""
    try:
        given = encoder.options.model_dump(mode="json", by_alias=True)
        options = encoder.cls.Options.model_validate({**given, "layer": layer})
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ValueError(f"`layer`: the encoder '{encoder.type}' cannot be read at {layer}: {reason}") from None
    return Component(encoder.type, encoder.cls, options)


class Tokenizer(Teacher):
    """What all kinds of tokenizers share: whose features they read, and codes of them.

    Records `codes` `[N, Q]` int64. Where the features are those of the model's own encoder, no second pass is made.
    """

    Options = TokenizerOptions
    kind: ClassVar[str]

    @classmethod
    def card(cls, options: Any) -> Card | None:
        """Of a fitted tokenizer. Raises `ModelError` where its folder is not complete."""
        return None if options.pretrained is None else read_card(options.pretrained, cls.kind)

    @classmethod
    def feature_options(cls, options: Any) -> FeatureOptions:
        """Whose features are quantised, as options of core's teacher `features`."""
        card = cls.card(options)
        if card is None and options.encoder is None:
            return FeatureOptions(layer=-1 if options.layer is None else options.layer)
        if card is None:
            encoder = options.encoder if options.layer is None else _with_layer(options.encoder, options.layer)
            return FeatureOptions(encoder=encoder)
        encoder = None if options.reuse else card.component()
        return FeatureOptions(encoder=encoder) if encoder is not None else FeatureOptions(layer=card.layer)

    @classmethod
    def sizes(cls, options: Any, context: ObjectiveContext) -> tuple[int, int, int]:
        """Depth Q, codes K and width C. Raises `ModelError` where the tokenizer does not fit the model."""
        features, card = cls.feature_options(options), cls.card(options)
        width = FeatureTeacher.describe(features, context).width
        fitted = cls._spec(features, context).grid if card is None else card.grid
        if fitted != context.visual_grid and not options.resample:
            raise ModelError(
                f"the tokenizer's grid of features is {_grid(fitted)}, that of the visual tokens "
                f"{_grid(context.visual_grid)}: set `resample: true` to interpolate the features"
            )
        if card is None:
            return options.depth, options.codebook_size, width
        if features.encoder is None:
            check_model(card, context, options.pretrained)
        if card.width != width:
            raise ModelError(f"{options.pretrained}: codebooks of width {card.width} for features of width {width}")
        return card.depth, card.codebook_size, width

    @staticmethod
    def _spec(features: FeatureOptions, context: ObjectiveContext) -> EncoderSpec:
        spec: EncoderSpec = (
            context.encoder if features.encoder is None else features.encoder.cls.describe(features.encoder.options)
        )
        return spec

    @classmethod
    def describe(cls, options: Any, context: ObjectiveContext) -> TeacherSpec:
        depth, _, _ = cls.sizes(options, context)
        size = FeatureTeacher.describe(cls.feature_options(options), context).image_size
        return TeacherSpec(depth, context.visual_grid, size)

    @classmethod
    def encoder_layers(cls, options: Any) -> tuple[Layer, ...]:
        return FeatureTeacher.encoder_layers(cls.feature_options(options))

    @classmethod
    def prepare_image(cls, options: Any, image: Image.Image, record: ImageRecord) -> dict[str, Tensor]:
        """`pixels` of an encoder of its own, made from the raw picture as that encoder wants them."""
        return FeatureTeacher.prepare_image(cls.feature_options(options), image, record)

    @classmethod
    def needs_fit(cls, options: Any) -> bool:
        return options.pretrained is None

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__(options, context)
        depth, size, width = self.sizes(options, context)
        card = self.card(options)
        self.features = FeatureTeacher(self.feature_options(options), context)
        self.quantizer = ResidualQuantizer(depth, size, width, options.shared if card is None else card.shared)
        self._build(card)
        if card is not None:
            load_weights(options.pretrained, CODEBOOKS, self, but="features")
            if self.features.encoder is not None:
                load_weights(options.pretrained, ENCODER, self.features.encoder)
        self._known = card is None or self.features.encoder is not None

    def _build(self, card: Card | None) -> None:
        """Makes further modules, before weights are loaded."""

    def rows(self, inputs: TeacherInputs) -> list[Tensor]:
        """What is quantised of each image, `[N, C]`, without gradients."""
        if not self._known:  # once: the model's encoder, whose pass is read, is the one that it was fitted to
            card = self.card(self.options)
            assert card is not None
            if inputs.encoder is None:
                raise ModelError(f"the tokenizer {self.options.pretrained} reads the model's encoder, and got none")
            check_weights(card, inputs.encoder, self.options.pretrained)
            self._known = True
        with torch.no_grad():
            return [record["features"] for record in self.features.encode(inputs)]

    def encode(self, inputs: TeacherInputs) -> list[dict[str, Tensor]]:
        rows = self.rows(inputs)
        codes = self.quantizer.encode(torch.cat(rows))
        return [{"codes": part} for part in codes.split([len(part) for part in rows])]

    def stream(self, batches: Iterable[TeacherInputs]) -> Iterator[Tensor]:
        """The rows of one picture after the other."""
        for inputs in batches:
            yield from self.rows(inputs)

    def fit(self, batches: Iterable[TeacherInputs]) -> Mapping[str, float]:
        return fit_codebooks(self.quantizer, self.stream(batches), self.options.fit, self.seed)

    @property
    def seed(self) -> int:
        """Of all draws of its fit."""
        return Moment(self.context.seed).seed_of("tokenizer", self.kind)

    def save(self, folder: Path, encoder: Any, told: Mapping[str, float]) -> Card:
        """Writes it as a folder for `pretrained`; `encoder`: the model's. Returns what stands on its card."""
        own: Any = self.features.encoder
        component: Any = self.feature_options(self.options).encoder
        read = encoder if own is None else own
        layer = self.encoder_layers(self.options)[0] if own is None else len(own.blocks())
        described = None if own is None else {"type": component.type, **own.portable_options()}
        card = Card(
            self.kind, self.quantizer.depth, self.quantizer.size, self.quantizer.width, self.quantizer.shared,
            self.context.visual_grid, layer, read.spec, digests(read, -1 if own is not None else layer), described,
            self._more(), dict(told),
        )  # fmt: skip
        state = {key: value for key, value in self.state_dict().items() if not key.startswith("features.")}
        write_folder(folder, card, state, own)
        return card

    def _more(self) -> dict[str, Any]:
        """Options that rebuild its further modules."""
        return {}


class SemanticTokenizer(Tokenizer):
    """Residual codes of the features of a frozen encoder, as they are (arXiv 2506.09040; DualToken's semantic half)."""

    kind = "semantic"


def _grid(grid: Grid) -> str:
    return f"{grid[0]} x {grid[1]}"
