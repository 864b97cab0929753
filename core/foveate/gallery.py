"""Pictures of what objectives have learned: of any images, or of a run's own data."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from foveate.data.dataset import SampleError
from foveate.data.mixture import Mixture
from foveate.data.packing import pack
from foveate.data.sample import SampleRules, build_sample, load_pixels
from foveate.data_room import DataRoom
from foveate.errors import FoveateError, PluginError, RunError, UserError
from foveate.explain import did_you_mean
from foveate.learner import Learner, Seen
from foveate.objective import Moment, Picture, VisionObjective
from foveate.recipe import DataSource, Recipe, Stage
from foveate.targets import called
from foveate.types import Batch, Conversation, ImageRef, ImageRole, Sample

Pictures = dict[str, list[Picture]]
"""Objective → what its `visualize` drew."""

_SEARCHED = 2000
"""Samples of a data set that are looked at for pictures of an objective."""


@dataclass
class _Scene:
    """Samples to draw, by whose rules and when, and the objectives that draw them."""

    rules: SampleRules
    stage: Stage
    samples: list[Sample]
    names: list[str]


@dataclass(frozen=True)
class Gallery:
    """Draws with the learner of a run, in evaluation mode, every objective among those that it was last trained with.

    So an editor's edits, and a wish for the attention, are there as in training. `failed`, where it is given, takes the
    last line of what an objective raised, and the others go on.
    """

    recipe: Recipe
    learner: Learner
    data: DataRoom

    def of_images(
        self, images: Sequence[str | Path | Image.Image], objectives: Collection[str] | None = None,
        seed: int | None = None, step: int = 0, failed: dict[str, str] | None = None,
    ) -> Pictures:  # fmt: skip
        """Of image-only samples, in the geometry of the last stage; `target` objectives get each image as a target too.

        Raises `DataError` for an image that cannot be read, `UserError` for an objective that is not there.
        """
        scenes: dict[object, _Scene] = {}
        names = self._names(objectives)
        for name in self._drawing(names):
            stage, company = self._company(name)
            if (stage.name, company) not in scenes:
                rules = self._rules(company)
                roles: set[ImageRole] = {"input", *(rule.cls.role for rule in rules.objectives)}
                samples = [_image_only(number, image, sorted(roles)) for number, image in enumerate(images, 1)]
                read = [load_pixels(build_sample(sample, rules), rules) for sample in samples]
                scenes[stage.name, company] = _Scene(rules, stage, read, [])
            scenes[stage.name, company].names.append(name)
        return self._drawn(names, scenes.values(), seed, step, failed)

    def of_data(
        self, count: int = 8, objectives: Collection[str] | None = None, seed: int | None = None, step: int = 0,
        failed: dict[str, str] | None = None,
    ) -> Pictures:  # fmt: skip
        """Of the first samples with pictures for an objective, up to `count` pictures: of the evaluation's data, else
        of the last stage's held-out data, else of what the objective was last trained on."""
        scenes: dict[object, _Scene] = {}
        names = self._names(objectives)
        for name in self._drawing(names):
            with _noting(failed, [name]):
                stage, company = self._company(name)
                for origin, data, template in self._sources(stage):
                    rules = self._rules(company, template)
                    found = self._first(name, data, rules, count)
                    if found:
                        key = (stage.name, company, origin, tuple(found))
                        scenes.setdefault(key, _Scene(rules, stage, list(found.values()), [])).names.append(name)
                        break
        return self._drawn(names, scenes.values(), seed, step, failed)

    def seen(self, name: str, seed: int | None = None, step: int = 0) -> Iterator[tuple[str, Seen]]:
        """What an objective sees of the run's own data, a micro-batch at a time, in order: for analyses.

        Beside it where the data come from: `evaluate`, `validate` or `train`, the first of them with images for the
        objective. They are read as they are asked for, at most 2,000 samples. Raises `UserError` for an objective that
        is not there.
        """
        [name] = self._names([name])
        stage, company = self._company(name)
        moment = Moment(self.recipe.seed if seed is None else seed, stage.name, step)
        for origin, data, template in self._sources(stage):
            rules, found = self._rules(company, template), False
            for batch in self._packed(self._opened(name, data, rules), rules):
                found = True
                yield origin, self._look(batch, moment, rules)[name]
            if found:
                break

    def _names(self, objectives: Collection[str] | None) -> list[str]:
        known = list(self.recipe.objectives)
        for name in objectives or ():
            if name not in known:
                raise UserError(f"the run has no objective '{name}'{did_you_mean(name, known)}")
        return known if objectives is None else [name for name in known if name in objectives]

    def _drawing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if draws(self.learner.rules[name].cls)]

    def _company(self, name: str) -> tuple[Stage, tuple[str, ...]]:
        """The last stage that an objective is active in, and all that are; in none, the last stage, and it alone."""
        for stage in reversed(self.recipe.stages):
            if name in self.recipe.active(stage):
                return stage, self.recipe.active(stage)
        return self.recipe.stages[-1], (name,)

    def _rules(self, company: Sequence[str], template: str | None = None) -> SampleRules:
        """How the last stage reads samples, for other objectives, and at any length that a stage has."""
        last, longest = self.recipe.stages[-1], max(stage.max_length for stage in self.recipe.stages)
        chosen = tuple(self.learner.rules[name] for name in company)
        return replace(self.data.rules(last, template), objectives=chosen, max_length=longest)

    def _sources(self, stage: Stage) -> Iterator[tuple[str, Sequence[DataSource], str | None]]:
        """Where the run's own data come from, in a word, these, and their template; the best first."""
        last = self.recipe.stages[-1]
        if self.recipe.evaluate is not None:
            yield "evaluate", self.recipe.evaluate.data, self.recipe.evaluate.template
        if last.validate_ is not None:
            yield "validate", last.validate_.data, None
        yield "train", stage.data, stage.template

    def _first(self, name: str, data: Sequence[DataSource], rules: SampleRules, count: int) -> dict[int, Sample]:
        """Position → sample of the first ones with up to `count` pictures for an objective, one more if it must be."""
        found, pictures = dict[int, Sample](), 0
        for position, sample, mine in self._samples(name, data, rules):
            with suppress(SampleError):
                if not found or pictures + mine <= count:
                    found[position], pictures = load_pixels(sample, rules), pictures + mine
            if pictures >= count:
                break
        return found

    def _opened(self, name: str, data: Sequence[DataSource], rules: SampleRules) -> Iterator[Sample]:
        """The samples with pictures for an objective."""
        for _, sample, _ in self._samples(name, data, rules):
            with suppress(SampleError):
                yield load_pixels(sample, rules)

    def _samples(self, name: str, data: Sequence[DataSource], rules: SampleRules) -> Iterator[tuple[int, Sample, int]]:
        """Position, sample, its pictures not opened, and how many of them are for an objective, where some are.

        Defective ones are left out: training has said what there is to say about them.
        """
        mixture = Mixture(self.data.sources(data), shuffle=False)
        for position in range(min(len(mixture), _SEARCHED)):
            number, index = mixture.sample_at(0, position)
            source = mixture.sources[number]
            with suppress(SampleError):
                sample = build_sample(source.dataset[index], rules, source.objectives)
                if mine := sum(name in record.objectives for record in sample.images):
                    yield position, sample, mine

    def _drawn(
        self, names: Sequence[str], scenes: Collection[_Scene], seed: int | None, step: int,
        failed: dict[str, str] | None,
    ) -> Pictures:  # fmt: skip
        pictures: Pictures = {name: [] for name in names}
        for scene in scenes:
            moment = Moment(self.recipe.seed if seed is None else seed, scene.stage.name, step)
            with torch.no_grad(), _noting(failed, scene.names):
                for batch in self._packed(scene.samples, scene.rules):
                    seen = self._look(batch, moment, scene.rules)
                    for name in (name for name in scene.names if name in seen and name not in (failed or ())):
                        with _noting(failed, [name]):
                            pictures[name] += self._visualized(name, seen[name])
        return pictures

    @torch.no_grad()
    def _look(self, batch: Batch, moment: Moment, rules: SampleRules) -> dict[str, Seen]:
        device, compute = next(self.learner.parameters()).device, self.recipe.precision.compute
        with torch.autocast(device.type, torch.bfloat16, enabled=compute == "bf16"):
            return self.learner.look(batch.to(device), moment, [rule.name for rule in rules.objectives])

    def _visualized(self, name: str, seen: Seen) -> list[Picture]:
        objective: Any = self.learner.objectives[name]
        drawn = called(objective, name, "visualize", seen.outputs, seen.targets, seen.state)
        good = isinstance(drawn, list) and all(
            isinstance(entry, Picture)
            and isinstance(entry.title, str)
            and isinstance(entry.image, Image.Image)
            and min(entry.image.size) > 0
            for entry in drawn
        )
        if not good:
            raise PluginError(f"objective '{name}': visualize must return a list of Picture(title, PIL image)")
        return list(drawn)

    def _packed(self, samples: Iterable[Sample], rules: SampleRules) -> Iterator[Batch]:
        """The samples as packed rows under the recipe's token budget, in order."""
        budget, row = self.recipe.hardware.tokens_per_microbatch, list[Sample]()
        for sample in samples:
            if row and sum(entry.length for entry in row) + sample.length > budget:
                yield pack(row, rules.objectives)
                row = []
            row.append(sample)
        if row:
            yield pack(row, rules.objectives)


