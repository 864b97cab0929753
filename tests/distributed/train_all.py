"""Trains recipes one after the other in the same processes: `torchrun … -m tests.distributed.train_all RECIPE…`."""

import sys
from pathlib import Path

from foveate.progress import Display
from foveate.recipe_file import load_recipe
from foveate.training import train

if __name__ == "__main__":
    for path in sys.argv[1:]:
        train(load_recipe(Path(path)), display=Display(quiet=True))
