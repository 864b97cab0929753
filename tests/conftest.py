"""Shared by all tests: few threads, and a corpus of real pictures made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.corpus import write_corpus

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that tests only read."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
