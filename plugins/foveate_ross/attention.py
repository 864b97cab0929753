"""How much a model looks at its images: the attention of a prompt's last token over all visual tokens.

Table 1 of arXiv 2410.09575. The paper does not tell what it averages over; here a question's number is the mean over
the heads of all layers and over all visual tokens of the prompt, as the model is about to say the first word.

Shapes: T tokens of a prompt, V of them visual, H heads of a layer, D width of the LLM.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from foveate import LMM, Batch, Conversation, LoadedRun
from foveate.data.dataset import SampleError
from foveate.data.images import open_image
from foveate.data.packing import pack
from foveate.data.sample import build_prompt, defects, load_pixels
from foveate.errors import DataError, ModelError
from foveate.model.language import TransformersLLM
from foveate.types import IMAGE_PLACEHOLDER

QUANTILES = {"p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}
"""Those of the paper's table."""

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
"""Of logits, relative to the largest one; 5e-2 in 16 bits. The softmax of eager attention is never above float32."""


class Rows(Protocol):
    """A data set, or several joined."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Conversation: ...


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a question, and a digest of what its pictures show."""

    conversation: Conversation
    look: str

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two questions that are the same."""
        return self.conversation.id, self.conversation.turns, self.look


def read_questions(rows: Rows, limit: int | None = None) -> tuple[list[Question], int]:
    """The first `limit` questions that show a picture, each with the turns before it; and how many show none.

    Every answer of a conversation is that of one question. Pictures are opened. Raises `DataError` for a row that is
    defective, and where nothing is asked about a picture.
    """
    found, blind = list[Question](), 0
    for index in range(len(rows)):
        try:
            conversation = rows[index]
            for defect in defects(conversation):
                raise defect
            for asked in _asked(conversation):
                if limit is not None and len(found) == limit:
                    return found, blind
                if asked.images:
                    found.append(Question(asked, _look(asked)))
                else:
                    blind += 1
        except SampleError as error:
            raise DataError(f"nothing was asked, because a sample is defective: {error}") from None
    if not found:
        raise DataError("the data ask nothing about a picture: no row has one, a question, and its answer.")
    return found, blind


def _asked(conversation: Conversation) -> Iterator[Conversation]:
    turns = conversation.turns
    shown = [ref for ref in conversation.images if ref.role == "input"]
    answers = [at for at, turn in enumerate(turns) if turn.role == "assistant" and at > 0]
    for number, at in enumerate(answers):
        images = shown[: sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns[:at])]
        name = f"{conversation.id}#{number + 1}" if number else conversation.id
        yield Conversation(name, turns[:at], tuple(images), conversation.meta)


def _look(conversation: Conversation) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for ref in conversation.images:
        picture = open_image(ref, f"sample '{conversation.id}'")
        digest.update(f"{picture.size}".encode())
        digest.update(picture.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Looks:
    """What a model looks at, question by question: `means` `[n]`, of a visual token; `shares` `[n]`, of all of them."""

    means: NDArray[np.float64]
    shares: NDArray[np.float64]

    def summary(self) -> dict[str, float]:
        """Mean and quantiles of the questions' means, and `share`: the mean attention on images."""
        quantiles = {name: float(np.quantile(self.means, level)) for name, level in QUANTILES.items()}
        return {"mean": float(self.means.mean()), **quantiles, "share": float(self.shares.mean())}


def look(
    run: LoadedRun, questions: Sequence[Question], template: str | None = None, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", done: Callable[[int], object] = lambda number: None,
) -> Looks:  # fmt: skip
    """Asks a run each question, as inference does: without its objectives. Casts and moves its model.

    `template`: another than that of the last stage. `done` hears how many are asked. Raises `ModelError` where the LLM
    does not tell its attention, or computes something else when it does; `DataError` where a template cannot say a
    question.
    """
    rules = run.data.rules(run.recipe.stages[-1], template, objectives=False)
    for tensor in run.lmm.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():  # rotary frequencies are no part of the state: they stay precise
            tensor.data = tensor.data.to(dtype)
    lmm = run.lmm.eval().to(device)
    means, shares = list[float](), list[float]()
    for number, question in enumerate(questions):
        batch = pack([load_pixels(build_prompt(question.conversation, rules), rules)]).to(device)
        row_T, logits_V = last_row(lmm, batch)
        if number == 0:
            _check(lmm, batch, logits_V)
        seen = row_T[batch.visual_positions]
        means.append(float(seen.mean()))
        shares.append(float(seen.sum()))
        done(number + 1)
    return Looks(np.array(means), np.array(shares))


