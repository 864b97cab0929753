"""The data of a recipe, opened once: sources, tokenizer, and what the model's shape says of a sample."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from foveate.data.check import check
from foveate.data.dataset import ConversationDataset, texts
from foveate.data.mixture import Source
from foveate.data.sample import SampleRules
from foveate.data.steps import StageData
from foveate.data.templates import load_template
from foveate.data.tokenizer import load_tokenizer, train_tokenizer
from foveate.data.views import ObjectiveRule
from foveate.errors import DataError
from foveate.model.build import Blueprint
from foveate.model.language import TrainedTokenizer
from foveate.recipe import DataSource, Recipe, Stage

_FIT_TOKENS = 16384
"""Of a micro-batch of pictures for a fit."""


class DataRoom:
    """The data of a recipe: each source opened once, the tokenizer, and what the model's shape says of a sample."""

    def __init__(self, recipe: Recipe, plan: Blueprint) -> None:
        self.recipe, self.plan = recipe, plan
        self._open: dict[int, ConversationDataset] = {}

    def sources(self, data: Sequence[DataSource]) -> list[Source]:
        """The data sets of a stage, opened, with their weights."""
        for entry in data:
            if id(entry) not in self._open:
                self._open[id(entry)] = entry.dataset.cls(entry.dataset.options)
        files = [Path(getattr(entry.dataset.options, "path", entry.dataset.type)).name for entry in data]
        return [
            Source(self._open[id(entry)], entry.weight, entry.max_samples, name, entry.objectives)
            for entry, name in zip(data, files, strict=True)
        ]

    def fingerprints(self) -> dict[str, str]:
        """Stage and number of each source → fingerprint of its content."""
        return {
            f"{stage.name}.{number}": source.dataset.fingerprint()
            for stage in self.recipe.stages
            for number, source in enumerate(self.sources(stage.data))
        }

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Loaded with the LLM, or trained on the text of all stages."""
        wish = self.plan.tokenizer
        if isinstance(wish, str):
            return load_tokenizer(wish).tokenizer
        lines = (
            text
            for stage in self.recipe.stages
            for source in self.sources(stage.data)
            for text in texts(source.dataset)
        )
        return train_tokenizer(lines, (wish or TrainedTokenizer()).vocab_size)

    def objectives(self, stage: Stage) -> tuple[ObjectiveRule, ...]:
        """The objectives that are active in a stage, in the recipe's order."""
        chosen = {name: self.recipe.objectives[name] for name in self.recipe.active(stage)}
        options: dict[str, Any] = {name: component.options for name, component in chosen.items()}
        return tuple(ObjectiveRule(name, component.cls, options[name]) for name, component in chosen.items())

    def rules(self, stage: Stage, template: str | None = None, objectives: bool = True) -> SampleRules:
        """How a stage turns conversations into samples; without `objectives`, as at inference."""
        vision = {"encoder", "projector"}
        return SampleRules(
            tokenizer=self.tokenizer,
            template=load_template(template or stage.template, self.tokenizer, stage.system),
            encoder=self.plan.encoder_spec(),
            visual_grid=self.plan.visual_grid(),
            geometry=stage.geometry,
            max_length=stage.max_length,
            on_long=stage.on_long_sample,
            objectives=self.objectives(stage) if objectives else (),
            shows=objectives and any(part.partition(".")[0] in vision for part in stage.train),
        )

    def stage(self, stage: Stage, rank: int = 0, world: int = 1, only: str | None = None) -> StageData:
        """What a stage trains on, by optimizer step; for all its objectives.

        For `only` one, which is fitted to it: micro-batches do not depend on the hardware then.
        """
        hardware, number, rules = self.recipe.hardware, self.recipe.stages.index(stage), self.rules(stage)
        if only is not None:
            rules = replace(rules, objectives=tuple(rule for rule in rules.objectives if rule.name == only))
        return StageData(
            self.sources(stage.data), rules, batch_size=stage.batch_size, seed=self.recipe.seed * 1009 + number,
            budget=hardware.tokens_per_microbatch if only is None else _FIT_TOKENS, rank=rank, world=world,
            on_bad=stage.on_bad_sample, max_bad_rate=stage.max_bad_rate, workers=hardware.workers,
            prefetch=hardware.prefetch, epochs=stage.epochs, max_steps=stage.max_steps,
        )  # fmt: skip

    def held_out(
        self, data: Sequence[DataSource], stage: Stage, template: str | None = None, rank: int = 0, world: int = 1,
        objectives: bool = True,
    ) -> StageData:  # fmt: skip
        """Held-out data in their own order, once; for the stage's objectives, or as at inference."""
        hardware = self.recipe.hardware
        return StageData(
            self.sources(data), self.rules(stage, template, objectives), batch_size=stage.batch_size * 2, epochs=1,
            budget=hardware.tokens_per_microbatch, rank=rank, world=world, on_bad=stage.on_bad_sample,
            max_bad_rate=stage.max_bad_rate, workers=hardware.workers, prefetch=hardware.prefetch, shuffle=False,
        )  # fmt: skip

    def preflight(self, stage: Stage) -> None:
        """Read up to `check_samples` samples of each source whole, pictures included. Raises `DataError` with the first
        defects of each kind, unless the stage skips them and they are few enough."""
        asked: list[tuple[Sequence[DataSource], str | None]] = [(stage.data, None)]
        if stage.validate_:
            asked.append((stage.validate_.data, None))
        if stage is self.recipe.stages[-1] and self.recipe.evaluate:
            asked.append((self.recipe.evaluate.data, self.recipe.evaluate.template))
        for data, template in asked:
            workers = self.recipe.hardware.workers
            found = check(self.sources(data), self.rules(stage, template), workers, limit=stage.check_samples)
            dropped = [entry for entry in found.defects if entry.kind == "long" and stage.on_long_sample == "drop"]
            bad = [entry for entry in found.defects if entry not in dropped]
            allowed = found.samples * stage.max_bad_rate if stage.on_bad_sample == "skip" else 0
            if len({(entry.source, entry.index) for entry in bad}) > allowed:
                lines = [f"  {entry}" for entry in bad[:8]]
                lines += [f"  and {len(bad) - 8} more"] if len(bad) > 8 else []
                skip = f"; they are more than max_bad_rate: {stage.max_bad_rate:g} lets you skip"
                skip = skip if stage.on_bad_sample == "skip" else ", or set on_bad_sample: skip"
                many = "1 defect" if len(bad) == 1 else f"{len(bad)} defects"
                raise DataError(
                    f"stage {stage.name}: {many} in the {found.samples} samples that were checked\n"
                    + "\n".join(lines)
                    + f"\nMend the data (`foveate data check RECIPE` lists all defects){skip}."
                )
