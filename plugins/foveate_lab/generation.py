"""Greedy answers of a run, computed by foveate's own modules, and of an export, computed by transformers alone.

Both pad a batch on the left, keep a cache, and stop at the same tokens. They share no code from the question to the
LLM's input: that they agree is a check of either.

Shapes: B questions, L tokens of the longest prompt, D width of the LLM, V visual tokens of the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, GenerationConfig, LlavaForConditionalGeneration
from transformers.utils import logging

from foveate import LMM, LoadedRun, Sample
from foveate.data.images import open_image
from foveate.data.sample import build_prompt, load_pixels
from foveate.data.templates import encode
from foveate.errors import DataError, ModelError
from foveate.export.chat import make_generation_config
from foveate.export.modeling_foveate_llava import FoveateLlavaConfig, FoveateLlavaForConditionalGeneration
from foveate.files import read_json
from foveate.model.attention import Segments
from foveate.model.language import TransformersLLM
from foveate.text_loss import greedy_tokens
from foveate.types import IMAGE_PLACEHOLDER
from foveate_lab.queries import Query

_EXPORTS = {"llava": LlavaForConditionalGeneration, "foveate_llava": FoveateLlavaForConditionalGeneration}
"""`model_type` of an exported folder → the class that opens it."""


@dataclass(frozen=True)
class Reply:
    """The answer to a question, its tokens without the one that ends it, and whether it did end."""

    text: str
    tokens: tuple[int, ...]
    ended: bool


class Answerer(ABC):
    """A model that answers questions, on `device`."""

    kind: str
    device: torch.device
    tokenizer: Any
    ends: Collection[int]
    """Tokens that end an answer."""

    @abstractmethod
    def prompt(self, query: Query) -> str:
        """What the model reads, control tokens included; an image is one placeholder. Raises `DataError` where the
        model's template cannot say the question."""

    @abstractmethod
    def answer(self, queries: Sequence[Query], longest: int) -> list[Reply]:
        """Greedy answers of at most `longest` tokens, all questions as one batch."""

    def misreads(self, query: Query) -> bool:
        """Whether control tokens that stand in the question's text are read as such, which training did not do."""
        return False

    def reply(self, tokens: Sequence[int]) -> Reply:
        """What was generated, up to the first token that ends it."""
        end = next((at for at, token in enumerate(tokens) if token in self.ends), None)
        said = tuple(tokens[:end])
        text: str = self.tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Reply(text.strip(), said, end is not None)

    def settings(self, longest: int) -> GenerationConfig:
        """How transformers generates: nothing is left to what a model folder may wish for."""
        ends = list(self.ends)
        pad = self.tokenizer.pad_token_id
        return GenerationConfig(
            max_new_tokens=longest, do_sample=False, num_beams=1, repetition_penalty=1.0, use_cache=True,
            eos_token_id=ends, pad_token_id=ends[0] if pad is None else pad,
        )  # fmt: skip