@torch.inference_mode()
def last_row(lmm: LMM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of one packed sample: the attention of its last token, `[T]` float64, a mean over heads and layers; its logits.

    Transformers' eager attention computes it. All tokens but the last go first and leave their keys in a cache, so that
    no matrix of all tokens is kept. Raises `ModelError` where the LLM does not tell its attention.
    """
    llm = lmm.llm
    if not isinstance(llm, TransformersLLM):
        raise ModelError(f"{type(llm).__name__} is no LLM of transformers: nothing tells the weights of its attention.")
    embeds, positions = lmm.place(batch, lmm.see(batch.pixels).tokens)[None], batch.position_ids[None]
    total = embeds.shape[1]
    with eager_attention(llm):
        begun = llm.body(inputs_embeds=embeds[:, :-1], position_ids=positions[:, :-1], use_cache=True)
        ended = llm.body(
            inputs_embeds=embeds[:, -1:], position_ids=positions[:, -1:], past_key_values=begun.past_key_values,
            use_cache=True, output_attentions=True,
        )  # fmt: skip
    layers = [layer for layer in getattr(ended, "attentions", None) or () if layer is not None]
    count = llm.model.config.get_text_config().num_hidden_layers
    if len(layers) != count or any(layer.ndim != 4 or layer.shape[-1] > total for layer in layers):
        name = type(llm.model).__name__
        raise ModelError(f"{name} tells its attention in {len(layers)} of its {count} layers: all are needed.")
    rows = [layer[0, :, -1].double().mean(0) for layer in layers]
    rows = [F.pad(row, (total - len(row), 0)) for row in rows]  # a sliding window keeps the last keys
    weight, bias = llm.head()
    logits = F.linear(ended.last_hidden_state[0, -1] * llm.logit_scale, weight, bias)
    return torch.stack(rows).mean(0), logits


@contextmanager
def eager_attention(llm: TransformersLLM) -> Iterator[None]:
    """Transformers' own attention, which tells its weights; that of packed rows comes back at the end."""
    packed = llm.model.config._attn_implementation
    try:
        llm.model.set_attn_implementation("eager")
    except ValueError as error:
        name = type(llm.model).__name__
        raise ModelError(f"{name} has no eager attention, so nothing tells its weights: {error}") from None
    try:
        yield
    finally:
        llm.model.set_attn_implementation(packed)


@torch.inference_mode()
def _check(lmm: LMM, batch: Batch, logits_V: Tensor) -> None:
    """Raises `ModelError` where eager attention leads to other logits than training's own."""
    own = lmm.logits(batch)[-1]
    gap = float((logits_V - own).abs().max() / own.abs().max().clamp_min(1e-30))
    if not gap <= _TOLERANCE.get(own.dtype, 5e-2):
        name = type(getattr(lmm.llm, "model", lmm.llm)).__name__
        raise ModelError(f"the eager attention of {name} computes something else than its training did (by {gap:.1e}).")


def compare(first: Looks, second: Looks) -> dict[str, dict[str, float | None]]:
    """Two-sided tests of the questions' means, which the tests take for independent: Welch's t and Mann-Whitney's U.

    None where a test says nothing, as where all numbers are the same.
    """
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        found = {
            "welch": stats.ttest_ind(first.means, second.means, equal_var=False),
            "mann_whitney": stats.mannwhitneyu(first.means, second.means, alternative="two-sided"),
        }
    return {
        name: {key: float(value) if np.isfinite(value) else None for key, value in
               (("statistic", test.statistic), ("p", test.pvalue))}
        for name, test in found.items()
    }  # fmt: skip


def plot(found: Mapping[str, Looks], path: Path) -> None:
    """Histograms of the questions' means over one another, the median of each as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    bins = np.histogram_bin_edges(np.concatenate([looks.means for looks in found.values()]) * 1e4, "auto")
    for (name, looks), colour in zip(found.items(), ("tab:gray", "tab:blue"), strict=True):
        axes.hist(looks.means * 1e4, bins=bins.tolist(), color=colour, alpha=0.5, label=name)
        axes.axvline(float(np.median(looks.means)) * 1e4, color=colour, linewidth=2)
    axes.set(xlabel="attention on a visual token (1e-4), lines: medians", ylabel="questions")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def same(first: Sequence[Question], second: Sequence[Question]) -> str | None:
    """None for the same questions, else where they begin to differ."""
    if len(first) != len(second):
        return f"there are {len(first)} and {len(second)}"
    differ = next((at for at, pair in enumerate(zip(first, second, strict=True)) if pair[0].key != pair[1].key), None)
    return None if differ is None else f"question {differ + 1} is '{first[differ].conversation.id}' of the first"
