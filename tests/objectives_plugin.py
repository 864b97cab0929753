"""The objectives of tests as a plugin that a command in another process finds by its entry point."""

from __future__ import annotations

import os
from pathlib import Path

from foveate import hookimpl
from foveate.hookspecs import Register

HOOK_API = 1


@hookimpl
def register_objectives(register: Register) -> None:
    for name, cls in (("noisy", "Noisy"), ("masked", "Masked"), ("queries", "Queries")):
        register(name, f"tests.objectives:{cls}")


def environment(folder: Path) -> dict[str, str]:
    """Variables of a process in which the plugin is installed; `folder` gets its metadata."""
    info = folder / "foveate_test_objectives-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foveate-test-objectives\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[foveate]\ntest_objectives = tests.objectives_plugin\n")
    paths = [str(folder), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
