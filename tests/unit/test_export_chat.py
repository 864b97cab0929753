"""The exported chat template renders what training rendered, from strings and from lists of items."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2 import TemplateError

from foveate.data.templates import SHIPPED, load_template
from foveate.data.tokenizer import train_tokenizer
from foveate.export.chat import chat_template

IMAGE = {"type": "image"}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def tokenizer() -> Any:
    made = train_tokenizer(["Which digit? It is 4."] * 2, 300)
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<|eot_id|>"]})
    return made


SYSTEM = 'Say "so" \\ it\'s {{ messages }} {% raw %} \n\t\x07 é 😀 </s>'
CASES = [(name, system) for name in SHIPPED for system in (None, SYSTEM) if (name, system) != ("plain", SYSTEM)]


@pytest.mark.parametrize(("name", "system"), CASES)
def test_strings_and_items_render_as_in_training(name: str, system: str | None) -> None:
    known = tokenizer()
    template = load_template(name, known, system)
    said = [("user", "<image>\n<image>\nWhich <image>?"), ("assistant", "It is 4."), ("user", "Sure?")]
    strings = [{"role": role, "content": content} for role, content in said]
    items = [text("<image>\n<image>\nWhich <image>?")]
    lists = [{"role": role, "content": [text(content)]} for role, content in said]
    lists[0]["content"] = [IMAGE, text("\n"), IMAGE, text("\nWhich "), IMAGE, text("?")]
    first = [] if system is None else [{"role": "system", "content": system}]
    for prompt in (False, True):
        options = {"tokenize": False, "add_generation_prompt": prompt}
        wanted = known.apply_chat_template([*first, *strings], chat_template=template.source, **options)
        assert wanted.count("<image>") == 3
        for given in (strings, lists, [{"role": "user", "content": items}, *strings[1:]]):
            assert known.apply_chat_template(given, chat_template=chat_template(template), **options) == wanted
    own = [{"role": "system", "content": [text("Other.")]}, *strings]
    if name != "plain":
        assert "Other." in (
            found := known.apply_chat_template(own, chat_template=chat_template(template), tokenize=False)
        )
        assert system is None or system not in found


def test_the_mask_of_answers_is_kept() -> None:
    known = tokenizer()
    template = load_template("chatml", known)
    messages = [{"role": "user", "content": [IMAGE, text("Which?")]}, {"role": "assistant", "content": "It is 4."}]
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    found = known.apply_chat_template(messages, chat_template=chat_template(template), **options)
    answer = [token for token, mine in zip(found["input_ids"], found["assistant_masks"], strict=True) if mine]
    assert known.decode(answer) == "It is 4.<|im_end|>"


@pytest.mark.parametrize(
    ("content", "rendered"),
    [
        ([IMAGE, text("Which?")], "<image>\nWhich?"),
        ([IMAGE, IMAGE, text("Which?")], "<image><image>\nWhich?"),
        ([IMAGE, text("\nWhich?")], "<image>\nWhich?"),
        ([IMAGE, text(" and "), IMAGE, text("same?")], "<image> and <image>same?"),
        ([text("Is it "), IMAGE, text(", or not?")], "Is it <image>, or not?"),
        ([text("Which?"), IMAGE], "Which?<image>"),
        ([IMAGE], "<image>"),
        ([], ""),
    ],
)
def test_images_that_open_a_message_stand_on_their_own_line(content: list[Any], rendered: str) -> None:
    known = tokenizer()
    source = chat_template(load_template("chatml", known))
    found = known.apply_chat_template([{"role": "user", "content": content}], chat_template=source, tokenize=False)
    assert found == f"<|im_start|>user\n{rendered}<|im_end|>\n"


def test_other_kinds_of_content_are_refused() -> None:
    known = tokenizer()
    source = chat_template(load_template("chatml", known))
    messages = [{"role": "user", "content": [{"type": "video", "path": "film.mp4"}]}]
    with pytest.raises(TemplateError, match='items of type "image" and "text", not "video"'):
        known.apply_chat_template(messages, chat_template=source, tokenize=False)
