"""The contract of an objective: all that an author writes, all that core hands over, and what core promises for it.

An objective is a loss on the visual side of an LMM, its trainable head and, where targets are not the model's own, its
frozen teacher. Subclass `VisionObjective`; write `Options`, the head and `loss`. Everything else has a default.

Core promises: sums are divided by the counts of the whole step over all processes; noise is a pure function of (seed,
stage, step, image, objective, name); rows of different samples never mix; a process without an image runs the loss on
a dummy picture and multiplies it by zero; teachers are never trained, sharded or saved. So neither the number of
processes, nor the packing, nor another objective changes a gradient.

Shapes: I images of one micro-batch that the objective applies to, N = h*w visual tokens of one image, R their rows,
image after image (the sum of all N), D width of the LLM, E width of the encoder.
"""

from __future__ import annotations

import functools
import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import AfterValidator, ConfigDict, Field
from torch import Tensor, nn

from foveate.errors import ModelError
from foveate.options import Options
from foveate.types import EncoderSpec, Grid, ImageRecord, ImageRole

Layer = int | float
"""0: a stack's inputs; k: after its block k; -1: its end (the LLM's final norm; the features that the projector reads);
-2: after the last block but one; 0.5: at half the depth."""

AttentionWish = Literal["causal", "image_bidirectional", "prefix_bidirectional", "groups"]
"""Who sees whom in the LLM. `image_bidirectional`: the visual tokens of an image see each other.
`prefix_bidirectional`: so do all tokens before a sample's first supervised one. `groups`: as `image_bidirectional`, but
a visual token sees of its image only group 0 and its own group (`Edit.groups`; without an edit all are group 0).
Everything else stays causal; text sees all that is before it. Beside `shift=1` every wish but `causal` is an error."""


def _some(steps: dict[int, float]) -> dict[int, float]:
    if not steps:
        raise ValueError("must have at least one step, as `step: weight`")
    return steps


_Share = Annotated[float, Field(ge=0)]
Weight = _Share | Annotated[dict[Annotated[int, Field(ge=0, le=10**12)], _Share], AfterValidator(_some)]
"""The weight of a part of the loss: a number, or step of a stage, from 0, → number."""


def weight_at(weight: Weight, step: int) -> float:
    """The weight in a step: linear between the steps given, constant before the first and after the last."""
    given = weight if isinstance(weight, dict) else {0: weight}
    return float(np.interp(step, sorted(given), [given[key] for key in sorted(given)]))


class ObjectiveOptions(Options):
    """What every objective can be told in a recipe. Subclasses add fields, each with a description."""

    model_config = ConfigDict(validate_default=True)

    weight: Weight = Field(
        1.0, description="Weight of its mean in the loss: a number, or step of a stage → number, linear in between."
    )
    start_step: int = Field(0, ge=0, description="First step of a stage that it takes part in, counted from 0.")
    end_step: int | None = Field(None, gt=0, description="First step of a stage that it no longer takes part in.")
    probability: float = Field(1.0, gt=0, le=1, description="Share of steps that it takes part in, drawn by the seed.")
    from_model: bool = Field(True, description="Start from the head that `model.from` holds under its name, if any.")
    fit_before: str | None = Field(
        None, description="Stage before which its teacher is fitted, where it has to be. Default: the first it is in."
    )

    def takes_part(self, name: str, moment: Moment) -> bool:
        """Whether the objective `name` takes part in a step; the same on every process."""
        if moment.step < self.start_step or (self.end_step is not None and moment.step >= self.end_step):
            return False
        if self.probability == 1:
            return True
        drawn = torch.Generator().manual_seed(moment.seed_of("takes part", name))
        return float(torch.rand((), generator=drawn)) < self.probability


@dataclass(frozen=True)
class ObjectiveContext:
    """The model that an objective is built for, as numbers.

    `name`: the objective's, in the recipe. `visual_grid`: visual tokens of an image. `encoder`: its grid, width and
    image size. `seed`: the recipe's; core seeds torch with it and the name before `__init__`.
    """

    name: str
    llm_width: int
    llm_layers: int
    visual_grid: Grid
    encoder: EncoderSpec
    seed: int = 0


@dataclass(frozen=True)
class Reads:
    """Which states an objective reads.

    `llm`, `encoder`: layers for `Outputs.states` and `Outputs.encoder_states`. `teacher`: layers of the model's own
    encoder for `TeacherInputs.encoder_states`; refused in stages that train the encoder. With `shift=1` each visual
    token gets the state of the token *before* it; where an image opens its sample its first row is dropped.
    """

    llm: tuple[Layer, ...] = (-1,)
    encoder: tuple[Layer, ...] = ()
    teacher: tuple[Layer, ...] = ()
    shift: Literal[0, 1] = 0


