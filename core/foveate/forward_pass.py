"""One run of the LMM on a packed row, with all that objectives read of it and change in it.

Shapes: T positions of the row, V visual tokens, R rows of one objective, I images, D width of the LLM.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from foveate.data.views import ObjectiveRows, ObjectiveRule
from foveate.errors import ModelError, PluginError
from foveate.model.attention import Segments, image_blocks, prefix_blocks
from foveate.model.encoder import Encoder
from foveate.model.lmm import LMM, encode
from foveate.model.taps import END, layer_index, tapped
from foveate.objective import Edit, EditInputs, Layer, Moment, Outputs, Targets, TeacherInputs, VisionObjective
from foveate.targets import TeacherRoom, called
from foveate.types import Batch


class ForwardPass:
    """Runs when made; then `states` `[T, D]`, and `outputs`, `targets` and `edits` of each active objective."""

    def __init__(
        self,
        lmm: LMM,
        batch: Batch,
        objectives: Mapping[str, VisionObjective],
        rules: Mapping[str, ObjectiveRule],
        moment: Moment,
        active: Collection[str] | None,
        teachers: TeacherRoom,
    ) -> None:
        self.lmm, self.batch, self.moment, self.teachers = lmm, batch, moment, teachers
        self.objectives = {
            name: objective
            for name, objective in objectives.items()
            if name in batch.rows and (active is None or name in active)
        }
        self.rows: dict[str, ObjectiveRows] = {name: batch.rows[name] for name in self.objectives}
        self.reads = {name: rules[name].reads for name in self.objectives}
        self.rules = rules
        self.edits: dict[str, Edit] = {}
        self._made: dict[Any, list[dict[str, Tensor]]] = {}
        self._shown = [number for number, image in enumerate(batch.images) if image.role == "input"]
        self._layers = self._encoder_layers()
        self._hidden: dict[int, Tensor] | None = None
        self._run(objectives)

    def _encoder_layers(self) -> set[int]:
        wanted = {layer for reads in self.reads.values() for layer in (*reads.encoder, *reads.teacher)}
        depth = len(self.lmm.encoder.blocks()) if wanted else 0
        return {layer_index(layer, depth) for layer in wanted}

    def _run(self, objectives: Mapping[str, VisionObjective]) -> None:
        batch, lmm, device = self.batch, self.lmm, self.batch.input_ids.device
        embeds_TD = None
        self.vision, self.edited_V = None, torch.zeros(batch.visual_positions.numel(), dtype=torch.bool, device=device)
        if self._shown:
            pixels = batch.pixels if len(self._shown) == len(batch.images) else batch.pixels[self._shown]
            self.vision = lmm.see(pixels, self._layers)
            embeds_TD = lmm.place(batch, self._edit(self.vision.tokens))
        embeds_TD = lmm.llm.embed(batch.input_ids) if embeds_TD is None else embeds_TD
        for name, objective in objectives.items():
            if name in batch.rows and batch.rows[name].extra.numel():
                learned = self._extra_inputs(name, objective, batch.rows[name])
                learned = learned if name in self.objectives else learned.detach()  # it sits this step out
                embeds_TD = embeds_TD.index_copy(0, batch.rows[name].extra, learned.to(embeds_TD.dtype))
        blocks = lmm.llm.blocks()
        wanted = {layer_index(layer, len(blocks)) for reads in self.reads.values() for layer in reads.llm}
        with tapped(blocks, wanted) as found:
            self.states = lmm.llm(embeds_TD, batch.position_ids, self._segments())
        self.layers = {layer: states.reshape(self.states.shape) for layer, states in found.items()}
        self.layers[END] = self.states

    def _edit(self, tokens_VD: Tensor) -> Tensor:
        """The visual tokens after all editors; what none of them uses stays bit for bit."""
        for name, objective in self.objectives.items():
            rows = self.rows[name]
            if type(objective).edit_visual_tokens is VisionObjective.edit_visual_tokens or not rows.edited.numel():
                continue
            old_RD = tokens_VD.index_select(0, rows.edited)
            given, edited_R = _full(old_RD.clone()), self.edited_V.index_select(0, rows.edited)
            version = given._version
            with torch.autocast(given.device.type, enabled=False):
                inputs = EditInputs(rows.whole, name, self.moment, given, edited_R)
                edit: Edit | None = called(objective, name, "edit_visual_tokens", inputs)
            if given._version != version:
                raise PluginError(f"objective '{name}' edits the visual tokens in place; return new ones in an Edit")
            if edit is None:
                continue
            if not isinstance(edit, Edit):
                what = type(edit).__name__
                raise PluginError(f"objective '{name}': edit_visual_tokens must return an Edit or None, not {what}")
            fitting = edit.tokens.shape == old_RD.shape and edit.edited.shape == edited_R.shape
            if not fitting or edit.edited.dtype is not torch.bool:
                raise PluginError(
                    f"objective '{name}': its edit has tokens {list(edit.tokens.shape)} and edited "
                    f"{list(edit.edited.shape)} {edit.edited.dtype}; needed are {list(old_RD.shape)} and "
                    f"{list(edited_R.shape)} torch.bool"
                )
            new_RD = edit.tokens
            if edit.keep_norm:
                norm_R1 = given.detach().norm(dim=-1, keepdim=True)
                new_RD = new_RD * (norm_R1 / new_RD.norm(dim=-1, keepdim=True).clamp_min(1e-12))
            used_RD = torch.where(edit.edited[:, None], new_RD.to(old_RD.dtype), old_RD)
            tokens_VD = tokens_VD.index_copy(0, rows.edited, used_RD)
            self.edited_V = self.edited_V.index_copy(0, rows.edited, edited_R | edit.edited)
            self.edits[name] = edit
        return tokens_VD

    def _extra_inputs(self, name: str, objective: VisionObjective, rows: ObjectiveRows) -> Tensor:
        learned: Tensor = called(objective, name, "embed_extra_tokens", rows.images)
        if learned.shape != (rows.extra.numel(), self.lmm.llm.width):
            raise PluginError(
                f"objective '{name}': embed_extra_tokens gave {list(learned.shape)}; its extra_tokens ask for "
                f"{[rows.extra.numel(), self.lmm.llm.width]}"
            )
        return learned

    def _segments(self) -> Segments:
        """The samples' borders, and what the active objectives wish of the attention inside them."""
        batch, device = self.batch, self.batch.input_ids.device
        wishes = {name: self.rules[name].call("attention") for name in self.objectives}
        asked = {name: wish for name, wish in wishes.items() if wish != "causal"}
        if not asked:
            return Segments.of(batch.lengths, device)
        check_wishes(wishes)
        name, wish = next(iter(asked.items()))
        seen = {number for other in asked for number in self.rows[other].numbers}
        spans = [(batch.images[number].start, batch.images[number].tokens) for number in sorted(seen)]
        if wish == "prefix_bidirectional":
            ends = list(accumulate(batch.lengths))
            prompted = {bisect_right(ends, start) for start, length in spans if length}  # samples that show its images
            prompts = [length if sample in prompted else 0 for sample, length in enumerate(batch.prompts)]
            return Segments.of(batch.lengths, device, prefix_blocks(batch.lengths, prompts))
        total, groups = batch.input_ids.numel(), None
        edit = self.edits.get(name)
        if wish == "groups" and edit is not None:
            if edit.groups is None:
                raise PluginError(f"objective '{name}' wishes attention by groups, and its edit has none")
            where = batch.visual_positions.index_select(0, self.rows[name].edited)
            groups = torch.zeros(total, dtype=torch.long, device=device).index_copy(0, where, edit.groups.to(device))
        return Segments.of(batch.lengths, device, image_blocks(total, spans), groups)

    def outputs(self, name: str) -> Outputs:
        """The row as one objective sees it."""
        rows, objective, batch, depth = self.rows[name], self.objectives[name], self.batch, len(self.lmm.llm.blocks())
        reads = self.reads[name]

        def at(positions: Tensor) -> Any:
            def read(layer: Layer) -> Tensor:
                if layer not in reads.llm:
                    raise PluginError(f"objective '{name}' reads the LLM's layer {layer}, which its `reads` lacks")
                return _full(self.layers[layer_index(layer, depth)].index_select(0, positions))

            return read

        def encoder(layer: Layer) -> Tensor:
            if layer not in reads.encoder:
                raise PluginError(f"objective '{name}' reads the encoder's layer {layer}, which its `reads` lacks")
            return self._encoder_states(rows.numbers, layer)

        def tokens() -> Tensor:
            return _full(self.vision.tokens if self.vision else self.states[:0]).index_select(0, rows.visual)

        return Outputs(
            rows.images, name, self.moment, visual_tokens=tokens,
            like=self.states.new_empty(0, dtype=torch.promote_types(self.states.dtype, torch.float32)),
            edited=lambda: self.edited_V.index_select(0, rows.visual),
            states=at(rows.read), extra_states=at(rows.extra), encoder_states=encoder,
            encoder_grid=self.lmm.encoder.spec.grid,
            teacher=self.teachers.of(name) if objective.teacher_in_loss else None,
            pixels=lambda: batch.pixels[list(rows.numbers)], spec=self.lmm.encoder.spec,
        )  # fmt: skip

    def targets(self, name: str) -> Targets:
        """What the objective's teacher makes of its images; made once for all that share teacher and images."""
        rows = self.rows[name]
        if not self.teachers.has_teacher(name):
            return Targets([{} for _ in rows.numbers], rows.images)
        key = self.teachers.keys[name], rows.numbers
        if key not in self._made:
            copy = self.teachers.encoders.get(self.teachers.keys[name])
            own = None if copy is not None else lambda layer: self._encoder_states(rows.numbers, layer)
            inputs = teacher_inputs(self.batch, self.rules[name], copy or self.lmm.encoder, own)
            self._made[key] = self.teachers.encode(name, inputs)
        return Targets(self._made[key], rows.images)

    def _encoder_states(self, numbers: tuple[int, ...], layer: Layer) -> Tensor:
        """`[I*h*w, E]` of some images; those that the model does not see take an encoder pass of their own."""
        index = layer_index(layer, len(self.lmm.encoder.blocks()))
        if set(numbers) <= set(self._shown):
            assert self.vision is not None
            where, states = [self._shown.index(number) for number in numbers], self.vision.layers[index]
        else:
            if self._hidden is None:
                with torch.no_grad():
                    self._hidden = encode(self.lmm.encoder, self.batch.pixels, self._layers)
            where, states = list(numbers), self._hidden[index]
        chosen = states.detach().clone() if where == list(range(len(states))) else states.detach()[where]
        return _full(chosen.flatten(0, 1))


