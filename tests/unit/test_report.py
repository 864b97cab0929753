"""The page of a run: whole in one file, right in its numbers, and never in the way of the run itself."""

from __future__ import annotations

import base64
import io
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import foveate
import foveate.loaded
import foveate.report
from foveate.files import read_json, write_json
from foveate.loaded import load_run
from foveate.plugins import Plugins, load_plugins
from foveate.progress import Display
from foveate.report import report
from foveate.run import Run
from foveate_lab.curves import Axis, drawing, running_mean, thinned
from tests.showing import RATES, finished_run, plugins

HOSTILE = "<script>alert('x')</script> & \"y\""


class Page(HTMLParser):
    """The elements of a page, its text by section, the rows of its tables, and whether its elements close."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.open: list[str] = []
        self.title = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "path", "line", "circle", "br"):
            self.open.append(tag)
        if tag == "section":
            self.title = ""
        elif tag == "tr":
            self.rows.setdefault(self.title, []).append([])
        elif tag in ("td", "th"):
            self.rows[self.title][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h2"]:
            self.title += data
        elif self.open and self.open[-1] in ("td", "th"):
            self.rows[self.title][-1][-1] += data
        self.text[self.title] = self.text.get(self.title, "") + data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every such element."""
        return [attributes for name, attributes in self.elements if name == tag]