@dataclass
class LossTerm:
    """A part of the loss on one micro-batch: its **sum** over units, and named metrics as (sum, count).

    Metrics need no gradient. `statistics`: named sums of any fixed shape, added up over the step's micro-batches and
    processes and handed to `after_step`: a centre, the use of codes. Neither kind of names may depend on the batch: all
    processes report the same.
    """

    total: Tensor
    metrics: dict[str, tuple[Tensor | float, float]] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """A picture for people, and its title."""

    title: str
    image: Image.Image


@dataclass(frozen=True)
class Moment:
    """When something random happens: the recipe's seed, the stage, and the optimizer step in it, from 0."""

    seed: int = 0
    stage: str = ""
    step: int = 0

    def seed_of(self, *names: object) -> int:
        """A seed for `torch.Generator` that depends on the moment and on `names`, and on nothing else."""
        key = repr((self.seed, self.stage, self.step, *names)).encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big")


@dataclass(frozen=True)
class ImageRows:
    """One image: its record, and where its rows lie.

    `dropped`: 1 where the first visual token has no state before it (`shift=1`), and so no row; else 0. `extra`: the
    rows of its extra tokens.
    """

    record: ImageRecord
    rows: slice
    extra: slice = field(default_factory=lambda: slice(0, 0))
    dropped: int = 0


class Rows:
    """The images of a micro-batch that an objective applies to, their rows, and a random stream for each image.

    `images` is never empty. For a loss of whole images, over pairs of rows for instance, `split` what you need: one
    term an image, and `count` 1.
    """

    def __init__(self, images: Sequence[ImageRows], objective: str, moment: Moment, like: Tensor):
        self.images = tuple(images)
        self._objective, self._moment, self._like = objective, moment, like

    def split(self, rows: Tensor) -> list[Tensor]:
        """`[R, …]` → one tensor `[rows of the image, …]` an image."""
        return list(rows.split([image.rows.stop - image.rows.start for image in self.images]))

    def per_image_mean(self, rows: Tensor) -> Tensor:
        """`[R, …]` → `[I, …]`, the mean over each image's rows (0 for an image without rows)."""
        sizes = torch.tensor([image.rows.stop - image.rows.start for image in self.images], device=rows.device)
        owner = torch.arange(len(self.images), device=rows.device).repeat_interleave(sizes)
        sums = rows.new_zeros(len(self.images), *rows.shape[1:]).index_add(0, owner, rows)
        return sums / sizes.clamp_min(1).reshape(-1, *[1] * (rows.ndim - 1)).to(rows.dtype)

    def to_rows(self, values: Tensor) -> Tensor:
        """`[I, …]` → `[R, …]`: each image's value at all of its rows."""
        sizes = torch.tensor([image.rows.stop - image.rows.start for image in self.images], device=values.device)
        return values.repeat_interleave(sizes, 0)

    @property
    def valid(self) -> Tensor:
        """`[R]` bool: rows whose visual token does not lie in padding."""
        cells = [image.record.valid()[image.dropped :] for image in self.images if _has_rows(image)]
        return torch.cat([torch.zeros(0, dtype=torch.bool), *cells]).to(self._like.device)

    def generator(self, image: int, name: str) -> torch.Generator:
        """A fresh CPU generator for image number `image`: the same numbers for the same name, whatever else runs."""
        record = self.images[image].record
        key = (record.sample_id, record.occurrence, record.index, self._objective, name)
        return torch.Generator().manual_seed(self._moment.seed_of(*key))

    def randn(self, *shape: int, name: str) -> Tensor:
        """Normal noise `[I, *shape]`, from each image's own generator."""
        drawn = [self._randn(image, name, shape) for image in range(len(self.images))]
        return torch.stack(drawn) if drawn else self._like.new_zeros(0, *shape)

    def randn_rows(self, *shape: int, name: str) -> Tensor:
        """Normal noise `[R, *shape]`, from each image's own generator."""
        sizes = [(at, image.dropped + image.rows.stop - image.rows.start) for at, image in enumerate(self.images)]
        drawn = [self._randn(at, name, (size, *shape))[self.images[at].dropped :] for at, size in sizes]
        return torch.cat([self._like.new_zeros(0, *shape), *drawn])

    def _randn(self, image: int, name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=self.generator(image, name), dtype=torch.float32)
        return noise.to(self._like.device, self._like.dtype)


