"""`foveate show RUN`: pictures of what a run's objectives have learned, of any images or of the run's own data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from foveate.errors import RunError, UserError

_COUNT = 8


class ManyImages(TyperCommand):
    """Lets `--images` take all words up to the next option: `--images A.png B.png`."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        return super().parse_args(ctx, spread(args, "--images"))


def spread(words: Sequence[str], option: str) -> list[str]:
    """The words, with `option` before each of its values: `--images A B` is `--images A --images B`."""
    found, inside, first = list[str](), False, False
    for word in words:
        if word.startswith("-"):
            inside, first = word.partition("=")[0] == option, word == option
        elif inside and not first:
            found.append(option)
        else:
            first = False
        found.append(word)
    return found


def show(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", metavar="RUN", show_default=False)],
    images: Annotated[
        list[Path] | None, typer.Option("--images", metavar="IMAGE...", help="Pictures to look at, one or more.")
    ] = None,
    data: Annotated[
        bool, typer.Option("--data", help="Instead: pictures of the run's held-out data, else of its training data.")
    ] = False,
    count: Annotated[int | None, typer.Option(min=1, help="How many pictures of --data.", show_default="8")] = None,
    objectives: Annotated[
        str | None, typer.Option(metavar="A,B", help="Names of objectives.", show_default="all")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where PNG files go.", show_default="RUN/pictures/show")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the noise.", show_default="the recipe's")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Overrides how an objective draws. Repeatable."),
    ] = None,
) -> None:
    """Draw what a run's objectives make of pictures, and write it as PNG files."""
    if bool(images) == data:
        raise UserError("say which pictures: --images A.png B.png, or --data for some of the run's own.")
    if count is not None and not data:
        raise UserError("--count says how many pictures of --data; without it, all of --images are drawn.")
    if other := [change for change in changes or () if not change.startswith("objectives.")]:
        raise UserError(f"--set {other[0]}: only options of objectives change pictures: objectives.NAME.OPTION=VALUE.")
    names = None if objectives is None else [name for name in objectives.split(",") if name]
    _check(run, images or (), names)
    from foveate.gallery import draws, save_pictures
    from foveate.loaded import load_run
    from foveate.progress import Display

    loaded, display = load_run(run, changes=changes or ()), Display()
    if data:
        pictures = loaded.show_data(count or _COUNT, names, seed=seed)
    else:
        pictures = loaded.show(images or (), names, seed=seed)
    folder = out or run / "pictures" / "show"
    paths = save_pictures(pictures, folder)
    for path in paths:
        typer.echo(path)
    for name in (name for name, drawn in pictures.items() if not drawn):
        able = draws(loaded.learner.rules[name].cls)
        display.say(f"{name}: " + ("no picture is for it, or it drew none" if able else "has no `visualize`"))
    if not paths:
        raise RunError("nothing was drawn.")
    display.say(f"{len(paths)} pictures in {folder}")


def _check(run: Path, images: Sequence[Path], names: Sequence[str] | None) -> None:
    """What can be wrong with the words of the command, found before the model is loaded."""
    from foveate.data.images import open_image
    from foveate.explain import did_you_mean
    from foveate.loaded import check_run
    from foveate.run import Run
    from foveate.types import ImageRef

    check_run(run.resolve())
    known = list(Run(run).recipe()["objectives"])
    if not known:
        raise RunError(f"{run}: its recipe has no objectives, so there is nothing to show.")
    for name in names or ():
        if name not in known:
            raise UserError(f"{run} has no objective '{name}'{did_you_mean(name, known)}")
    missing = [str(image) for image in images if not image.is_file()]
    if missing:
        raise UserError(f"no such picture: {', '.join(missing)}")
    for image in images:
        open_image(ImageRef(image), "--images")
