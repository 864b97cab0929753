"""The text side of an export: tokenizer, chat template, image processor, and how an answer ends."""

from __future__ import annotations

import json
import math
from typing import Any

from transformers import GenerationConfig, LlavaProcessor

from foveate.data.images import make_image_processor
from foveate.data.sample import SampleRules
from foveate.data.templates import Template, encode
from foveate.errors import ModelError
from foveate.types import IMAGE_PLACEHOLDER, Turn

_CONTENT = """\
{#- Messages as text: an item of type "image" becomes the image token. -#}
{%- set given = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string or message['content'] is none -%}
{%- set given.messages = given.messages + [message] -%}
{%- else -%}
{%- set turn = namespace(text='', opening=true) -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}
{%- set turn.text = turn.text ~ 'IMAGE' -%}
{%- elif item['type'] == 'text' -%}
{%- if turn.opening and turn.text and item['text'] and item['text'][0] not in ' \\n\\t' -%}
{%- set turn.text = turn.text ~ '\\n' -%}
{%- endif -%}
{%- set turn.opening = false -%}
{%- set turn.text = turn.text ~ item['text'] -%}
{%- else -%}
{{- raise_exception('this model reads items of type "image" and "text", not "' ~ item['type'] ~ '"') -}}
{%- endif -%}
{%- endfor -%}
{%- set given.messages = given.messages + [dict(message, content=turn.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = given.messages -%}
""".replace("IMAGE", IMAGE_PLACEHOLDER)

_SYSTEM = """\
{%- if messages[0]['role'] != 'system' -%}
{%- set messages = [{'role': 'system', 'content': TEXT}] + messages -%}
{%- endif -%}
"""


def chat_template(template: Template) -> str:
    """The Jinja text that renders what training rendered, from messages of strings or of lists of items.

    Images that open a message stand on a line of their own, as in LLaVA's data; other items follow each other as they
    are. The stage's own `system` is said where a conversation has none.
    """
    # a Jinja string has the escapes of Python's, of which JSON's are a part, but for surrogates
    system = _SYSTEM.replace("TEXT", json.dumps(template.system, ensure_ascii=False)) if template.system else ""
    return _CONTENT + system + template.source


def make_processor(rules: SampleRules, tokenizer: Any, strategy: str) -> LlavaProcessor:
    """The processor: training's image processor, its template, and as many placeholders as there are visual tokens.

    `tokenizer` is one of its own. It is changed: it pads on the left, adds nothing to what the template says, and its
    EOS is what ends an answer, because some programs stop at nothing else. `strategy`: the model's
    `vision_feature_select_strategy`.
    """
    size, tokens = rules.encoder.image_size, math.prod(rules.visual_grid)
    patch = size // math.isqrt(tokens)  # of pixels; CLS tokens that the model uses are no square's part
    tokenizer("", truncation=False, padding=False)  # forgets the truncation and padding of its file
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the latter is what a tokenizer saves
    end = _answer_end(rules)
    if end is not None and "eos_token" not in rules.template.source:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    _add_nothing(tokenizer)
    tokenizer.chat_template = chat_template(rules.template)
    return LlavaProcessor(
        image_processor=make_image_processor(rules.encoder, rules.geometry),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=tokens - (size // patch) ** 2 + (strategy == "default"),
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_PLACEHOLDER,
    )


def make_generation_config(rules: SampleRules, tokenizer: Any) -> GenerationConfig:
    """Greedy, until a token that ends an answer: the one that the template teaches, or EOS."""
    ends = [token for token in (_answer_end(rules), rules.tokenizer.eos_token_id) if token is not None]
    return GenerationConfig(
        eos_token_id=list(dict.fromkeys(ends)), pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )


def _answer_end(rules: SampleRules) -> int | None:
    """The last special token of an answer that the template supervises."""
    ids, learned = encode(rules.template, rules.tokenizer, (Turn("user", "a"), Turn("assistant", "b")))
    special = {number for number, token in rules.tokenizer.added_tokens_decoder.items() if token.special}
    taught = [token for token, mine in zip(ids, learned, strict=True) if mine and token in special]
    return taught[-1] if taught else None


def _add_nothing(tokenizer: Any) -> None:
    """The template writes BOS where it belongs; a tokenizer that added its own would make two of them."""
    if tokenizer("a").input_ids == tokenizer("a", add_special_tokens=False).input_ids:
        return
    for name in ("add_bos_token", "add_eos_token"):
        setattr(tokenizer, name, False)
    if tokenizer("a").input_ids != tokenizer("a", add_special_tokens=False).input_ids:
        raise ModelError(
            f"the {type(tokenizer).__name__} adds special tokens to every text, and cannot be told to leave that to "
            f"the chat template"
        )