class EditInputs(Rows):
    """What an editor sees before the LLM runs: `tokens` `[R, D]`, and `edited` `[R]`, those that others changed.

    All visual tokens of each image: with `shift=1` also the first, which the rows of the loss may lack.
    """

    def __init__(self, images: Sequence[ImageRows], objective: str, moment: Moment, tokens: Tensor, edited: Tensor):
        super().__init__(images, objective, moment, tokens)
        self.tokens, self.edited = tokens, edited


@dataclass(frozen=True)
class Edit:
    """An edit of the visual tokens, made out of place.

    `tokens` `[R, D]`; `edited` `[R]` bool: which rows of it are used, the others stay bit for bit what they were.
    Unless `keep_norm` is False, a used row gets the norm of the token that it replaces. `groups` `[R]` int64: for the
    attention wish `groups`. `state` comes back in `loss`.
    """

    tokens: Tensor
    edited: Tensor
    state: Any = None
    groups: Tensor | None = None
    keep_norm: bool = True


class Outputs(Rows):
    """What the model made of a micro-batch, as one objective sees it. Float32 (or 64), autocast off."""

    def __init__(
        self, images: Sequence[ImageRows], objective: str, moment: Moment, *, like: Tensor,
        visual_tokens: Callable[[], Tensor], edited: Callable[[], Tensor], states: Callable[[Layer], Tensor],
        extra_states: Callable[[Layer], Tensor], encoder_states: Callable[[Layer], Tensor], encoder_grid: Grid,
        pixels: Callable[[], Tensor], teacher: nn.Module | None = None, spec: EncoderSpec | None = None,
    ):  # fmt: skip
        super().__init__(images, objective, moment, like)
        self.encoder_grid, self._teacher, self._spec = encoder_grid, teacher, spec
        self._visual_tokens, self._edited, self._pixels = visual_tokens, edited, pixels
        self._states, self._extra_states, self._encoder_states = states, extra_states, encoder_states

    @classmethod
    def of(
        cls, records: Sequence[ImageRecord], states: Mapping[Layer, Tensor], *, visual_tokens: Tensor | None = None,
        edited: Tensor | None = None, extra_states: Mapping[Layer, Tensor] | None = None,
        encoder_states: Mapping[Layer, Tensor] | None = None, encoder_grid: Grid = (1, 1),
        pixels: Tensor | None = None, moment: Moment | None = None, objective: str = "objective",
    ) -> Outputs:  # fmt: skip
        """Outputs made by hand, for tests and notebooks: nothing shifted, rows of images one after the other."""
        like, images, row = next(iter(states.values())), list[ImageRows](), 0
        for record in records:
            images.append(ImageRows(record, slice(row, row + record.tokens)))
            row += record.tokens
        tokens = like if visual_tokens is None else visual_tokens
        changed = torch.zeros(row, dtype=torch.bool, device=like.device) if edited is None else edited
        seen = like.new_zeros(len(records), 3, 1, 1) if pixels is None else pixels
        return cls(
            images, objective, moment or Moment(), like=like, visual_tokens=lambda: tokens, edited=lambda: changed,
            states=lambda layer: states[layer], extra_states=lambda layer: (extra_states or {})[layer],
            encoder_states=lambda layer: (encoder_states or {})[layer], encoder_grid=encoder_grid, pixels=lambda: seen,
        )  # fmt: skip

    @property
    def teacher(self) -> Any:
        """The teacher, frozen; gradients flow through it. Raises `ModelError` without `teacher_in_loss = True`."""
        if self._teacher is None:
            raise ModelError("outputs.teacher: the objective has none, or its class lacks teacher_in_loss = True")
        return self._teacher

    @functools.cached_property
    def pixels(self) -> Tensor:
        """The encoder's pixels, normalised, `[I, 3, H, W]`."""
        return self._pixels()

    def picture(self, image: int) -> Image.Image:
        """Image number `image` as the encoder saw it, for people."""
        spec, pixels = self._spec, self.pixels[image].detach().float().cpu()
        mean, std = (spec.mean, spec.std) if spec else ((0.0,) * 3, (1.0,) * 3)
        values = pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        return Image.fromarray((values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())

    @functools.cached_property
    def visual_tokens(self) -> Tensor:
        """The LLM's inputs before any edit, `[R, D]`."""
        return self._visual_tokens()

    @functools.cached_property
    def edited(self) -> Tensor:
        """`[R]` bool: rows that an editor, this objective's or another's, changed."""
        return self._edited()

    def states(self, layer: Layer = -1) -> Tensor:
        """The visual outputs `[R, D]`: the LLM's states at a layer that `reads` declares, shifted as it declares."""
        return self._states(layer)

    def extra_states(self, layer: Layer = -1) -> Tensor:
        """The LLM's states at the extra tokens, `[all extra tokens, D]`, image after image; never shifted."""
        return self._extra_states(layer)

    def encoder_states(self, layer: Layer = -1) -> Tensor:
        """The encoder's states `[I*eh*ew, E]` on its own grid `encoder_grid` = (eh, ew), without gradient."""
        return self._encoder_states(layer)

    def on_visual_grid(self, rows: Tensor, grid: Grid) -> Tensor:
        """Values `[I*gh*gw, …]` on `grid` of each image → `[R, …]`: interpolated, dropped rows left out."""
        if all(image.record.grid == grid and _has_rows(image) and not image.dropped for image in self.images):
            return rows
        parts = rows.split(grid[0] * grid[1])
        moved = [resize_rows(part, grid, image.record.grid) for part, image in zip(parts, self.images, strict=True)]
        kept = [part[image.dropped :] for part, image in zip(moved, self.images, strict=True) if _has_rows(image)]
        return torch.cat(kept) if kept else rows[:0]


class Targets(Sequence[Mapping[str, Tensor]]):
    """The records that `encode_target` made, one an image, in the order of `Outputs.images`."""

    def __init__(self, records: Sequence[Mapping[str, Tensor]], images: Sequence[ImageRows]):
        self._records, self._images = tuple(records), tuple(images)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, image: Any) -> Any:
        return self._records[image]

    def stack(self, name: str) -> Tensor:
        """The entry `name` of every record, `[I, …]`; all must have one shape."""
        return torch.stack([record[name] for record in self._records])

    def rows(self, name: str | None = None) -> Tensor:
        """The entry `name`, `[N, …]` in each record, as `[R, …]`: row for row what belongs to `Outputs.states`.

        Default: the first entry, which of core's teachers is a row a visual token. Raises `ModelError` where a record
        has no such entry, or another number of rows than its image has visual tokens.
        """
        parts = []
        name = name if name is not None or not self._records else next(iter(self._records[0]), None)
        for record, image in zip(self._records, self._images, strict=True):
            if name is None or name not in record:
                if not record:
                    raise ModelError("targets.rows: the objective has no teacher that makes records")
                there = ", ".join(record)
                raise ModelError(f"the teacher's records have no entry '{name}'; they have {there}")
            tokens, found = image.record.grid[0] * image.record.grid[1], len(record[name])
            if found != tokens:
                where = f"image {image.record.index} of sample '{image.record.sample_id}'"
                raise ModelError(f"{where}: {found} rows of target '{name}' for {tokens} visual tokens")
            parts += [record[name][image.dropped :]] if _has_rows(image) else []
        return torch.cat(parts) if parts else torch.zeros(0)


