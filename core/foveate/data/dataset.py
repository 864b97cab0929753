"""Where conversations come from: the base of every data set, and the error that names a defective sample."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from typing import Literal

from foveate.errors import DataError
from foveate.options import Options as BaseOptions
from foveate.types import IMAGE_PLACEHOLDER, Conversation

DefectKind = Literal["row", "image", "placeholders", "answer", "unsupervised", "long"]
"""Malformed row · missing or corrupt picture · placeholders ≠ images · no answer · nothing to learn · over-long."""


class SampleError(DataError):
    """One sample is defective; `kind` says in which way, `where` names the sample."""

    def __init__(self, kind: DefectKind, where: str, problem: str):
        super().__init__(kind, where, problem)
        self.kind, self.where, self.problem = kind, where, problem

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


class ConversationDataset(ABC):
    """A map from an index to a `Conversation`. Subclasses declare `Options` and are registered by `register_datasets`.

    Items are light: pictures stay `ImageRef`s until they are needed. Instances go to loader workers: they must pickle.
    """

    class Options(BaseOptions):
        """What the recipe writes in a `data:` entry."""

    def __init__(self, options: Options):
        self.options = options

    @abstractmethod
    def __len__(self) -> int:
        """How many conversations there are."""

    @abstractmethod
    def __getitem__(self, index: int) -> Conversation:
        """The conversation at `index`, the same each time. Raises `SampleError` for a malformed row."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the content does; written into a run's manifest."""


def texts(dataset: ConversationDataset) -> Iterator[str]:
    """Every turn's text without its placeholders, prompts and answers alike: what a tokenizer is trained on.

    Malformed rows have none: who reads samples reports them, together with all other defects.
    """
    for index in range(len(dataset)):
        with suppress(SampleError):
            for turn in dataset[index].turns:
                yield turn.text.replace(IMAGE_PLACEHOLDER, "")
