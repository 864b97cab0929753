"""Tokenizers: trained deterministically, lossless, and given the image token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from foveate.data.tokenizer import load_tokenizer, train_tokenizer, with_image_token
from foveate.errors import ModelError

TEXTS = [f"There are {number} red digits in row {number % 7}, and a {number % 10} at b2." for number in range(60)]


def test_the_same_texts_give_the_same_tokenizer() -> None:
    first, second = (train_tokenizer(iter(TEXTS), 300) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str() and len(first) == 300


@settings(max_examples=80, deadline=None)
@given(text=st.text())
def test_any_text_survives(text: str, chatml_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = chatml_tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert chatml_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_trained_tokenizer_is_complete_and_comes_back(tmp_path: Path, chatml_tokenizer: Any) -> None:
    chatml_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert not loaded.added and loaded.image_token_id == chatml_tokenizer.convert_tokens_to_ids("<image>") == 3
    assert loaded.rows == len(chatml_tokenizer)
    assert loaded.tokenizer.chat_template == chatml_tokenizer.chat_template
    assert (loaded.tokenizer.pad_token, loaded.tokenizer.eos_token) == ("<pad>", "<|im_end|>")
    text = "<|im_start|>user\nA red 7 at a1, <image>!<|im_end|>"
    assert loaded.tokenizer.encode(text) == chatml_tokenizer.encode(text)


def test_the_image_token_is_added_once(tmp_path: Path, chatml_tokenizer: Any) -> None:
    backend = chatml_tokenizer.backend_tokenizer.to_str().replace('"<image>"', '"<picture>"')
    (tmp_path / "tokenizer.json").write_text(backend, encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    loaded = load_tokenizer(tmp_path)
    assert loaded.added and loaded.image_token_id == len(chatml_tokenizer) and loaded.rows == len(chatml_tokenizer) + 1
    assert loaded.tokenizer.encode("a<image>b").count(loaded.image_token_id) == 1
    assert not with_image_token(loaded.tokenizer).added


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="at least 260 tokens"):
        train_tokenizer(TEXTS, 100)
    with pytest.raises(ModelError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)
