"""The data set ``digits``: scenes of real scanned digits with dense captions, or with questions and answers."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from foveate import Conversation, ConversationDataset, ImageRef, Turn
from foveate_lab.questions import CLAUSES, HELD_OUT_KINDS, Clause, Kind, Question, ask, caption, chance
from foveate_lab.scenes import Scene, SceneOptions, Split, draw, make_scene, stream

_REDRAWS = 8


class DigitsDataset(ConversationDataset):
    """Scenes ``0 … size - 1`` of a split, one conversation each.

    ``captions``: the picture, then its dense caption. ``questions``: the picture with the first question, then as many
    turns as there are questions. ``meta`` holds the ``kinds`` that were asked; where there is one question, its
    ``kind``, ``answer`` (its last words, which were asked for) and ``chance`` (the accuracy of a uniform guess) too.
    """

    class Options(SceneOptions, ConversationDataset.Options):
        split: Split = Field("train", description="`train` or `test`: they share no scan.")
        task: Literal["captions", "questions"] = Field("captions", description="What is said about a scene.")
        size: int = Field(1000, ge=1, description="Number of scenes, and of samples.")
        seed: int = Field(0, ge=0, description="Other seeds give other scenes and questions.")
        clauses: tuple[Clause, ...] = Field(
            CLAUSES, min_length=1, description="What a caption tells, in a random order: the `digit` and the "
            "`colour` of every cell."
        )  # fmt: skip
        questions: int = Field(1, ge=1, description="Questions per scene, all in one conversation.")
        kinds: tuple[Kind, ...] = Field(
            HELD_OUT_KINDS, min_length=1, description="Kinds of questions, asked in turn over the data set; one that "
            "is named twice is asked twice as often. `where` is meant for training."
        )  # fmt: skip

    options: Options

    def __len__(self) -> int:
        return self.options.size

    def scene(self, index: int) -> Scene:
        """The ground truth behind the sample at `index`. Raises IndexError outside of the data set."""
        if not 0 <= index < self.options.size:
            raise IndexError(f"sample {index} of {self.options.size}")
        return make_scene(self.options, self.options.split, index, self.options.seed)

    def __getitem__(self, index: int) -> Conversation:
        options, scene = self.options, self.scene(index)
        rng = stream(options.task, options.split, index, options.seed)
        name = f"digits-{options.split}-{options.seed}-{options.task}-{index}"
        images = (ImageRef(partial(picture, scene)),)
        if options.task == "captions":
            turns = (Turn("user", "<image>"), Turn("assistant", caption(scene, rng, options.clauses)))
            return Conversation(name, turns, images)
        asked = self._questions(scene, index, rng)
        turns = tuple(
            turn
            for number, question in enumerate(asked)
            for turn in (
                Turn("user", question.text if number else f"<image>\n{question.text}"),
                Turn("assistant", question.answer),
            )
        )
        meta: dict[str, Any] = {"kinds": [question.kind for question in asked]}
        if len(asked) == 1:
            meta |= {"kind": asked[0].kind, "answer": asked[0].value, "chance": chance(asked[0].kind, options)}
        return Conversation(name, turns, images, meta)

    def fingerprint(self) -> str:
        """Of the options, and of what they give today: the first sample's text and pixels."""
        first = self[0]
        digest = hashlib.blake2b(self.options.model_dump_json().encode(), digest_size=12)
        digest.update("\n".join(turn.text for turn in first.turns).encode())
        digest.update(draw(self.scene(0)).tobytes())
        return digest.hexdigest()

    def _questions(self, scene: Scene, index: int, rng: np.random.Generator) -> list[Question]:
        """The kinds come in turn, so that each has its exact share, and in a random order within the conversation."""
        options = self.options
        first = index * options.questions
        kinds = [options.kinds[number % len(options.kinds)] for number in range(first, first + options.questions)]
        asked: list[Question] = []
        for number in rng.permutation(len(kinds)).tolist():
            question = ask(scene, kinds[number], rng)
            for _ in range(_REDRAWS):
                if question not in asked:
                    break
                question = ask(scene, kinds[number], rng)
            asked.append(question)
        return asked


def picture(scene: Scene) -> Image.Image:
    """The scene as an RGB picture."""
    return Image.fromarray(draw(scene))
