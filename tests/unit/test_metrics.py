"""Exact answers, the blind baseline, and what people see of a run while it goes on."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from foveate.errors import DataError
from foveate.metrics import Answer, Evaluation, Metric, evaluate, exact_answers, swap_pictures
from foveate.options import Options
from foveate.progress import Display
from foveate.types import Batch, ImageRecord

torch.set_num_threads(1)

TWO_DIGITS = 3
"""Supervised tokens a sample: two digits and an end."""


def batch_of(*pictures: Sequence[int], dummy: bool = False) -> Batch:
    """A row of samples; each has pictures that show one grey level each, and its answer is their sum in two digits."""
    images, targets, greys = [], [], []
    for number, shown in enumerate(pictures):
        sample = f"s{number}-{'-'.join(map(str, shown))}"
        images += [ImageRecord(sample, index, "input", (1, 1), 0) for index in range(len(shown))]
        targets += [sum(shown) // 10, sum(shown) % 10, 99]
        greys += list(shown)
    empty = torch.zeros(0, dtype=torch.long)
    return Batch(
        input_ids=empty,
        position_ids=empty,
        lengths=(TWO_DIGITS,) * len(pictures),
        target_positions=torch.arange(len(targets)),
        target_ids=torch.tensor(targets, dtype=torch.long),
        sample_targets=torch.arange(len(pictures)).repeat_interleave(TWO_DIGITS),
        pixels=torch.tensor(greys, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2),
        visual_positions=empty,
        images=images,
        sample_ids=[f"s{number}-{'-'.join(map(str, shown))}" for number, shown in enumerate(pictures)],
        metas=[{"sum": sum(shown)} for shown in pictures],
        dummy=dummy,
    )


def look(batch: Batch) -> Tensor:
    """A perfect model: it reads the answer off the pixels, and only off them."""
    tokens = []
    row = 0
    for sample in batch.sample_ids:
        count = sum(image.sample_id == sample for image in batch.images)
        total = int(batch.pixels[row : row + count, 0, 0, 0].sum())
        tokens += [total // 10, total % 10, 99]
        row += count
    return torch.tensor(tokens)


class Right(Metric):
    """How many answers are right, seen and blind."""

    class Options(Options):
        title: str = "right answers"

    blind = True

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.answers: list[Answer] = []

    def update(self, answers: Sequence[Answer]) -> None:
        self.answers += answers

    def summary(self) -> Evaluation:
        seen = sum(answer.exact for answer in self.answers) / len(self.answers)
        blind = sum(answer.blind for answer in self.answers) / len(self.answers)
        row = ("all", len(self.answers), seen, blind, None)
        columns = ("question", "n", "accuracy", "blind", "chance")
        return Evaluation(self.options.title, columns, [row], {"accuracy": seen, "blind": blind}, ("note [1]",))


class Seeing(Right):
    blind = False


def test_one_wrong_token_makes_an_answer_wrong() -> None:
    batch = batch_of([12], [30], [41])
    tokens = batch.target_ids.clone()
    assert exact_answers(batch, tokens) == [True, True, True]
    tokens[5] = 7  # the end of the second answer
    assert exact_answers(batch, tokens) == [True, False, True]


def test_a_sample_without_a_supervised_token_is_no_answer() -> None:
    batch = batch_of([12], [30])
    keep = batch.sample_targets == 1
    batch.sample_targets, batch.target_ids = batch.sample_targets[keep], batch.target_ids[keep]
    assert exact_answers(batch, batch.target_ids) == [None, True]
    metric = Seeing(Right.Options())
    evaluate([metric], [batch], lambda batch: batch.target_ids)
    assert [answer.id for answer in metric.answers] == ["s1-30"]


@pytest.mark.parametrize(
    "pictures",
    [
        [[1], [2]],
        [[1], [2], [3]],
        [[1, 2], [3], [4]],
        [[1, 2, 3], [4], [5], [6]],
        [[1], [2, 3, 4], [5, 6, 7]],
        [[1], [], [2], [], [3, 4]],
        [[1, 2, 3], [4, 5, 6]],
    ],
)
def test_every_picture_is_replaced_by_one_of_another_sample(pictures: list[list[int]]) -> None:
    batch = batch_of(*pictures)
    swapped = swap_pictures(batch)
    assert swapped is not None
    owner = {grey: number for number, shown in enumerate(pictures) for grey in shown}
    shown = [int(grey) for grey in swapped.pixels[:, 0, 0, 0]]
    assert sorted(shown) == sorted(owner), "they only change places"
    assert all(owner[new] != owner[int(old)] for new, old in zip(shown, batch.pixels[:, 0, 0, 0], strict=True))
    assert swapped.target_ids is batch.target_ids


def test_text_only_rows_are_their_own_blind_row() -> None:
    batch = batch_of([], [])
    assert swap_pictures(batch) is batch


def test_a_model_that_looks_is_right_and_blind_it_is_right_by_coincidence_only() -> None:
    batches = [batch_of([11], [22], [11], [44]), batch_of([5, 6], [1], [2]), batch_of([9], dummy=True)]
    metric = Right(Right.Options())
    (evaluation,) = evaluate([metric], batches, look)
    assert [answer.id for answer in metric.answers] == ["s0-11", "s1-22", "s2-11", "s3-44", "s0-5-6", "s1-1", "s2-2"]
    assert [answer.meta["sum"] for answer in metric.answers] == [11, 22, 11, 44, 11, 1, 2]
    assert evaluation.values["accuracy"] == 1.0
    # half the row apart: 11 22 11 44 is shown as 11 44 11 22, so the two elevens are right by coincidence
    assert [answer.blind for answer in metric.answers] == [True, False, True, False, False, False, False]


def test_a_row_of_a_single_sample_borrows_pictures_also_when_it_comes_first() -> None:
    metric = Right(Right.Options())
    evaluate([metric], [batch_of([7, 8]), batch_of([1], [2], [3])], look)
    answers = {answer.id: answer for answer in metric.answers}
    assert len(answers) == 4 and all(answer.exact for answer in answers.values())
    assert not answers["s0-7-8"].blind
    with pytest.raises(DataError, match="s0-7: no other sample has as many pictures"):
        evaluate([Right(Right.Options())], [batch_of([7])], look)


def test_without_a_blind_metric_the_data_are_run_once() -> None:
    calls = []

    def counted(batch: Batch) -> Tensor:
        calls.append(batch)
        return look(batch)

    metric = Seeing(Right.Options(title="x"))
    evaluation = evaluate([metric], [batch_of([7])], counted)[0]
    assert len(calls) == 1 and evaluation.title == "x" and evaluation.values == {"accuracy": 1.0, "blind": 0.0}


def test_answers_of_all_processes_are_joined() -> None:
    other = Answer("from-rank-1", {}, False, False)
    metric = Seeing(Right.Options())
    evaluate([metric], [batch_of([7])], look, gather=lambda own: [*own, other])
    assert metric.summary().values["accuracy"] == 0.5


def line(step: int, **more: float) -> dict[str, float]:
    losses = {"loss": 4.0 / step, "loss/text": 4.0 / step}
    base = {**losses, "images": 32, "tokens": 8000, "lr/llm": 2e-4, "lr/projector": 1e-3}
    return {**base, "step_seconds": 0.5, "data_wait": 0.125, **more}


def test_without_a_terminal_progress_is_a_line_every_n_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(every=4).stage("align", total=10, start=1) as progress:
        for step in range(2, 11):
            progress.advance(step, line(step, **({"valid/loss/text": 0.25} if step == 8 else {})))
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [text.split("  ")[0] for text in lines] == [f"align {step}/10" for step in (2, 4, 8, 8, 10)]
    mean = sum(4 / step for step in (5, 6, 7, 8)) / 4
    assert lines[2] == f"align 8/10  loss {mean:.4f}  64 images/s  16.0k tokens/s  data 25%  lr 1.0e-03  ETA 0:00:01"
    assert lines[3] == "align 8/10  held out: loss/text 0.2500"


def test_parts_of_the_loss_are_shown_when_there_are_several(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(every=1).stage("align", total=1) as progress:
        progress.advance(1, line(1, **{"loss/ross": 0.5}))
    assert "loss 4.0000  text 4.0000  ross 0.5000" in capsys.readouterr().err


def test_a_table_goes_to_stdout_with_brackets_dashes_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    metric = Right(Right.Options())
    evaluate([metric], [batch_of([1], [2])], look)
    result = metric.summary()
    Display().table(result.title, result.columns, [*result.rows, ("[b]x[/b]", 12345, 0.5, 0.25, 0.1)], result.notes)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "right answers" in captured.out and "note [1]" in captured.out
    assert "│ [b]x[/b] │ 12,345 │    0.500 │ 0.250 │  0.100 │" in captured.out
    assert "│ all      │      2 │    1.000 │ 0.000 │      – │" in captured.out


def test_quiet_says_nothing_and_tracking_passes_everything(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with Display(quiet=True).stage("align", total=1) as progress:
        progress.advance(1, line(1))
    Display(quiet=True).table("t", ("a",), [("b",)])
    Display(quiet=True).say("x")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert list(Display().track(range(25), "samples", 25)) == list(range(25))
    assert capsys.readouterr().err.splitlines()[-1] == "samples 25/25"
