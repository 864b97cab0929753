"""Checks of what an objective does to the model, and of its teacher: edits, extra tokens, attention, targets, pictures.

Shapes: R rows of the objective's images, D width of the LLM, T positions of the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from foveate.errors import PluginError
from foveate.forward_pass import teacher_inputs
from foveate.objective import AttentionWish, Edit, EditInputs, Picture, VisionObjective
from foveate.targets import TeacherRoom, called
from foveate.testing.kit import MOMENT, TOLERANCE, Kit, forward
from foveate.testing.models import Bench, build_objective
from foveate.testing.report import Failed, Skipped
from foveate.types import Batch

Records = dict[tuple[str, int], Mapping[str, Tensor]]
"""(sample id, index of the image) → what the teacher made of it."""


def teacher(kit: Kit) -> str:
    """The teacher is no part of the objective."""
    objective = build_objective(kit.chosen, kit.lmm, kit.name, kit.seed)
    try:
        found = TeacherRoom({kit.name: objective}).of(kit.name)
    except PluginError as error:
        if error.__cause__ is not None:  # build_teacher raised
            raise
        raise Failed(
            str(error),
            "A teacher inside the objective is trained, sharded and written into every checkpoint.",
            "Return the teacher from build_teacher and keep no reference to it: core freezes it, owns it, and hands it "
            "to encode_target and, with teacher_in_loss, to loss as outputs.teacher.",
        ) from error
    if found is None:
        return "none"
    return f"{type(found).__name__}, {sum(tensor.numel() for tensor in found.parameters()):,} parameters, outside"


def teacher_targets(kit: Kit) -> str:
    """Targets are the same twice, and the same in any batch; pictures stay as they are."""
    bench = kit.start
    if not bench.teachers.has_teacher(kit.name):
        raise Skipped("it has no teacher")
    batch = bench.mixed
    before = [{name: value.clone() for name, value in _views(bench, views).items()} for views in batch.views]
    together, again, alone = targets(bench, batch), targets(bench, batch), Records()
    pairs = [(old, _views(bench, views)) for old, views in zip(before, batch.views, strict=True)]
    if any(not torch.equal(now[name], value) for old, now in pairs for name, value in old.items()):
        raise Failed(
            "encode_target changes what prepare_image made in place",
            "Objectives with the same teacher share the prepared pictures.",
            "Work on copies: no methods that end in _, no assignment to slices.",
        )
    for sample in bench.samples.values():
        batch = bench.pack([sample])
        alone |= {} if batch.rows[kit.name].dummy else targets(bench, batch)
    if twice := _different(together, again, 0.0):
        raise Failed(
            f"encode_target gives two different targets for one picture: {twice}",
            "Targets are computed once and kept; what is random would be drawn once for the whole training.",
            "Return the parameters of what is random (mean and variance) and draw in loss, by outputs.randn.",
        )
    if batches := _different(together, alone, TOLERANCE):
        raise Failed(
            f"a picture's target depends on the pictures beside it: {batches}",
            "Then the loss depends on the packing and the number of processes.",
            "Let encode_target treat every picture by itself (no statistics over the batch).",
        )
    names = sorted({name for record in together.values() for name in record})
    return f"{', '.join(names) or 'none'} of {len(together)} pictures: the same twice and in any batch"


def _views(bench: Bench, views: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """What `prepare_image` made for the objective."""
    return views.get(bench.rule.view, {})


def targets(bench: Bench, batch: Batch) -> Records:
    """What the teacher makes of the images of a row."""
    made = bench.teachers.encode(bench.name, teacher_inputs(batch, bench.rule, bench.lmm.encoder))
    images = batch.rows[bench.name].images
    keys = [(image.record.sample_id, image.record.index) for image in images]
    return dict(zip(keys, made, strict=True))


def _different(first: Records, second: Records, tolerance: float) -> str:
    """Which entry of which image differs most, or nothing."""
    worst, told = tolerance, ""
    for key, record in first.items():
        for name, value in record.items():
            other = second[key].get(name)
            if other is None or other.shape != value.shape:
                return f"'{name}' of image {key[1]} of sample '{key[0]}' has another shape"
            difference = (value.double() - other.double()).abs().max().item() if value.numel() else 0.0
            distance = difference / max(value.double().abs().max().item() if value.numel() else 0.0, 1e-300)
            if difference and not distance <= worst:
                worst, told = distance, f"'{name}' of sample '{key[0]}' by {distance:.2g} of its size"
    return told


def frozen_teacher(kit: Kit) -> str:
    """Training changes neither the teacher nor its targets, and gives the teacher no gradient."""
    found = kit.start.teachers.of(kit.name)
    if found is None:
        raise Skipped("it has no teacher")
    state = {key: value.clone() for key, value in found.state_dict().items()}
    before = targets(kit.start, kit.start.mixed)
    trained, why = kit.trained, "Targets are made once and kept, so they must not move with what is trained."
    kit.measure(list(trained.samples.values()))
    touched = [name for name, p in found.named_parameters() if p.grad is not None or p.requires_grad]
    moved = [key for key, value in found.state_dict().items() if not torch.equal(value, state[key])]
    if touched or moved:
        raise Failed(
            f"gradient: {', '.join(touched) or 'none'}; changed: {', '.join(moved) or 'none'}",
            "The teacher must be the same in all processes and steps.",
            "Leave requires_grad, the mode and the buffers of the teacher as core sets them.",
        )
    if told := _different(before, targets(trained, trained.mixed), TOLERANCE):
        do = "Let encode_target use the teacher and the inputs only, no parameter of the objective."
        raise Failed(f"after {kit.steps} steps the targets are others: {told}", why, do)
    return f"unchanged after {kit.steps} optimizer steps, without gradient"


def edits(kit: Kit) -> str:
    """Edits are made out of place, have the right shapes and types, and change no row but those they say."""
    bench = kit.start
    if type(bench.objective).edit_visual_tokens is VisionObjective.edit_visual_tokens:
        return "none"
    batch = bench.mixed
    rows, given, inputs = _edit_inputs(bench, batch)
    before, why = given.clone(), "The tokens that stood there are the targets of other objectives, and of autograd."
    edit: Edit | None = called(bench.objective, kit.name, "edit_visual_tokens", inputs)
    if changed := int((given != before).any(-1).sum()):
        raise Failed(
            f"edit_visual_tokens writes into inputs.tokens: {changed} of {len(given)} rows are overwritten in place",
            why,
            "Make new tokens: Edit(tokens=torch.where(edited[:, None], new, inputs.tokens), edited=edited).",
        )
    if edit is None:
        return "leaves these tokens as they are"
    problems = []
    if edit.tokens.shape != given.shape or not edit.tokens.isfinite().all():
        problems.append(f"tokens {list(edit.tokens.shape)} (needed: {list(given.shape)}, finite)")
    if edit.edited.shape != given.shape[:1] or edit.edited.dtype is not torch.bool:
        problems.append(f"edited {list(edit.edited.shape)} {edit.edited.dtype} (needed: [{len(given)}] torch.bool)")
    groups = edit.groups
    if groups is None and bench.rule.call("attention") == "groups":
        problems.append("no groups, and it wishes attention by groups")
    if groups is not None and (groups.shape != given.shape[:1] or groups.dtype is not torch.int64):
        problems.append(f"groups {list(groups.shape)} {groups.dtype} (needed: [{len(given)}] torch.int64)")
    if problems:
        raise Failed("; ".join(problems), "Core puts the edit into the LLM's inputs row by row.", "See foveate.Edit.")
    run = forward(bench.learner, batch, kit.name)
    assert run.vision is not None
    outside = ~run.edited_V.index_select(0, rows.edited)
    seen = _llm_inputs(bench, batch)[batch.visual_positions].index_select(0, rows.edited)
    if not torch.equal(seen[outside], run.vision.tokens.index_select(0, rows.edited)[outside]):
        raise Failed("rows outside `edited` reach the LLM changed", why, "Report this: core promises otherwise.")
    return f"{int(edit.edited.sum())} of {len(given)} rows edited, out of place; the others bit for bit the same"


def _edit_inputs(bench: Bench, batch: Batch) -> tuple[Any, Tensor, EditInputs]:
    """The objective's rows, the visual tokens `[R, D]`, and what its editor gets."""
    rows = batch.rows[bench.name]
    shown = [number for number, record in enumerate(batch.images) if record.role == "input"]
    given = bench.lmm.see(batch.pixels[shown]).tokens.detach().index_select(0, rows.edited)
    edited = torch.zeros(len(given), dtype=torch.bool)
    return rows, given, EditInputs(rows.whole, bench.name, MOMENT, given, edited)


