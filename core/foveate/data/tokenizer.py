"""Tokenizers: trained on the run's own text, or loaded and given the image token."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from foveate.data.templates import template_source
from foveate.errors import ModelError
from foveate.types import IMAGE_PLACEHOLDER


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer with the image token; `added` when it lacked it; an embedding of fewer than `rows` must grow."""

    tokenizer: Any
    image_token_id: int
    added: bool
    rows: int


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens with the `chatml` template; the same texts give the same one.

    Any text survives a round trip. No BOS; `<|im_end|>` is EOS. Raises `ModelError` when `vocab_size` is too small.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ("<pad>", "<|im_start|>", "<|im_end|>", IMAGE_PLACEHOLDER)
    special = [AddedToken(name, normalized=False, special=True) for name in names]
    if vocab_size < (least := len(alphabet) + len(special)):
        raise ModelError(f"a byte-level vocabulary needs at least {least} tokens, got vocab_size {vocab_size}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    options: dict[str, Any] = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    lines = (piece for text in texts for piece in _with_words_cut(text))
    backend.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>")
    tokenizer.chat_template = template_source("chatml")
    return tokenizer


_ENDLESS = re.compile(r"(\w{300,}|\W{300,})")


def _with_words_cut(text: str) -> Iterator[str]:
    """The text, runs without an end of a word in pieces: the trainer takes the square of a word's length in time."""
    for number, part in enumerate(_ENDLESS.split(text)):
        yield from (part[at : at + 300] for at in range(0, len(part), 300)) if number % 2 else (part,)


def load_tokenizer(source: str | Path, revision: str | None = None) -> LoadedTokenizer:
    """The tokenizer of a folder or hub id, with the image token. Raises `ModelError` when it cannot be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision, trust_remote_code=False)
    except Exception as error:  # of a broken file, anything
        raise ModelError(f"no tokenizer could be loaded from {source}: {error}") from error
    return with_image_token(tokenizer)


def with_image_token(tokenizer: Any) -> LoadedTokenizer:
    """`tokenizer` itself, the image token added to it, or made special, where it is not."""
    known = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    token = AddedToken(IMAGE_PLACEHOLDER, normalized=False, special=True)
    added = IMAGE_PLACEHOLDER not in known and bool(tokenizer.add_tokens([token], special_tokens=True))
    vocabulary = tokenizer.get_vocab()
    return LoadedTokenizer(tokenizer, vocabulary[IMAGE_PLACEHOLDER], added, max(vocabulary.values()) + 1)