def teacher_inputs(
    batch: Batch, rule: ObjectiveRule, encoder: Encoder, states: Callable[[Layer], Tensor] | None = None
) -> TeacherInputs:
    """What the teacher of an objective gets of a row. `states`: the encoder's, where a pass of it exists already."""
    rows: ObjectiveRows = batch.rows[rule.name]
    made: dict[int, Tensor] = {}

    def read(layer: Layer) -> Tensor:
        if layer not in rule.reads.teacher:
            raise PluginError(f"the teacher of '{rule.name}' reads the encoder's layer {layer}; `reads` lacks it")
        if states is not None:
            return states(layer)
        depth = len(encoder.blocks())
        if not made:
            layers = {layer_index(entry, depth) for entry in rule.reads.teacher}
            with torch.no_grad():
                made.update(encode(encoder, batch.pixels[list(rows.numbers)], layers))
        return _full(made[layer_index(layer, depth)].flatten(0, 1))

    prepared = [batch.views[number].get(rule.view, {}) for number in rows.numbers]
    return TeacherInputs([image.record for image in rows.images], prepared, read, encoder.spec.grid, encoder)


@torch.no_grad()
def visual_tokens(lmm: LMM, batch: Batch, name: str, moment: Moment) -> EditInputs:
    """The visual tokens of an objective's images, before any edit; none of images that the model does not see."""
    rows: ObjectiveRows = batch.rows[name]
    shown = [number for number, image in zip(rows.numbers, rows.whole, strict=True) if image.record.tokens]
    tokens = _full(lmm.see(batch.pixels[shown]).tokens) if shown else batch.pixels.new_zeros(0, lmm.llm.width)
    return EditInputs(rows.whole, name, moment, tokens, tokens.new_zeros(len(tokens), dtype=torch.bool))


def check_wishes(wishes: Mapping[str, str]) -> None:
    """Raises `ModelError` where objectives wish for different attention, or two of them for groups."""
    asked = {name: wish for name, wish in wishes.items() if wish != "causal"}
    if len(set(asked.values())) > 1 or list(asked.values()).count("groups") > 1:
        told = ", ".join(f"'{name}' {wish}" for name, wish in asked.items())
        raise ModelError(
            f"objectives wish for attention that does not go together: {told}. Put them into different stages."
        )


def _full(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()
