"""Shared by all tests: few threads, and a corpus of real pictures made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import foveate.cli
from tests.corpus import write_corpus

torch.set_num_threads(1)

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def foveate_command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process; returns exit status, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            foveate.cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        assert isinstance(leaving.value.code, int)
        return leaving.value.code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def shared_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that tests only read."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
