"""`foveate show`: which pictures, where they go, and what is refused before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import foveate.cli
import foveate.loaded
from foveate.errors import RunError
from foveate.gallery import save_pictures
from foveate.objective import Picture
from foveate.run import Run
from foveate.show_cli import spread
from tests.showing import finished_run, plugins


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shared_corpus: Path) -> Run:
    objectives = {"drawn": {}, "mask": {"type": "drawn_mask"}, "noisy": {}}
    return finished_run(tmp_path_factory.mktemp("run"), shared_corpus, objectives, [{"max_steps": 1}])


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `foveate show` here, on the CPU, with the objectives of these tests installed."""
    monkeypatch.setattr(foveate.loaded, "installed_plugins", plugins)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available=False: None)

    def show(*words: object) -> tuple[int, list[str], str]:
        with pytest.raises(SystemExit) as leaving:
            foveate.cli.main(["show", *map(str, words)])
        captured = capsys.readouterr()
        assert isinstance(leaving.value.code, int)
        return leaving.value.code, captured.out.splitlines(), captured.err

    return show


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    rng, paths = np.random.default_rng(), [tmp_path / "A.png", tmp_path / "B b.png"]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(path)
    return paths


def test_pictures_of_images_are_png_files_with_telling_names(command: Any, run: Run, images: list[Path]) -> None:
    status, lines, told = command(run.folder, "--images", *images)
    folder = run.folder / "pictures" / "show"
    names = ["drawn-01-error-of-A.png.png", "drawn-02-error-of-B-b.png.png", "mask-01-edited.png", "mask-02-edited.png"]
    assert status == 0, told
    assert lines == [str(folder / name) for name in names]
    assert f"4 pictures in {folder}" in told and "noisy: has no `visualize`" in told
    assert all(Image.open(line).size == (4, 4) for line in lines)


def test_options_choose_objectives_seed_and_folder(command: Any, run: Run, images: list[Path], tmp_path: Path) -> None:
    def drawn(out: str, *more: object) -> np.ndarray:
        status, lines, told = command(
            run.folder, f"--images={images[0]}", "--objectives", "drawn", "--out", tmp_path / out, *more
        )
        assert status == 0, told
        assert [Path(line).parent for line in lines] == [tmp_path / out]
        return np.asarray(Image.open(lines[0]))

    first = drawn("a")
    assert np.array_equal(first, drawn("b", "--seed", 0)), "the recipe's seed is 0"
    assert not np.array_equal(first, drawn("c", "--seed", 7))


def test_the_runs_own_data(command: Any, run: Run, tmp_path: Path) -> None:
    status, lines, told = command(run.folder, "--data", "--count", 3, "--objectives", "mask,drawn", "--out", tmp_path)
    assert status == 0 and len(lines) == 6, told
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(Path(line).name for line in lines)
    status, lines, _ = command(run.folder, "--data", "--objectives", "drawn", "--out", tmp_path)
    assert status == 0 and len(lines) == 8


def test_what_is_wrong_is_told_before_the_model_is_loaded(
    command: Any, run: Run, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: Any) -> Any:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(foveate.loaded, "load_run", loads)
    (tmp_path / "text.png").write_text("no picture")
    wrong = {
        (run.folder,): "say which pictures",
        (run.folder, "--data", "--images", images[0]): "say which pictures",
        (run.folder, "--images", images[0], "--count", 3): "--count says how many pictures of --data",
        (run.folder, "--images", images[0], tmp_path / "gone.png", "x.png"): "gone.png, x.png",
        (run.folder, "--images", tmp_path / "text.png"): "text.png cannot be read",
        (run.folder, "--data", "--objectives", "drwn"): "no objective 'drwn'; did you mean 'drawn'?",
        (tmp_path, "--data"): "is not a run",
        ("--images", images[0], run.folder): "Missing argument 'RUN'",
    }
    for words, message in wrong.items():
        status, _, told = command(*words)
        assert status == 2 and message in " ".join(told.split()), (words, told)


def test_a_run_without_objectives_has_nothing_to_show(
    command: Any, tmp_path: Path, shared_corpus: Path, images: list[Path]
) -> None:
    bare = finished_run(tmp_path, shared_corpus, {}, [{"max_steps": 1}])
    status, _, told = command(bare.folder, "--images", images[0])
    assert status == 2 and "has no objectives, so there is nothing to show" in told
    assert not (bare.folder / "pictures").exists()


def test_where_nothing_is_drawn_the_command_fails(command: Any, run: Run, images: list[Path], tmp_path: Path) -> None:
    status, lines, told = command(run.folder, "--images", images[0], "--objectives", "noisy", "--out", tmp_path / "out")
    assert status == 2 and not lines and "noisy: has no `visualize`" in told and "nothing was drawn" in told


def test_file_names_are_safe_whatever_the_title(tmp_path: Path) -> None:
    titles = ["../../etc/passwd", "a\0b\n", "<script>", "", "ü" * 300, "same", "same"]
    image = Image.new("F", (2, 2), 3.0)  # a mode that PNG lacks
    paths = save_pictures({"x": [Picture(title, image) for title in titles]}, tmp_path / "out")
    assert len(set(paths)) == len(titles) == len(list((tmp_path / "out").iterdir()))
    assert all(path.parent == tmp_path / "out" and len(path.name.encode()) < 100 for path in paths)
    assert all(Image.open(path).size == (2, 2) for path in paths)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file cannot be written"):
        save_pictures({"x": [Picture("t", image)]}, tmp_path / "file")


def test_images_takes_all_words_up_to_the_next_option() -> None:
    words = ["run", "--images", "a", "b", "--out", "d", "e", "--images=f", "g", "--data", "h"]
    expected = [
        "run",
        "--images",
        "a",
        "--images",
        "b",
        "--out",
        "d",
        "e",
        "--images=f",
        "--images",
        "g",
        "--data",
        "h",
    ]
    assert spread(words, "--images") == expected
