"""What people see of a run: a bar on a terminal, a line every N steps elsewhere, tables. Tables go to stdout."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Cell = str | int | float | None
T = TypeVar("T")
_PIPE_WIDTH = 160
"""Columns of a table that goes into a file or a pipe."""


class Display:
    """Speaks to people: progress and messages on stderr, tables on stdout. With `quiet`, says nothing at all."""

    def __init__(self, every: int = 10, quiet: bool = False) -> None:
        self.every, self.quiet = every, quiet

    def say(self, text: str) -> None:
        """One line, as it is."""
        if not self.quiet:
            _console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)

    def table(
        self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]], notes: Sequence[str] = ()
    ) -> None:
        """A table with numbers to the right (fractions with three digits, None as a dash), notes below it."""
        if self.quiet:
            return
        rows, console = list(rows), _console(stderr=False)
        table = Table(header_style="")
        for number, column in enumerate(columns):
            text = any(isinstance(row[number], str) for row in rows)
            table.add_column(Text(column), justify="left" if text else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(_cell(value)) for value in row))
        console.print(Text(title, style="bold"), table, sep="\n", soft_wrap=False)
        for note in notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int, start: int = 0) -> Iterator[StageProgress]:
        """The progress of a stage of `total` steps, of which `start` are done."""
        with _bar(self.quiet) as bar:
            yield StageProgress(self, name, total, start, bar)

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A function to call with how many of `total` are done; without a terminal a tenth is a line."""
        with _bar(self.quiet) as bar:
            task = bar.add_task(what, total=total, text="") if bar else None
            said = 0

            def done(number: int) -> None:
                nonlocal said
                if bar and task is not None:
                    bar.update(task, completed=number)
                elif number * 10 // max(total, 1) > said:
                    said = number * 10 // max(total, 1)
                    self.say(f"{what} {number}/{total}")

            yield done

    def track(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        """The same items, counted."""
        with self.counting(what, total) as done:
            for number, item in enumerate(items, 1):
                yield item
                done(number)


class StageProgress:
    """The bar, or the lines, of one stage."""

    def __init__(self, display: Display, name: str, total: int, start: int, bar: Progress | None) -> None:
        self._display, self._name, self._total, self._first, self._bar = display, name, total, start + 1, bar
        self._recent: deque[Mapping[str, float]] = deque(maxlen=max(1, display.every))
        self._task: TaskID | None = bar.add_task(name, total=total, completed=start, text="") if bar else None

    def advance(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step `step` (from 1) is done; `metrics` is its line of `metrics.jsonl`."""
        self._recent.append(metrics)
        held_out = {key: value for key, value in metrics.items() if key.startswith("valid/")}
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step, text=describe(self._recent, None))
        elif step in (self._first, self._total) or step % self._display.every == 0:
            left = self._total - step
            self._display.say(f"{self._name} {step}/{self._total}  {describe(self._recent, left)}")
        if held_out:
            losses = "  ".join(f"{key.removeprefix('valid/')} {value:.4f}" for key, value in held_out.items())
            held = f"{self._name} {step}/{self._total}  held out: {losses}"
            self._bar.console.print(held, markup=False) if self._bar else self._display.say(held)


def describe(recent: Sequence[Mapping[str, float]], left: int | None) -> str:
    """Mean losses, rates per second and the share of waiting for data over `recent` lines of metrics.

    `left`: steps still to do, for the time that they will take.
    """
    seconds = sum(line["step_seconds"] for line in recent) or 1e-9
    parts = [key for key in recent[-1] if key.startswith("loss/")]
    shown = ["loss", *parts] if len(parts) > 1 or any(_times(recent[-1], key) for key in parts) else ["loss"]
    words = []
    for key in shown:
        values = [line[key] for line in recent if key in line]
        words.append(f"{key.removeprefix('loss/')} {sum(values) / len(values):.4f}{_times(recent[-1], key)}")
    for key in ("images", "tokens"):
        words.append(f"{_short(sum(line[key] for line in recent) / seconds)} {key}/s")
    words.append(f"data {sum(line['data_wait'] for line in recent) / seconds:.0%}")
    words.append(f"lr {max((value for key, value in recent[-1].items() if key.startswith('lr/')), default=0.0):.1e}")
    if left is not None:
        words.append(f"ETA {timedelta(seconds=round(left * seconds / len(recent)))}")
    return "  ".join(words)


def _times(line: Mapping[str, float], key: str) -> str:
    """The weight of a part of the loss, as ` (×0.5)`, where it is not 1."""
    raw = line[key]
    weight = f"{line.get(key.replace('loss/', 'weighted/', 1), raw) / raw:.3g}" if raw else "1"
    return f" (×{weight})" if weight != "1" else ""


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_interactive else Console(stderr=stderr, width=_PIPE_WIDTH)


@contextmanager
def _bar(quiet: bool) -> Iterator[Progress | None]:
    """A bar where somebody watches a terminal, else None."""
    console = _console(stderr=True)
    if quiet or not console.is_interactive:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[text]}", markup=False), console=console) as bar:
        yield bar


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 10_000 else f"{value:.0f}" if value >= 10 else f"{value:.2f}"


def _cell(value: Cell) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
