"""`RUN/report.html` and `RUN/pictures/`: what a run was, how it went and what it has learned, on one page for people.

The page is self-contained. A plugin adds sections by the hook `report_sections`; their HTML may use plain tables (class
`num` for numbers), figures, `class="notes"`, and the page's CSS variables `--ink`, `--soft`, `--rule`, `--accent` and
`--accent-2`, which follow light and dark. Scripts and anything from the network are not loaded.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup
from PIL import Image

from foveate.errors import PluginError
from foveate.files import read_json, write_text
from foveate.fitting import FIT, TEACHERS, told_in_words
from foveate.gallery import Pictures, draws, last_line, png_ready, save_pictures
from foveate.loaded import LoadedRun
from foveate.objective import Picture
from foveate.plan import make_plan, render
from foveate.plugins import Plugins
from foveate.progress import Cell, Display
from foveate.run import Run

REPORT, PICTURES = "report.html", "pictures"
SHOWN = 8
"""Pictures of the run's own data that its objectives draw."""
_MOST = 24
"""Drawings of one objective on the page; all of them are in `RUN/pictures`."""
_WIDEST, _SMALL = 1600, 240
"""Pixels: a wider picture is shrunk for the page, a smaller one enlarged."""


@dataclass(frozen=True)
class Figure:
    """A picture of the page, its file inside `source`, and its size on the page in pixels."""

    title: str
    source: str
    width: int
    height: int
    enlarged: bool


@dataclass(frozen=True)
class Section:
    """A section of the page; what it lacks is left out. `failed`: why it is not what it should be."""

    title: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Cell]] = ()
    html: Markup | None = None
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    failed: str = ""


def report(run: LoadedRun, plugins: Plugins, display: Display) -> Path | None:
    """Draws what the run's objectives have learned, and writes its page; returns the page's path.

    The run is finished and nothing here may spoil it: whatever fails is told as a warning, and on the page, as far as
    there is one.
    """
    failed: dict[str, str] = {}
    try:
        pictures = _pictures(run, failed)
        sections = [_plan(run), *_of_plugins(run.run, plugins), *_objectives(run, pictures, failed)]
        for section in sections:
            if section.failed:
                display.say(f"warning: report, {section.title}: {section.failed}")
        path = run.run.folder / REPORT
        write_text(path, page(run, sections))
    except Exception as error:
        display.say(f"warning: the run is complete, but its report could not be written: {last_line(error)}")
        return None
    return path


def _pictures(run: LoadedRun, failed: dict[str, str]) -> Pictures:
    """Drawn of the run's own data, and saved anew."""
    folder = run.run.folder / PICTURES
    for old in folder.glob("*.png"):
        old.unlink()
    pictures = run.gallery.of_data(SHOWN, failed=failed)
    save_pictures(pictures, folder)
    return pictures


class _Captured(Display):
    """Takes a table instead of showing it."""

    def table(
        self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]], notes: Sequence[str] = ()
    ) -> None:
        self.section = Section("Plan", columns, list(rows), notes=notes)


def _plan(run: LoadedRun) -> Section:
    captured = _Captured()
    render(make_plan(run.recipe, run.data), captured)
    return captured.section


def _of_plugins(run: Run, plugins: Plugins) -> list[Section]:
    """The sections of every plugin, each by itself: one that fails leaves the others alone."""
    manager, sections = plugins.manager, list[Section]()
    for owner, plugin in manager.list_name_plugin():
        if plugin is None or "report_sections" not in plugins.hooks_of(owner):
            continue
        others = [other for other in manager.get_plugins() if other is not plugin]
        try:
            for found in manager.subset_hook_caller("report_sections", remove_plugins=others)(run=run):
                sections += [_section(owner, *entry) for entry in found]
        except Exception as error:
            sections.append(Section(f"Report of {owner}", failed=last_line(error)))
    return sections


def _section(owner: str, title: object, html: object) -> Section:
    if not isinstance(title, str) or not isinstance(html, str):
        raise PluginError(f"report_sections of {owner} must give (title, HTML) pairs of text")
    return Section(title, html=Markup(html))  # a plugin's own HTML; the page's policy keeps scripts out


def _objectives(run: LoadedRun, pictures: Pictures, failed: Mapping[str, str]) -> list[Section]:
    sections = []
    for name, drawn in pictures.items():
        kind = run.recipe.objectives[name].type
        title = f"Objective {name}" if kind == name else f"Objective {name} ({kind})"
        notes = [f"{len(drawn) - _MOST} more in {PICTURES}/"] if len(drawn) > _MOST else []
        if drawn or name in failed:
            figures = [figure(picture) for picture in drawn[:_MOST]]
            sections.append(Section(title, figures=figures, notes=notes, failed=failed.get(name, "")))
        elif draws(run.learner.rules[name].cls):
            sections.append(Section(title, notes=["no picture in the run's data is for it, or it drew none"]))
    return sections


def figure(picture: Picture) -> Figure:
    """A picture for the page: of a size that can be seen, and inside the page."""
    image, factor = png_ready(picture.image), 1
    if image.width > _WIDEST:
        image = image.resize((_WIDEST, max(1, round(image.height * _WIDEST / image.width))), Image.Resampling.BOX)
    elif max(image.size) < _SMALL:
        factor = _SMALL // max(image.size)
    data = io.BytesIO()
    image.save(data, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return Figure(picture.title, source, image.width * factor, image.height * factor, factor > 1)


def page(run: LoadedRun, sections: Sequence[Section]) -> str:
    """The HTML of the page; everything but the sections of plugins is escaped."""
    manifest = run.run.manifest()
    environment = jinja2.Environment(autoescape=True, trim_blocks=False, undefined=jinja2.StrictUndefined)
    environment.filters["cell"], environment.tests["numeric"] = _cell, _numeric
    template = environment.from_string((files("foveate") / "report.html.jinja").read_text(encoding="utf-8"))
    seconds = [line.get("step_seconds") or 0.0 for line in run.metrics()]
    versions = manifest["versions"]
    facts = [
        f"begun {datetime.fromisoformat(manifest['started']):%Y-%m-%d %H:%M} UTC",
        *([f"resumed {len(manifest['resumed'])} times"] if manifest["resumed"] else []),
        f"{len(seconds):,} steps in {timedelta(seconds=round(sum(seconds)))}",
        f"foveate {versions.get('foveate')}",
    ]
    for path in sorted((run.run.folder / TEACHERS).glob(f"*/{FIT}")):
        numbers = told_in_words(read_json(path)["told"])
        facts.append(f"teacher of {path.parent.name} fitted: {numbers}")
    told = [f"{name} {version}" for name, version in {**versions, **manifest["plugins"]}.items()]
    return template.render(name=manifest["name"], facts=facts, sections=sections, versions=told)


def _cell(value: Cell) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def _numeric(value: Cell) -> bool:
    return not isinstance(value, str) or bool(re.fullmatch(r"[-±+\d.,]+(e[-+]?\d+)?", value))
