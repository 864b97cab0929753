"""`train(recipe)`: the whole run, read as a story."""

from __future__ import annotations

from foveate.assembly import save_heads
from foveate.files import atomic_folder, write_json
from foveate.fitting import fit_teachers, start_heads
from foveate.loaded import MODEL, LoadedRun
from foveate.metrics import Evaluation, evaluate
from foveate.model.build import save_lmm
from foveate.processes import together
from foveate.progress import Display
from foveate.recipe import Recipe
from foveate.report import report
from foveate.run import Run, released
from foveate.session import Session, StopRequest
from foveate.stage import StageLoop

EVALUATION = "evaluation.json"


def train(recipe: Recipe, *, resume: bool = False, display: Display | None = None) -> Run:
    """Train a recipe's stages one after the other, save the model, evaluate it; returns the run.

    Raises `UserError` before anything is computed when recipe, data or folder are wrong, `TrainingError` when training
    cannot go on, `Interrupted` after a checkpoint when somebody asks for a stop.
    """
    with together(), StopRequest() as stop, released(recipe.output):
        session = Session.open(recipe, display or Display(recipe.log_every), stop, resume)
        main = session.accelerator.is_main_process
        for stage in recipe.stages:
            if session.finished(stage):
                continue
            if main:
                session.plugins.hook.stage_started(run=session.run, stage=stage.name)
            fit_teachers(session, stage)
            loop = StageLoop(session, stage, session.stage_data(stage))
            start_heads(session, stage)
            loop.run()
            if main:
                session.plugins.hook.stage_finished(run=session.run, stage=stage.name)
        if all(session.finished(stage) for stage in recipe.stages):  # resumed at its end, for what is left to do
            fit_teachers(session, recipe.stages[-1])
        save_model(session)
        evaluate_run(session)
        report_run(session)
        session.close()
    return session.run


def save_model(session: Session) -> None:
    """The trained LMM as `RUN/model`: complete or absent."""
    for name, part in session.lmm.named_children():
        session.frozen.thaw(name, part)
    if session.accelerator.is_main_process:
        last = session.recipe.stages[-1]
        facts = {
            "image_token_id": session.data.rules(last).image_token_id,
            "geometry": last.geometry,
            "template": last.template,
            "system": last.system,
            "visual_grid": list(session.plan.visual_grid()),
        }
        with atomic_folder(session.run.folder / MODEL) as folder:
            save_lmm(session.lmm, session.plan, folder, session.data.tokenizer, facts)
            save_heads(session.objectives, session.recipe, folder)
    session.accelerator.wait_for_everyone()


def report_run(session: Session) -> None:
    """Pictures of what the objectives have learned, and `RUN/report.html`; the others wait for the main process."""
    if session.accelerator.is_main_process:
        finished = LoadedRun(session.run, session.recipe, session.lmm, session.learner.eval(), session.data)
        report(finished, session.plugins, session.display)
    session.accelerator.wait_for_everyone()


def evaluate_run(session: Session) -> list[Evaluation]:
    """The recipe's metrics on its held-out data: shown, and written to `RUN/evaluation.json`."""
    wish = session.recipe.evaluate
    if wish is None:
        return []
    metrics = [component.cls(component.options) for component in wish.metrics]
    learner = session.learner.eval()
    data = session.evaluation_data(wish)
    batches = (
        batch.to(session.device)
        for work in session.display.track(data.steps(), "evaluating", data.total_steps)
        for batch in work.batches
    )

    def predict(batch: object) -> object:
        with session.accelerator.autocast():
            return learner.predict(batch)  # type: ignore[arg-type]

    found = evaluate(metrics, batches, predict, session.of_all_processes)  # type: ignore[arg-type]
    if session.accelerator.is_main_process:
        for evaluation in found:
            session.display.table(evaluation.title, evaluation.columns, evaluation.rows, evaluation.notes)
        write_json(session.run.folder / EVALUATION, [vars(evaluation) for evaluation in found])
    return found
