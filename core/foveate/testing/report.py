"""What the conformance kit found: results of checks, as a table and as an error that explains."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "waived", "skipped", "not run"]


class Failed(Exception):
    """A check's complaint: what was found, with numbers; why it matters; what to do."""

    def __init__(self, found: str, why: str, do: str):
        super().__init__(found)
        self.found, self.why, self.do = found, why, do


class Skipped(Exception):
    """A check that does not apply, and why; `waived`: because somebody said so."""

    def __init__(self, reason: str, waived: bool = False):
        super().__init__(reason)
        self.waived = waived


@dataclass(frozen=True)
class Result:
    """One check: its name, how it ended, what was measured or found; of a failure why it matters and what to do."""

    check: str
    status: Status
    told: str
    why: str = ""
    do: str = ""


@dataclass(frozen=True)
class Report:
    """All checks of one objective. Prints as a table."""

    objective: str
    results: tuple[Result, ...]

    def of(self, check: str) -> Result:
        """The result of a check by its name. Raises `KeyError` where there is none."""
        return {result.check: result for result in self.results}[check]

    @property
    def failures(self) -> list[Result]:
        """The checks that failed."""
        return [result for result in self.results if result.status == "failed"]

    def __str__(self) -> str:
        width = max(len(result.check) for result in self.results)
        counts = {status: sum(result.status == status for result in self.results) for status in _ORDER}
        summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        lines = [f"{self.objective}: {summary} of {len(self.results)} checks"]
        for result in self.results:
            start = f"  {result.check:<{width}}  {result.status:<7}  "
            lines += textwrap.wrap(result.told, 120, initial_indent=start, subsequent_indent=" " * len(start))
        return "\n".join(lines)


_ORDER: tuple[Status, ...] = ("passed", "failed", "waived", "skipped", "not run")


class ConformanceError(AssertionError):
    """An objective breaks the contract. Says of each failed check what was found, why it matters and what to do.

    `report` holds all results.
    """

    def __init__(self, report: Report):
        self.report = report
        parts = [f"{report.objective} fails {len(report.failures)} of {len(report.results)} checks"]
        for result in report.failures:
            told = {"found": result.told, "it matters": result.why, "to do": result.do}
            parts.append("\n".join([result.check, *(_paragraph(head, text) for head, text in told.items())]))
        blocked: dict[str, list[str]] = {}
        for result in report.results:
            if result.status == "not run":
                blocked.setdefault(result.told, []).append(result.check)
        parts += [_paragraph("not run", f"{', '.join(checks)} ({told})") for told, checks in blocked.items()]
        super().__init__("\n\n".join(parts))


def _paragraph(head: str, text: str) -> str:
    start = f"  {head}: "
    lines = text.splitlines() or [""]
    wrapped = textwrap.wrap(lines[0], 116, initial_indent=start, subsequent_indent="    ") or [start]
    return "\n".join([*wrapped, *(f"    {line}" for line in lines[1:])])