class TeacherInputs:
    """Pictures for a teacher. `prepared`: what `prepare_image` made, one an image, on the teacher's device.

    Floating-point entries come in the teacher's dtype when it encodes. `encoder`: the model's, for a teacher that has
    to know whose states it reads; not to be run.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        prepared: Sequence[Mapping[str, Tensor]],
        encoder_states: Callable[[Layer], Tensor] | None = None,
        encoder_grid: Grid = (0, 0),
        encoder: nn.Module | None = None,
    ):
        self.records, self.prepared, self.encoder_grid = tuple(records), tuple(prepared), encoder_grid
        self._encoder_states, self.encoder = encoder_states, encoder

    def with_prepared(self, prepared: Sequence[Mapping[str, Tensor]]) -> TeacherInputs:
        """The same pictures, prepared otherwise."""
        return TeacherInputs(self.records, prepared, self._encoder_states, self.encoder_grid, self.encoder)

    def stack(self, name: str) -> Tensor:
        """The entry `name` of every picture, `[I, …]`."""
        return torch.stack([views[name] for views in self.prepared])

    def encoder_states(self, layer: Layer = -1) -> Tensor:
        """The model's own frozen encoder at a layer that `Reads.teacher` declares: `[I*eh*ew, E]`; no second pass."""
        if self._encoder_states is None:
            raise ModelError("the teacher reads the model's encoder, but `Reads.teacher` declares no layer")
        return self._encoder_states(layer)


