"""`python -m foveate`, which is what `accelerate launch -m foveate` runs."""

from foveate.cli import main

main()