class Told(Display):
    """Remembers what it is told to say."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def with_sections(**hooks: Any) -> Plugins:
    """What is installed, and a plugin for each `name=function`, which is its `report_sections`."""
    found = load_plugins()
    for name, function in hooks.items():
        plugin: Any = ModuleType(name)
        plugin.HOOK_API = 1
        plugin.report_sections = foveate.hookimpl(function)
        found.add(plugin, f"{name} (tests)")
    return found


@pytest.fixture(scope="module")
def told() -> Told:
    return Told()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shared_corpus: Path, told: Told) -> Run:
    """Two stages with held-out losses and an evaluation; one of the objectives cannot draw."""
    source = {"path": str(shared_corpus / "data.json"), "images": str(shared_corpus / "images")}
    objectives = {"drawn": {}, "broken": {"type": "failing"}, "silent": {"type": "noisy"}}
    stages = [
        {"name": "first", "max_steps": 3, "validate": {"data": [{**source, "max_samples": 8}], "every": 2}},
        {"name": "second", "train": {**RATES, "llm": 5e-4, **dict.fromkeys(objectives, 1e-2)}},
    ]
    evaluate = {"data": [{**source, "max_samples": 40}], "metrics": ["answers"]}
    folder = tmp_path_factory.mktemp("run")
    return finished_run(folder, shared_corpus, objectives, stages, evaluate=evaluate, display=told)


@pytest.fixture
def page(run: Run) -> Page:
    return Page(run.folder / "report.html")


def test_the_page_is_whole_and_asks_nobody(run: Run, page: Page) -> None:
    text = (run.folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|<link|<script|javascript:| on\w+=", text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "base"}
    assert page.of("meta")[1]["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert [link["href"] for link in page.of("a")] == [f"#{section['id']}" for section in page.of("section")]
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(names)) == len(names)
    assert all(image["role"] == "img" and image["aria-label"] for image in page.of("svg"))


def test_pictures_are_in_the_page_and_beside_it(run: Run, page: Page) -> None:
    images, files = page.of("img"), sorted((run.folder / "pictures").glob("*.png"))
    assert len(images) == len(files) == 8 and all(path.name.startswith("drawn-") for path in files)
    for element, path in zip(images, files, strict=True):
        kind, _, data = str(element["src"]).partition(",")
        assert kind == "data:image/png;base64" and str(element["alt"]).startswith("error of ")
        inside = Image.open(io.BytesIO(base64.b64decode(data)))
        assert np.array_equal(np.asarray(inside), np.asarray(Image.open(path)))
        assert int(str(element["width"])) == 240 and element["class"] == "small", "4 x 4 pixels are enlarged"


def test_numbers_are_those_of_the_run(run: Run, page: Page) -> None:
    lines, table = run.metrics(), page.rows["Speed"]
    for stage, row in zip(("first", "second"), table[1:], strict=True):
        mine = [line for line in lines if line["stage"] == stage]
        rate = statistics.median(line["tokens"] / line["step_seconds"] for line in mine)
        wait = sum(line["data_wait"] for line in mine) / sum(line["step_seconds"] for line in mine)
        assert (row[0], row[1], row[4], row[6]) == (stage, str(len(mine)), f"{rate:,.0f}", f"{wait:.1%}")
    evaluation = read_json(run.folder / "evaluation.json")[0]
    found = page.rows[f"Evaluation: {evaluation['title']}"]
    assert found[0] == evaluation["columns"]
    assert found[1][:3] == [
        str(value) if isinstance(value, int | str) else f"{value:.3f}" for value in evaluation["rows"][0][:3]
    ]
    plan = {(row[0], row[1]): row for row in page.rows["Plan"][1:]}
    assert plan["first", "llm"][5] == "0.001" and plan["second", "llm"][5] == "0.0005"
    assert plan["first", "drawn"][3] == str(3 * 32 + 3), "parameters of its head"


def test_every_loss_metric_and_rate_is_drawn(run: Run, page: Page) -> None:
    labels = {str(image["aria-label"]).removesuffix(", over 5 steps") for image in page.of("svg")}
    keys = {key for line in run.metrics() for key in line if key.startswith("loss") or key.endswith("/error")}
    assert keys >= {"loss", "loss/text", "loss/broken", "drawn/error"}
    assert labels == keys | {"learning rate", "norm of the gradient"}
    assert page.text["Losses"].count("held out") == 4
    assert "encoder, projector" in page.text["Learning rates and gradient"], "equal rates share a curve"


def test_an_objective_that_cannot_draw_is_told_and_spoils_nothing(run: Run, page: Page, told: Told) -> None:
    message = "objective 'broken' failed in tests.showing.Failing.visualize: ValueError: no colours left <b>"
    assert message in page.text["Objective broken (failing)"]
    assert f"warning: report, Objective broken (failing): {message}" in told.lines
    assert "Objective silent (noisy)" not in page.text, "it never draws"
    assert (run.folder / "model" / "foveate.json").is_file() and (run.folder / "evaluation.json").is_file()


def test_nothing_of_a_hostile_name_gets_into_the_page(run: Run, tmp_path: Path) -> None:
    loaded = load_run(run.folder, device="cpu", plugins=plugins())
    changed = tmp_path / "run"
    changed.mkdir()
    manifest = read_json(run.folder / "manifest.json")
    write_json(changed / "manifest.json", {**manifest, "name": HOSTILE, "plugins": {HOSTILE: "1"}})
    evaluation = read_json(run.folder / "evaluation.json")[0]
    evaluation |= {"title": HOSTILE, "columns": [HOSTILE], "rows": [[HOSTILE]], "notes": [HOSTILE]}
    write_json(changed / "evaluation.json", [evaluation])
    lines = [{**line, f"drawn/{HOSTILE}": 1.0, f"lr/{HOSTILE}": 0.1, "stage": HOSTILE} for line in run.metrics()]
    (changed / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    objective: Any = loaded.learner.objectives["drawn"]
    drawn = type(objective).visualize
    objective.visualize = lambda *seen: [foveate.Picture(HOSTILE, entry.image) for entry in drawn(objective, *seen)]

    def bad(run: Run) -> Any:
        raise ValueError(HOSTILE)

    def titled(run: Run) -> Any:
        return [(HOSTILE, "<p>fine</p>")]

    display = Told()
    hostile = foveate.loaded.LoadedRun(Run(changed), loaded.recipe, loaded.lmm, loaded.learner, loaded.data)
    path = report(hostile, with_sections(bad=bad, titled=titled), display)
    assert path == changed / "report.html"
    text, page = path.read_text(encoding="utf-8"), Page(path)
    assert "<script" not in text and not page.of("script")
    assert page.of("img")[0]["alt"] == HOSTILE and HOSTILE in page.text[HOSTILE] and "fine" in page.text[HOSTILE]
    assert f"ValueError: {HOSTILE}" in page.text["Report of bad (tests)"]
    assert any(HOSTILE in line and line.startswith("warning: report, Report of bad") for line in display.lines)
    assert all(path.parent == changed / "pictures" for path in changed.rglob("*.png"))


def test_sections_of_plugins_are_checked_one_by_one(run: Run, tmp_path: Path) -> None:
    def good(run: Run) -> Any:
        return [("Good", f"<p>steps: {len(run.metrics())}</p>"), ("Second", "<b>2</b>")]

    def numbers(run: Run) -> Any:
        return [("Good", 3)]

    loaded = load_run(run.folder, device="cpu", plugins=plugins())
    path = report(loaded, with_sections(numbers=numbers, good=good), Told())
    assert path is not None
    page = Page(path)
    assert "steps: 5" in page.text["Good"] and "2" in page.text["Second"]
    assert "numbers (tests) must give (title, HTML) pairs" in page.text["Report of numbers (tests)"]


def test_a_page_that_cannot_be_made_is_a_warning(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("plan")

    monkeypatch.setattr(foveate.report, "make_plan", broken)
    display, loaded = Told(), load_run(run.folder, device="cpu", plugins=plugins())
    assert report(loaded, load_plugins(), display) is None
    assert display.lines == [
        "warning: the run is complete, but its report could not be written: ZeroDivisionError: plan"
    ]


def test_old_pictures_go_when_new_ones_come(run: Run) -> None:
    (run.folder / "pictures" / "drawn-77-old.png").write_bytes(b"")
    (run.folder / "pictures" / "show").mkdir(exist_ok=True)
    (run.folder / "pictures" / "show" / "mine.png").write_bytes(b"")
    report(load_run(run.folder, device="cpu", plugins=plugins()), load_plugins(), Told())
    names = sorted(path.name for path in (run.folder / "pictures").rglob("*.png"))
    assert [name[:8] for name in names] == [*(f"drawn-{number:02d}" for number in range(1, 9)), "mine.png"]


def test_a_running_mean_leaves_out_what_is_not_finite() -> None:
    rng = np.random.default_rng()
    values = rng.normal(size=700)
    values[rng.integers(0, 700, 200)] = np.nan
    values[100:180] = np.nan
    half = 700 // 40
    windows = [values[max(0, at - half) : at + half + 1] for at in range(700)]
    expected = [np.nan if np.isnan(window).all() else np.nanmean(window) for window in windows]
    np.testing.assert_allclose(running_mean(values), expected, atol=1e-12)
    steps, few = thinned(np.arange(1, 6001), np.arange(6000.0))
    assert len(few) == 600 and few.mean() == pytest.approx(2999.5) and steps.mean() == pytest.approx(3000.5)


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [([1.0, 2.0, 40.0], True), ([1.0, 29.0], False), ([-1.0, 3.0], False), ([0.0, 0.0], False), ([], False),
     ([1e-9, 1e3], True), ([7.0], False), ([1.0, 1.0 + 1e-9], False)],
)  # fmt: skip
def test_an_axis_places_its_values_inside_and_marks_round_numbers(values: list[float], logarithmic: bool) -> None:
    axis = Axis(np.array(values), 200.0, 20.0)
    places = axis.place(np.array(values))
    assert axis.logarithmic == logarithmic and ((places >= 20) & (places <= 200)).all()
    ticks = list(axis.ticks())
    assert 1 < len(ticks) < 12
    for place, label in ticks:
        assert 20 - 1e-6 <= place <= 200 + 1e-6
        assert (
            axis.place(np.array([float(label)]))[0] == pytest.approx(place, abs=0.2)
            or abs(max(values) - min(values)) < 1e-6
        )


def test_a_curve_is_interrupted_where_it_is_not_finite() -> None:
    steps, values = np.arange(1.0, 6), np.array([1.0, 2.0, np.nan, 3.0, 4.0])
    figure = drawing("x", [("name", [(steps, values)], "red")], {"only": 0}, 5)
    path = re.findall(r'<path d="([^"]*)"', figure)[0]
    assert path.count("M") == 2 and path.count("L") == 2 and figure.count("<circle") == 4
    assert drawing("x", [("", [(steps, values * np.nan)], "red")], {"only": 0}, 5).count("<path") == 0