def _llm_inputs(bench: Bench, batch: Batch) -> Tensor:
    """`[T, D]`: what reaches the LLM's first block."""
    return _states_and_inputs(bench, batch)[1][0]


def _states_and_inputs(bench: Bench, batch: Batch) -> tuple[Tensor, Tensor]:
    """The LLM's last states `[T, D]`, and its inputs `[1, T, D]` that they were made of, in one graph."""
    found: list[Tensor] = []

    def keep(module: Any, arguments: Any, keywords: Any) -> None:
        found.append(arguments[0] if arguments else keywords["hidden_states"])

    handle = bench.lmm.llm.blocks()[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        run = forward(bench.learner, batch, bench.name)
    finally:
        handle.remove()
    return run.states, found[0]


def extra_tokens(kit: Kit) -> str:
    """embed_extra_tokens makes as many as extra_tokens declares, each image's by itself, and they reach the LLM."""
    bench = kit.start
    batch = bench.mixed
    rows = batch.rows[kit.name]
    if not rows.extra.numel():
        return "none"
    learned: Tensor = called(bench.objective, kit.name, "embed_extra_tokens", rows.images)
    wanted = [rows.extra.numel(), bench.lmm.llm.width]
    why = "Packing makes room for exactly the tokens that extra_tokens declares."
    if list(learned.shape) != wanted or not learned.isfinite().all():
        do = "Return the tokens of all images, image after image, as many as extra_tokens says of each record."
        raise Failed(f"embed_extra_tokens gives {list(learned.shape)} (needed: {wanted}, finite)", why, do)
    for image in rows.images:
        alone: Tensor = called(bench.objective, kit.name, "embed_extra_tokens", [image])
        if not torch.equal(alone, learned[image.extra]):
            found = f"the tokens of image {image.record.index} of '{image.record.sample_id}' depend on other images"
            raise Failed(found, "Then the loss depends on the packing.", "Make each image's tokens of its own record.")
    if not torch.equal(_llm_inputs(bench, batch)[rows.extra], learned):
        raise Failed("they do not reach the LLM", why, "Report this: core promises otherwise.")
    return f"{rows.extra.numel()} for {len(rows.images)} images, each by itself"


def attention(kit: Kit) -> str:
    """The wish is one of those that exist, and every position sees exactly what it says."""
    bench = kit.start
    wish, known = bench.rule.call("attention"), get_args(AttentionWish)
    if wish not in known:
        raise Failed(
            f"attention wishes {wish!r}",
            "Core carries these wishes into the LLM's attention and no other.",
            f"Return one of {', '.join(known)}.",
        )
    if wish != "causal" and bench.rule.reads.shift:
        raise Failed(
            f"it wishes {wish} and reads the state before each visual token (shift 1)",
            "That state would have seen the very token that is to be foretold; a recipe with both is refused.",
            "Read unshifted states, or stay causal.",
        )
    batch = bench.pack([bench.samples["adjacent images"]])
    states_TD, inputs_1TD = _states_and_inputs(bench, batch)
    visible_TT = _visible(bench, batch, wish)
    image = batch.images[0]
    for position in {0, image.start, image.start + 1, image.start + image.tokens - 1, len(states_TD) - 1}:
        [gradient_1TD] = torch.autograd.grad(states_TD[position].sum(), inputs_1TD, retain_graph=True)
        sees_T = gradient_1TD[0].abs().sum(-1) > 0
        if not torch.equal(sees_T, visible_TT[position]):
            wrong = (sees_T != visible_TT[position]).nonzero().flatten().tolist()
            raise Failed(
                f"with the wish {wish}, position {position} of the row sees position {wrong[0]} "
                f"{'against' if sees_T[wrong[0]] else 'not, though'} the wish ({len(wrong)} such positions)",
                "What an objective learns depends on who sees whom.",
                "Look at the groups of the edit; if they are right, report this: core promises otherwise.",
            )
    return f"{wish}, as probed by gradients"


def _visible(bench: Bench, batch: Batch, wish: str) -> Tensor:
    """`[T, T]` bool: row i sees column j, in a row of one sample, after any number of blocks."""
    total = batch.input_ids.numel()
    visible = torch.ones(total, total, dtype=torch.bool).tril()
    if wish == "prefix_bidirectional":
        visible[: batch.prompts[0], : batch.prompts[0]] = True
    if wish in ("image_bidirectional", "groups"):
        rows, groups = batch.rows[bench.name], None
        if wish == "groups":
            *_, inputs = _edit_inputs(bench, batch)
            edit: Edit | None = called(bench.objective, bench.name, "edit_visual_tokens", inputs)
            groups = edit.groups if edit else None
        for image in rows.whole:
            place = slice(image.record.start, image.record.start + image.record.tokens)
            own = None if groups is None else groups[image.rows]
            visible[place, place] = True if own is None else (own == 0)[None, :] | (own[:, None] == own[None, :])
    return visible


def pictures(kit: Kit) -> str:
    """visualize runs without gradients and returns titled pictures."""
    bench = kit.trained
    with torch.no_grad():
        seen = bench.learner.look(bench.mixed, MOMENT)[kit.name]
        shown = called(bench.objective, kit.name, "visualize", seen.outputs, seen.targets, seen.state)
    right = isinstance(shown, list) and all(
        isinstance(entry, Picture) and entry.title.strip() and isinstance(entry.image, Image.Image) for entry in shown
    )
    if not right:
        raise Failed(
            f"visualize returns {shown!r:.200}",
            "`foveate show` and the report at the end of a run put titles and pictures on a page.",
            "Return a list of foveate.Picture(title, PIL image), or an empty list.",
        )
    return f"{len(shown)}" + (f": {', '.join(entry.title for entry in shown[:3])}" if shown else "")