@dataclass(frozen=True)
class TeacherSpec:
    """What a teacher makes: `width` of a target row, `grid` of rows of an image, `image_size` (height, width) that it
    sees, in pixels."""

    width: int
    grid: Grid
    image_size: tuple[int, int]


class Teacher(nn.Module):
    """A frozen maker of targets that recipes name and several objectives share; registered by `register_teachers`.

    Two objectives that name the same teacher with the same options share one, and its targets are made once.
    """

    Options: type[Options] = Options

    @classmethod
    def describe(cls, options: Any, context: ObjectiveContext) -> TeacherSpec:
        """What it makes for this model, without weights. Raises `ModelError` where it cannot."""
        raise NotImplementedError

    @classmethod
    def encoder_layers(cls, options: Any) -> tuple[Layer, ...]:
        """Layers of the model's own encoder that `encode` reads."""
        return ()

    @classmethod
    def prepare_image(cls, options: Any, image: Image.Image, record: ImageRecord) -> dict[str, Tensor]:
        """As `VisionObjective.prepare_image`."""
        return {}

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__()
        self.options, self.context = options, context

    @abstractmethod
    def encode(self, inputs: TeacherInputs) -> list[dict[str, Tensor]]:
        """As `VisionObjective.encode_target`."""

    def decode(self, target: Tensor) -> Tensor:
        """Target rows of images, `[I, N, width]`, back to pixels in 0…1, `[I, 3, H, W]`, where the teacher can."""
        raise ModelError(f"teacher {type(self).__name__} has no decoder")

    @classmethod
    def needs_fit(cls, options: Any) -> bool:
        """As `VisionObjective.needs_fit`."""
        return False

    def fit(self, batches: Iterable[TeacherInputs]) -> Mapping[str, float]:
        """As `VisionObjective.fit_teacher`."""
        raise ModelError(f"teacher {type(self).__name__} cannot be fitted")

    def save(self, folder: Path) -> None:
        """Write a fitted teacher into its folder of the run in a format that others load, beside what core keeps."""


