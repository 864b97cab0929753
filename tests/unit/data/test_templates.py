"""Templates: masks against strings written by hand and against transformers, and text that cannot take control."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from foveate.data.templates import SHIPPED, encode, load_template, template_source
from foveate.data.tokenizer import train_tokenizer
from foveate.errors import DataError
from foveate.types import Turn

TALK = (
    Turn("user", "<image>\nWhat is it?"),
    Turn("assistant", "A dahlia."),
    Turn("user", "Sure?"),
    Turn("assistant", "Yes"),
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def marked(tokenizer: Any, ids: list[int], supervised: list[bool]) -> str:
    """The text with its supervised tokens in ⟦brackets⟧."""
    pieces = []
    for learned, group in itertools.groupby(zip(ids, supervised, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        pieces.append(f"⟦{text}⟧" if learned else text)
    return "".join(pieces)


CHATML = (
    "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n⟦A dahlia.<|im_end|>⟧\n"
    "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦Yes<|im_end|>⟧\n"
)
EXPECTED = {
    "plain": "<image>⟦A dahlia.<|im_end|>Yes<|im_end|>⟧",
    "chatml": CHATML,
    "qwen2": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + CHATML,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_masks_on_a_byte_level_tokenizer(name: str, chatml_tokenizer: Any) -> None:
    template = load_template(name, chatml_tokenizer)
    assert marked(chatml_tokenizer, *encode(template, chatml_tokenizer, TALK)) == EXPECTED[name]


def supervised_words(tokenizer: Any, name: str, turns: tuple[Turn, ...] = TALK) -> tuple[str, list[str]]:
    """The whole text as pieces, and the pieces of each supervised run."""
    ids, learned = encode(load_template(name, tokenizer), tokenizer, turns)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    runs = [
        [piece for piece, _ in group]
        for is_learned, group in itertools.groupby(zip(pieces, learned, strict=True), key=lambda pair: pair[1])
        if is_learned
    ]
    return "".join(pieces).replace("▁", " "), ["".join(run).replace("▁", " ") for run in runs]


def newlines(text: str) -> str:
    return text.replace("\n", "<0x0A>")


def test_vicuna_masks(llama_tokenizer: Any) -> None:
    text, runs = supervised_words(llama_tokenizer, "vicuna")
    assert text == "<s>" + newlines(
        VICUNA + "USER: <image>\nWhat is it? ASSISTANT: A dahlia.</s>USER: Sure? ASSISTANT: Yes</s>"
    )
    assert [run.strip() for run in runs] == ["A dahlia.</s>", "Yes</s>"]


def test_llama2_masks(llama_tokenizer: Any) -> None:
    text, runs = supervised_words(llama_tokenizer, "llama2", (Turn("system", "Be brief."), *TALK))
    assert text == newlines(
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat is it? [/INST] A dahlia. </s>"
        "<s>[INST] Sure? [/INST] Yes </s>"
    )
    assert [run.strip() for run in runs] == ["A dahlia. </s>", "Yes </s>"]


def test_llama3_masks(llama3_tokenizer: Any) -> None:
    text, runs = supervised_words(llama3_tokenizer, "llama3")
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    user, assistant = head.format("user"), head.format("assistant")
    assert text == "<s>" + newlines(
        f"{user}<image>\nWhat is it?<|eot_id|>{assistant}A dahlia.<|eot_id|>"
        f"{user}Sure?<|eot_id|>{assistant}Yes<|eot_id|>"
    )
    assert [run.strip() for run in runs] == ["A dahlia.<|eot_id|>", "Yes<|eot_id|>"]


def test_the_system_message_is_said_where_there_is_none(chatml_tokenizer: Any) -> None:
    template = load_template("qwen2", chatml_tokenizer, "Be brief.")
    own = (Turn("system", "Be long."), *TALK)
    for turns, said in ((TALK, "Be brief."), (own, "Be long.")):
        text = marked(chatml_tokenizer, *encode(template, chatml_tokenizer, turns))
        assert text == f"<|im_start|>system\n{said}<|im_end|>\n" + CHATML


PAIRS = {"chatml": "chatml_tokenizer", "qwen2": "chatml_tokenizer", "plain": "chatml_tokenizer",
         "vicuna": "llama_tokenizer", "llama2": "llama_tokenizer", "llama3": "llama3_tokenizer"}  # fmt: skip
WORDS = st.text(st.sampled_from(" \n.,abcXYZ019ßé日本🌼👩🏽‍🚀\u0301\t<|[]/"), min_size=1, max_size=30).filter(str.strip)
CONVERSATIONS = st.builds(
    lambda system, texts: ([Turn("system", system)] if system else [])
    + [Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)],
    st.none() | WORDS,
    st.lists(WORDS | WORDS.map(lambda text: f"{text}<image><image>{text}"), min_size=2, max_size=6),
)


@pytest.mark.parametrize(("name", "fixture"), PAIRS.items())
@settings(max_examples=60, deadline=None)
@given(turns=CONVERSATIONS)
def test_tokens_and_masks_equal_those_of_transformers(
    name: str, fixture: str, request: pytest.FixtureRequest, turns: list[Turn]
) -> None:
    tokenizer = request.getfixturevalue(fixture)
    ids, supervised = encode(load_template(name, tokenizer), tokenizer, turns)
    stock = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in turns], chat_template=template_source(name),
        return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    assert ids == stock["input_ids"]
    assert supervised == [bool(mask) for mask in stock["assistant_masks"]]


PIECES = st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "system", "\n", "<pad>", "<image>", "a ", "🌼", "<|im", "_end|>"]
)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.lists(PIECES, min_size=1, max_size=8).map("".join), min_size=2, max_size=4))
def test_data_cannot_inject_control_tokens_or_images(texts: list[str], chatml_tokenizer: Any) -> None:
    turns = [Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]
    ids, _ = encode(load_template("chatml", chatml_tokenizer), chatml_tokenizer, turns)
    counts = {token.content: ids.count(number) for number, token in chatml_tokenizer.added_tokens_decoder.items()}
    assert counts["<|im_start|>"] == counts["<|im_end|>"] == len(turns) and counts["<pad>"] == 0
    assert counts["<image>"] == sum(text.count("<image>") for text in texts)
    rendered = "".join(f"<|im_start|>{turn.role}\n{turn.text}<|im_end|>\n" for turn in turns)
    assert chatml_tokenizer.decode(ids, skip_special_tokens=False) == rendered


def test_the_guard_itself_cannot_be_smuggled_in(chatml_tokenizer: Any) -> None:
    turns = (Turn("user", "\ufdd1<|im_end|>\ufdd1"), Turn("assistant", "x"))
    ids, _ = encode(load_template("chatml", chatml_tokenizer), chatml_tokenizer, turns)
    assert ids.count(chatml_tokenizer.eos_token_id) == 2


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_templates_ask_for_an_answer_the_way_they_teach_it(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(PAIRS[name])
    options: dict[str, Any] = {"chat_template": template_source(name), "tokenize": False}
    turns = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "Hi"}], **options)
    assert whole.startswith(prompt)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "has none"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>", "no {% generation %} tags"),
        (
            "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>{% endfor %}",
            "its end would not be learned",
        ),
        ("{% if false %}{% generation %}x{% endgeneration %}{% endif %}<|im_end|>", "its end would not be learned"),
        ("{% generation %}{{ raise_exception('no users here') }}{% endgeneration %}", "no users here"),
    ],
)
def test_a_template_that_would_teach_nothing_is_refused(
    template: str | None, why: str, chatml_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chatml_tokenizer, "chat_template", template)
    with pytest.raises(DataError, match=r"template 'chat'") as caught:
        load_template("chat", chatml_tokenizer)
    assert why in str(caught.value)
    assert "no users" in why or "plain, chatml, qwen2, vicuna, llama2, llama3" in str(caught.value)


def test_templates_that_do_not_fit_the_tokenizer_are_refused(chatml_tokenizer: Any, llama_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="its end would not be learned"):
        load_template("chatml", llama_tokenizer)
    with pytest.raises(DataError, match="'qwen3' is not known"):
        load_template("qwen3", chatml_tokenizer)
    with pytest.raises(DataError, match="no place for a system message"):
        load_template("plain", chatml_tokenizer, "Be brief.")


def test_a_tokenizer_without_image_token_is_refused() -> None:
    bare = train_tokenizer(["text"], 300)
    backend = bare.backend_tokenizer.to_str().replace("<image>", "<other>")
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend), eos_token="<|im_end|>")
    with pytest.raises(DataError, match="needs a fast tokenizer with the token <image>"):
        load_template("chatml", bare)


def test_truncation_and_padding_of_a_tokenizer_file_are_forgotten() -> None:
    tokenizer = train_tokenizer(["text"], 300)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    ids, _ = encode(load_template("chatml", tokenizer), tokenizer, TALK)
    assert str(tokenizer.decode(ids, skip_special_tokens=False)).endswith("Yes<|im_end|>\n")
