"""What a stage asks of its objectives, checked before anything is computed: all problems at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from foveate.data.views import ObjectiveRule
from foveate.errors import FoveateError, ModelError, RecipeError
from foveate.forward_pass import check_wishes
from foveate.gradients import PLACES
from foveate.model.taps import layer_index
from foveate.objective import VisionObjective
from foveate.recipe import Recipe, Stage


def check_objectives(
    recipe: Recipe, objectives: Mapping[str, VisionObjective], encoder_blocks: int, llm_blocks: int
) -> None:
    """Raises `RecipeError` with everything that cannot work: layers, wishes, teachers, parts that nothing trains."""
    rules = {name: ObjectiveRule(name, type(part), part.options) for name, part in objectives.items()}
    problems: list[str] = []
    trained = {part.partition(".")[0] for stage in recipe.stages for part in stage.train}
    if recipe.gradients_every and recipe.hardware.compile:  # their memory is reused, in kernels cached on disk too
        problems.append("gradients_every: compiled blocks allow one backward pass; leave it or hardware.compile out")
    if recipe.gradients_every and trained.isdisjoint(PLACES):
        problems.append("gradients_every: no stage trains projector or llm, whose gradients it measures; leave it out")
    for rule in rules.values():
        problems += _facts(recipe, rule, objectives[rule.name], encoder_blocks, llm_blocks)
    for stage in recipe.stages:
        problems += [f"stage {stage.name}: {problem}" for problem in _stage(recipe, stage, objectives, rules)]
    if problems:
        raise RecipeError(problems)


def _facts(
    recipe: Recipe, rule: ObjectiveRule, objective: VisionObjective, encoder_blocks: int, llm_blocks: int
) -> Iterator[str]:
    """Problems of one objective in any stage."""
    names = [stage.name for stage in recipe.stages]
    stages = [stage.name for stage in recipe.stages if rule.name in recipe.active(stage)]
    reads = rule.reads
    for stack, layers, depth in (
        ("LLM", reads.llm, llm_blocks), ("encoder", (*reads.encoder, *reads.teacher), encoder_blocks),
    ):  # fmt: skip
        for layer in layers:
            try:
                layer_index(layer, depth)
            except ModelError as error:
                yield f"objectives.{rule.name}: it reads the {stack}: {error}"
    before = rule.options.fit_before
    if before is not None and before not in names:
        yield f"objectives.{rule.name}.fit_before: there is no stage '{before}'; there are {', '.join(names)}"
    elif before is not None and stages and names.index(before) > names.index(stages[0]):
        yield f"objectives.{rule.name}.fit_before: stage '{before}' comes after '{stages[0]}', which uses it already"
    teacher = getattr(rule.options, "teacher", None)
    if teacher is not None:
        try:
            teacher.cls.describe(teacher.options, objective.context)
        except FoveateError as error:
            yield f"objectives.{rule.name}.teacher: {error}"


def _stage(
    recipe: Recipe, stage: Stage, objectives: Mapping[str, VisionObjective], rules: Mapping[str, ObjectiveRule]
) -> Iterator[str]:
    active = recipe.active(stage)
    trained = {part.partition(".")[0] for part in stage.train}
    for name in active:
        if any(True for _ in objectives[name].parameters()) and name not in {*trained, *stage.frozen}:
            yield (
                f"objective '{name}' is active and nothing of it is trained. Give it a learning rate (`train: "
                f"{{{name}: 1e-4}}`), say that it is `frozen: [{name}]`, or leave it out of `objectives`"
            )
        if "encoder" in trained and rules[name].reads.teacher and not rules[name].call("needs_fit"):
            yield (
                f"the teacher of '{name}' reads the encoder, which this stage trains, so its targets would move. Give "
                "the teacher an encoder of its own, or freeze the encoder"
            )
    for name in (name for name in stage.frozen if name not in active or name in trained):
        yield f"frozen: '{name}' is " + ("trained here" if name in active else "not active here")
    wishes = {name: rules[name].call("attention") for name in active}
    try:
        check_wishes(wishes)
    except ModelError as error:
        yield str(error)
    both = [name for name in active if wishes[name] != "causal"]
    for name in (name for name in active if both and rules[name].reads.shift):
        yield (
            f"'{name}' reads the state before each visual token (shift 1), and '{both[0]}' wishes attention "
            f"{wishes[both[0]]}: that state has seen the token already. Put them into different stages"
        )