def draws(objective: type[VisionObjective]) -> bool:
    """Whether an objective has something to show: a `visualize` of its own."""
    return objective.visualize is not VisionObjective.visualize


def _image_only(number: int, image: str | Path | Image.Image, roles: Sequence[ImageRole]) -> Conversation:
    """The conversation that is one image; its name, the file's, is what an objective's noise depends on."""
    source = image if isinstance(image, Image.Image) else Path(image)
    name = source.name if isinstance(source, Path) else f"image {number}"
    return Conversation(name, (), tuple(ImageRef(source, role) for role in roles))


@contextmanager
def _noting(failed: dict[str, str] | None, names: Sequence[str]) -> Iterator[None]:
    """What fails inside goes into `failed` for `names`; where there is none, it is raised."""
    try:
        yield
    except Exception as error:
        if failed is None:
            raise
        failed.update(dict.fromkeys(names, last_line(error)))


def last_line(error: BaseException) -> str:
    """The end of an error's message; the kind of error too, where the message is not our own."""
    line = (str(error).strip() or "no message").splitlines()[-1].strip()
    return line if isinstance(error, FoveateError) else f"{type(error).__name__}: {line}"


def save_pictures(pictures: Pictures, folder: Path) -> list[Path]:
    """Writes `folder/OBJECTIVE-NUMBER-TITLE.png` for each, and returns the paths. Raises `RunError` where it cannot."""
    paths = list[Path]()
    try:
        for name, drawn in pictures.items():
            folder.mkdir(parents=True, exist_ok=True)
            for number, picture in enumerate(drawn, 1):
                title = re.sub(r"[^\w.-]+", "-", picture.title).strip("-.").encode()[:80].decode(errors="ignore")
                paths.append(folder / ("-".join(filter(None, (name, f"{number:02d}", title))) + ".png"))
                png_ready(picture.image).save(paths[-1])
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"{folder} cannot be written: {reason}. Free space, or give another folder.") from error
    return paths


def png_ready(image: Image.Image) -> Image.Image:
    """The image in a mode that PNG knows."""
    return image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else image.convert("RGB")