class RunAnswerer(Answerer):
    """The model of a run. Prompts and pixels are those of training; the LLM generates from embeddings."""

    kind = "run"

    def __init__(
        self, loaded: LoadedRun, template: str | None = None, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        """Casts and moves the model of `loaded`. `template`: another than that of the last stage."""
        self.rules = loaded.data.rules(loaded.recipe.stages[-1], template, objectives=False)
        self.tokenizer, self.device = self.rules.tokenizer, torch.device(device)
        ends: Any = make_generation_config(self.rules, self.tokenizer).eos_token_id
        self.ends = tuple(ends)
        for tensor in loaded.lmm.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():  # rotary frequencies are no part of the state: they stay precise
                tensor.data = tensor.data.to(dtype)
        self.lmm: LMM = loaded.lmm.eval().to(self.device)

    def prompt(self, query: Query) -> str:
        build_prompt(query.conversation, self.rules)
        ids, _ = encode(self.rules.template, self.tokenizer, query.conversation.turns, ask=True)
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    @torch.inference_mode()
    def answer(self, queries: Sequence[Query], longest: int) -> list[Reply]:
        samples = [load_pixels(build_prompt(query.conversation, self.rules), self.rules) for query in queries]
        embeds, mask = self.read(samples)
        if not isinstance(self.lmm.llm, TransformersLLM):
            return [self.reply(tokens) for tokens in packed_answers(self.lmm, embeds, mask, self.ends, longest)]
        with _padded_attention(self.lmm.llm.model):
            tokens_BN = self.lmm.llm.model.generate(
                inputs_embeds=embeds, attention_mask=mask, generation_config=self.settings(longest)
            )
        return [self.reply(tokens) for tokens in tokens_BN.tolist()]

    def read(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """The LLM's input `[B, L, D]`, padded on the left, and `[B, L]` int64, 1 where there is a token."""
        lengths = [sample.length for sample in samples]
        ids_BL = torch.full((len(samples), max(lengths)), next(iter(self.ends)))
        mask_BL = torch.zeros_like(ids_BL)
        for row, sample in enumerate(samples):
            ids_BL[row, ids_BL.shape[1] - sample.length :] = sample.input_ids
            mask_BL[row, ids_BL.shape[1] - sample.length :] = 1
        visual_BL = (ids_BL == self.rules.image_token_id) & mask_BL.bool()
        ids_BL, mask_BL, visual_BL = (tensor.to(self.device) for tensor in (ids_BL, mask_BL, visual_BL))
        embeds_BLD = self.lmm.llm.embed(ids_BL.flatten()).unflatten(0, ids_BL.shape)
        pixels = [picture for sample in samples for picture in sample.pixels]
        if pixels:
            tokens_VD = self.lmm.see(torch.stack(pixels).to(self.device)).tokens
            embeds_BLD[visual_BL] = tokens_VD.to(embeds_BLD.dtype)
        return embeds_BLD, mask_BL


def packed_answers(lmm: LMM, embeds: Tensor, mask: Tensor, ends: Collection[int], longest: int) -> list[list[int]]:
    """Greedy tokens by training's own forward: prompts end to end in one row, read anew for every token.

    For LLMs that are not transformers', which have no cache. `embeds` `[B, L, D]` and `mask` `[B, L]` are those of
    `RunAnswerer.read`; an answer has its end in it.
    """
    weight, bias = lmm.llm.head()
    rows = [row[shown.bool()] for row, shown in zip(embeds, mask, strict=True)]
    answers, going = [list[int]() for _ in rows], list(range(len(rows)))
    for _ in range(longest):
        lengths = [len(rows[number]) for number in going]
        positions = torch.cat([torch.arange(length, device=embeds.device) for length in lengths])
        states_TD = lmm.llm(
            torch.cat([rows[number] for number in going]), positions, Segments.of(tuple(lengths), embeds.device)
        )
        last = torch.tensor(lengths, device=embeds.device).cumsum(0) - 1
        tokens = greedy_tokens(states_TD[last] * lmm.llm.logit_scale, weight, bias)
        for number, token, grown in zip(going, tokens.tolist(), lmm.llm.embed(tokens), strict=True):
            answers[number].append(token)
            rows[number] = torch.cat([rows[number], grown[None]])
        going = [number for number in going if answers[number][-1] not in ends]
        if not going:
            break
    return answers


@contextmanager
def _padded_attention(model: Any) -> Iterator[None]:
    """Attention for padded batches with a cache; that of packed rows comes back at the end."""
    packed = model.config._attn_implementation
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:  # a model that knows only its own
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(packed)


class ExportAnswerer(Answerer):
    """An exported folder: transformers' model class and the folder's processor do everything."""

    kind = "export"

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        """Raises `ModelError` where transformers cannot open the folder, or weights are missing or left over."""
        self.device, self._dtype = torch.device(device), dtype
        model_class: Any = _EXPORTS[read_json(folder / "config.json")["model_type"]]
        # the code that a folder brings is foveate's own: no need to run what lies there
        AutoConfig.register(FoveateLlavaConfig.model_type, FoveateLlavaConfig, exist_ok=True)
        logging.disable_progress_bar()
        try:
            self.model, report = model_class.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True
            )
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # of a broken folder, anything
            raise ModelError(f"transformers cannot open {folder}: {error}") from error
        finally:
            logging.enable_progress_bar()
        if wrong := {kind: sorted(names)[:4] for kind, names in report.items() if names}:
            raise ModelError(f"{folder} does not hold the weights of its model: {wrong}")
        if not self.processor.chat_template:
            raise ModelError(f"{folder} has no chat template, so nothing says how it is asked")
        self.model.eval().to(self.device)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self.ends = tuple(ends) if isinstance(ends, list) else (ends,)
        probe = self._render([{"role": "user", "content": f"{IMAGE_PLACEHOLDER}\na"}])
        self._reads_text = IMAGE_PLACEHOLDER in probe  # foveate's templates do; those of others want lists of items

    def prompt(self, query: Query) -> str:
        turns = query.conversation.turns
        messages = [{"role": turn.role, "content": self._content(turn.text)} for turn in turns]
        try:
            text = self._render(messages)
        except Exception as error:  # Jinja's, and what templates raise
            raise DataError(f"sample '{query.id}': the chat template refuses it: {error}") from None
        if text.count(IMAGE_PLACEHOLDER) != len(query.conversation.images):
            found, images = text.count(IMAGE_PLACEHOLDER), len(query.conversation.images)
            raise DataError(f"sample '{query.id}': the chat template makes {found} placeholders of {images} images")
        if not text:
            raise DataError(f"sample '{query.id}': the chat template makes an empty prompt of it")
        return text

    def misreads(self, query: Query) -> bool:
        control = set(self.tokenizer.all_special_tokens) - {IMAGE_PLACEHOLDER}
        return any(token in turn.text for turn in query.conversation.turns for token in control)

    @torch.inference_mode()
    def answer(self, queries: Sequence[Query], longest: int) -> list[Reply]:
        pictures = [open_image(ref, f"sample '{query.id}'") for query in queries for ref in query.conversation.images]
        texts = [self.prompt(query) for query in queries]
        inputs = self.processor(images=pictures or None, text=texts, padding=True, return_tensors="pt")
        inputs = inputs.to(self.device, dtype=self._dtype)
        whole_BL = self.model.generate(**inputs, generation_config=self.settings(longest))
        return [self.reply(tokens) for tokens in whole_BL[:, inputs["input_ids"].shape[1] :].tolist()]

    def _render(self, messages: list[dict[str, Any]]) -> str:
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text

    def _content(self, text: str) -> Any:
        if self._reads_text:
            return text
        first, *rest = text.split(IMAGE_PLACEHOLDER)
        items: list[dict[str, str]] = [{"type": "text", "text": first}] if first else []
        for part in rest:
            items += [{"type": "image"}, *([{"type": "text", "text": part.lstrip("\n")}] if part.strip() else [])]
        return items


def export_type(folder: Path) -> str | None:
    """The kind of model that an exported folder holds, None where it is none that can be evaluated."""
    if not (folder / "config.json").is_file():
        return None
    found = read_json(folder / "config.json")
    name = found.get("model_type") if isinstance(found, dict) else None
    return name if name in _EXPORTS else None
