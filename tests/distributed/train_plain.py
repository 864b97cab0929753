"""As `train_all`, without reports, which take as long as ten steps: `-m tests.distributed.train_plain RECIPE…`."""

import sys
from pathlib import Path
from unittest.mock import patch

from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.training import train


def train_plain(path: Path) -> None:
    """Trains a recipe and saves the model; nothing is drawn."""
    with patch.object(sys.modules[train.__module__], "report_run"):
        train(load_recipe(path), display=Display(quiet=True))


if __name__ == "__main__":
    for path in sys.argv[1:]:
        train_plain(Path(path))
