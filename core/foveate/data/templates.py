"""Chat templates: from turns to tokens, with the mask of what the model must learn to say.

Text and mask are those of `apply_chat_template(..., return_assistant_tokens_mask=True)`, rendered by the same function;
but control tokens that stand in the user's data stay text, and a `{% generation %}` span keeps every token it touches.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from foveate.errors import DataError
from foveate.types import IMAGE_PLACEHOLDER, Turn

SHIPPED = ("plain", "chatml", "qwen2", "vicuna", "llama2", "llama3")  # `chat` is the tokenizer's own
_GUARD = "\ufdd1"  # a Unicode noncharacter: never valid in exchanged text


@dataclass(frozen=True)
class Template:
    """A chat template, checked against the tokenizer whose special tokens are `special`; `system` is the default."""

    name: str
    source: str
    special: re.Pattern[str]
    system: str | None = None


def template_source(name: str) -> str:
    """The Jinja text of a shipped template."""
    return (files("foveate.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8").strip("\n")


def load_template(name: str, tokenizer: Any, system: str | None = None) -> Template:
    """The template `name`, one of `SHIPPED` or `chat`, checked on a small conversation.

    `system` is said where a conversation has no system turn. Raises `DataError` when the tokenizer has no template of
    its own, or a template does not mark the answers, does not teach where they end, or has no place for `system`.
    """

    def refused(why: str) -> DataError:
        owner = f" of {tokenizer.name_or_path}" if name == "chat" and tokenizer.name_or_path else ""
        advice = f"set the stage's `template` to one that comes with foveate ({', '.join(SHIPPED)}), or mend it"
        return DataError(f"template '{name}'{owner} {why}: {advice}.")

    if not getattr(tokenizer, "is_fast", False) or IMAGE_PLACEHOLDER not in tokenizer.get_vocab():
        raise refused(f"needs a fast tokenizer with the token {IMAGE_PLACEHOLDER} (see `load_tokenizer`)")
    if name not in ("chat", *SHIPPED):
        raise refused("is not known (`chat` is the tokenizer's own)")
    if name == "chat" and not tokenizer.chat_template:
        raise refused("is the tokenizer's own chat template, and it has none")
    source = tokenizer.get_chat_template() if name == "chat" else template_source(name)
    if not re.search(r"\{%-?\s*generation\s*-?%\}", source):
        raise refused("has no {% generation %} tags, so nothing says which tokens are the answer")
    tokenizer("", truncation=False, padding=False)  # forgets the truncation and padding of its file
    special = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    template = Template(name, source, re.compile("|".join(map(re.escape, special)) or "(?!)"), system)
    probe = (Turn("user", "a"), Turn("assistant", "b"))
    ids, learned = encode(template, tokenizer, probe)
    if not any(learned[i] for i, token in enumerate(tokenizer.convert_ids_to_tokens(ids)) if token in special):
        raise refused("supervises no special token after an answer: its end would not be learned (is eos_token set?)")
    if system is not None and encode(replace(template, system=None), tokenizer, probe)[0] == ids:
        raise refused("has no place for a system message: remove `system`")
    return template


def encode(
    template: Template, tokenizer: Any, turns: Sequence[Turn], ask: bool = False
) -> tuple[list[int], list[bool]]:
    """Token ids and whether each is supervised. Every placeholder is one image token: they are not yet expanded.

    `ask`: with what the template puts before an answer that is still to come (`add_generation_prompt`). Raises
    `DataError` when the template refuses the conversation.
    """
    messages = [{"role": turn.role, "content": _guard(turn.text, template.special)} for turn in turns]
    if template.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": template.system})
    options = {"return_assistant_tokens_mask": True, "add_generation_prompt": ask, **tokenizer.special_tokens_map}
    try:
        rendered: Any = render_jinja_template([messages], chat_template=template.source, **options)
        (text,), (spans,) = rendered
        text.encode()  # no tokenizer takes a lone surrogate
    except (TemplateError, UnicodeEncodeError) as error:
        raise DataError(f"template '{template.name}' refuses the conversation: {error}") from None
    backend, at, ids, offsets = tokenizer.backend_tokenizer, 0, list[int](), list[tuple[int, int]]()
    for number, piece in enumerate(text.split(_GUARD)):
        backend.encode_special_tokens = number % 2 == 1
        part = backend.encode(piece, add_special_tokens=False)
        if number % 2 == 1 and tokenizer.convert_tokens_to_ids(piece) in part.ids:
            raise DataError(f"the text holds '{piece}', which this tokenizer cannot tell from the control token")
        ids += part.ids
        offsets += [(at + start, at + end) for start, end in part.offsets]
        at += len(piece) + 1
    backend.encode_special_tokens = False
    supervised = [False] * len(ids)
    for start, end in spans:
        first, stop = bisect_right(offsets, start, key=lambda o: o[1]), bisect_left(offsets, end, key=lambda o: o[0])
        supervised[first:stop] = [True] * (stop - first)
    return ids, supervised


def _guard(text: str, special: re.Pattern[str]) -> str:
    """Wrap special tokens that the data contains, placeholders excepted, so that they are encoded as plain text."""
    parts = text.replace(_GUARD, "\ufffd").split(IMAGE_PLACEHOLDER)
    return IMAGE_PLACEHOLDER.join(special.sub(f"{_GUARD}\\g<0>{_GUARD}", part) for part in parts)