class VisionObjective(nn.Module):
    """Base of objectives. Trainable parts are its sub-modules, in float32; a recipe names them (`victor.pool`).

    Whatever belongs to one batch is an argument and never an attribute: a module keeps parameters and buffers only.
    Class methods see options and metadata alone, because loader processes carry no weights.
    """

    Options: type[ObjectiveOptions] = ObjectiveOptions
    role: ClassVar[ImageRole] = "input"
    """The images it applies to: those that the model sees, or `target` images, which it does not see."""
    teacher_in_loss: ClassVar[bool] = False
    """`Outputs.teacher` is given: gradients flow through it (a decoder), never to its parameters."""
    batch_dependent: ClassVar[bool] = False
    """The loss compares images of a batch with each other, so it depends on the packing. Said in the plan."""

    def __init__(self, options: Any, context: ObjectiveContext):
        super().__init__()
        self.options, self.context = options, context

    # What it reads and changes in the model, known from its options alone.

    @classmethod
    def reads(cls, options: Any) -> Reads:
        """Layers and shift. Default: the LLM's last states, unshifted."""
        return Reads()

    @classmethod
    def attention(cls, options: Any) -> AttentionWish:
        """Its wish for the LLM's attention in the steps that it takes part in; two different wishes are an error."""
        return "causal"

    @classmethod
    def extra_tokens(cls, options: Any, record: ImageRecord) -> int:
        """How many learned tokens follow the image's visual tokens (those of a `target` image end the sample)."""
        return 0

    @classmethod
    def count(cls, options: Any, record: ImageRecord) -> float:
        """How many units of the loss an image brings; the step's sum is divided by it. Default: its rows."""
        return record.rows(cls.reads(options).shift)

    # Its teacher: frozen, owned by core. An option `teacher: TeacherChoice` makes all of these defaults work.

    @functools.cached_property
    def teacher_spec(self) -> TeacherSpec:
        """What the teacher of the option `teacher` makes: its width, for a head; known without its weights."""
        chosen = self.options.teacher
        spec: TeacherSpec = chosen.cls.describe(chosen.options, self.context)
        return spec

    @classmethod
    def prepare_image(cls, options: Any, image: Image.Image, record: ImageRecord) -> dict[str, Tensor]:
        """What the teacher wants of a picture; runs in a loader process.

        `image` is the raw RGB picture in the model's geometry: padded or cropped like the encoder's input, but in its
        own resolution, and exactly the area that `record.grid` covers. CPU tensors out.
        """
        chosen = getattr(options, "teacher", None)
        return {} if chosen is None else chosen.cls.prepare_image(chosen.options, image, record)

    def build_teacher(self) -> nn.Module | None:
        """The teacher, or None. Core calls it once, freezes what it returns and keeps it outside this module."""
        chosen = getattr(self.options, "teacher", None)
        return None if chosen is None else chosen.cls(chosen.options, self.context)

    def teacher_fingerprint(self) -> str:
        """What the targets depend on; equal fingerprints share a teacher and its targets."""
        chosen = getattr(self.options, "teacher", None)
        methods = ("prepare_image", "build_teacher", "encode_target", "fit_teacher")
        plain = all(getattr(type(self), name) is getattr(VisionObjective, name) for name in methods[1:])
        prepares: Any = (type(self).prepare_image, VisionObjective.prepare_image)
        plain = plain and len({method.__func__ for method in prepares}) == 1
        if chosen is not None and plain:
            maker, own = "", chosen.resolved()
        else:
            maker, own = f"{type(self).__module__}.{type(self).__qualname__}", self.options.model_dump(mode="json")
        text = json.dumps([maker, own, self.context.visual_grid, vars(self.context.encoder)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def encode_target(self, teacher: Any, inputs: TeacherInputs) -> list[dict[str, Tensor]]:
        """One record an image, **deterministic** (sampling belongs in `loss`); runs without gradients."""
        return teacher.encode(inputs) if isinstance(teacher, Teacher) else [{} for _ in inputs.records]

    @classmethod
    def needs_fit(cls, options: Any) -> bool:
        """Whether the teacher has to be fitted to the user's pictures. Then it also keeps the encoder of that time."""
        chosen = getattr(options, "teacher", None)
        return chosen is not None and chosen.cls.needs_fit(chosen.options)

    def fit_teacher(self, teacher: Any, batches: Iterable[TeacherInputs]) -> Mapping[str, float]:
        """Fit the teacher, before the first stage that uses the objective; core keeps it in the run folder.

        `batches`: that stage's pictures in seeded order, again and again; take as many as needed. Returns what to tell
        about the fit, as named numbers.
        """
        return teacher.fit(batches)

    # Around the LLM.

    def edit_visual_tokens(self, inputs: EditInputs) -> Edit | None:
        """New visual tokens for the LLM, out of place. Several editors run in the recipe's order."""
        return None

    def start_head(self, batches: Iterable[EditInputs]) -> None:
        """Start the head from the user's own pictures: a pool of visual tokens, a codebook's means.

        Called on the main process before the first stage that it is active in, unless its head comes from a model; all
        processes get the result. `batches`: that stage's visual tokens in seeded order, without gradients, again and
        again; take as many as needed.
        """

    def embed_extra_tokens(self, images: Sequence[ImageRows]) -> Tensor:
        """The LLM's inputs at the extra tokens of `images`, `[all extra tokens, D]`, image after image."""
        raise ModelError(f"{type(self).__name__} declares extra_tokens and has no embed_extra_tokens")

    # The loss.

    @abstractmethod
    def loss(self, outputs: Outputs, targets: Targets, state: Any) -> LossTerm:
        """The **sum** of the loss over all units; `state` is that of its edit, or None. Finite for any picture."""

    def visualize(self, outputs: Outputs, targets: Targets, state: Any) -> list[Picture]:
        """What it learned, for people: shown by ``foveate show`` and at the end of a run. Runs without gradients."""
        return []

    def after_step(self, step: int, statistics: Mapping[str, Tensor]) -> None:
        """Called on every process after an optimizer step that it took part in; `step` counts from 0 in the stage.

        For averages of weights, centres, revival of dead rows. `statistics`: those of `LossTerm`, summed over the whole
        step and all processes, so that every process moves its buffers alike.
        """


def resize_rows(rows: Tensor, grid: Grid, to: Grid) -> Tensor:
    """Values of one image on `grid`, `[gh*gw, …]`, on the grid `to`: bilinear, averaging where it shrinks."""
    if grid == to:
        return rows
    flat = rows.reshape(1, *grid, -1).permute(0, 3, 1, 2)
    moved = F.interpolate(flat, size=to, mode="bilinear", align_corners=False, antialias=True)
    return moved.permute(0, 2, 3, 1).reshape(to[0] * to[1], *rows.shape[1:])


def _has_rows(image: ImageRows) -> bool:
    return image.record.role == "input"
