"""Samples: where images stand, what is supervised, how over-long conversations end, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.data.dataset import SampleError
from foveate.data.sample import SampleRules, build_sample, load_pixels
from foveate.data.tokenizer import train_tokenizer
from foveate.types import IGNORE_INDEX, Conversation, ImageRef, Turn

Talk = Callable[..., Conversation]
MakeRules = Callable[..., SampleRules]
X = Path("unread.png")


def spelled(rules: SampleRules, ids: Any) -> str:
    return rules.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("question", "answer", "images", "starts"),
    [
        ("<image>\nWhat?", "It", 1, [7]),  # <|im_start|> u s e r \n and then the image
        ("What?<image>", "It", 1, None),
        ("<image><image>", "two", 2, None),
        ("a<image>b<image><image>c", "three", 3, None),
        ("draw", "here: <image> done", 1, None),
        ("none", "none", 0, []),
    ],
)
def test_images_become_runs_of_tokens_where_they_stand(
    question: str, answer: str, images: int, starts: list[int] | None, talk: Talk, make_rules: MakeRules
) -> None:
    rules = make_rules(visual_grid=(2, 3))
    sample = build_sample(talk(question, answer, images=[X] * images), rules)
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    assert spelled(rules, sample.input_ids) == text.replace("<image>", "<image>" * 6)
    expected, ids = [], sample.input_ids.tolist()
    for before in range(images):  # an independent account: the tokens of the text before each placeholder
        head = "<image>".join(text.split("<image>")[: before + 1])
        expected.append(len(rules.tokenizer.encode(head)) + before * 5)
    assert [record.start for record in sample.images] == expected
    for record in sample.images:
        assert set(ids[record.start : record.start + 6]) == {rules.image_token_id} and record.tokens == 6
    labels = sample.labels[sample.labels != IGNORE_INDEX]
    assert spelled(rules, labels) == answer.replace("<image>", "") + "<|im_end|>"
    assert (sample.labels[sample.labels != IGNORE_INDEX] == sample.input_ids[sample.labels != IGNORE_INDEX]).all()


WORDS = st.text(st.sampled_from("ab 7\n.é日🌼<|im_end|>"), min_size=1, max_size=12).filter(str.strip)
PIECES = WORDS | st.just("<image>")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.lists(PIECES, min_size=1, max_size=5).map("".join), min_size=2, max_size=5))
def test_records_partition_the_sample(texts: list[str], make_rules: MakeRules) -> None:
    rules = make_rules(visual_grid=(1, 3))
    images = sum(text.count("<image>") for text in texts)
    turns = tuple(Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts))
    sample = build_sample(Conversation("h", turns, (ImageRef(X),) * images), rules)
    visual = [place for record in sample.images for place in range(record.start, record.start + 3)]
    assert visual == (sample.input_ids == rules.image_token_id).nonzero().flatten().tolist()
    assert len(sample.images) == images and (sample.labels[visual] == IGNORE_INDEX).all()
    answers = "".join(text.replace("<image>", "") + "<|im_end|>" for text in texts[1::2])
    assert spelled(rules, sample.labels[sample.labels != IGNORE_INDEX]) == answers


def test_target_images_take_no_tokens(talk: Talk, make_rules: MakeRules) -> None:
    sample = build_sample(talk("<image>", "ok", images=[X], targets=[X, X]), make_rules())
    assert [(record.role, record.index, record.tokens) for record in sample.images] == [
        ("input", 0, 4), ("target", 1, 0), ("target", 2, 0),
    ]  # fmt: skip
    assert sample.images[1].start == -1 and len(sample.refs) == 3


def test_image_only_samples(talk: Talk, make_rules: MakeRules, llama_tokenizer: Any) -> None:
    sample = build_sample(talk(images=[X, X], targets=[X]), make_rules())
    assert sample.length == 8 and sample.supervised == 0 and [record.start for record in sample.images] == [0, 4, -1]
    rules = make_rules("vicuna", llama_tokenizer)
    with_bos = build_sample(talk(images=[X]), rules)
    assert with_bos.input_ids.tolist() == [llama_tokenizer.bos_token_id] + [rules.image_token_id] * 4
    assert with_bos.images[0].start == 1


@pytest.mark.parametrize(
    ("texts", "images", "kind", "why"),
    [
        (["<image>", "a"], 0, "placeholders", "1 <image> placeholders but 0 images"),
        (["<image><image>", "a"], 3, "placeholders", "2 <image> placeholders but 3 images"),
        (["question"], 0, "answer", "no answer"),
        (["question", " \n"], 0, "answer", r"empty answer \(1 of 1\)"),
        (["q", "a", "q", ""], 0, "answer", r"empty answer \(1 of 2\)"),
        ([], 0, "answer", "neither turns nor an image"),
    ],
)
def test_defects(
    texts: list[str], images: int, kind: str, why: str, talk: Talk, make_rules: MakeRules
) -> None:
    with pytest.raises(SampleError, match=why) as caught:
        build_sample(talk(*texts, images=[X] * images, id="s7"), make_rules())
    assert caught.value.kind == kind and str(caught.value).startswith("sample 's7': ")


def test_a_sample_without_a_supervised_token_is_refused(
    talk: Talk, make_rules: MakeRules, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that learns the first answer of two users only, say."""
    tokenizer = train_tokenizer(["text"], 300)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and m.content != 'secret' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    rules = make_rules("chat", tokenizer)
    assert build_sample(talk("q", "open"), rules).supervised
    with pytest.raises(SampleError, match="no supervised token") as caught:
        build_sample(talk("q", "secret"), rules)
    assert caught.value.kind == "unsupervised"


def test_a_template_that_loses_or_makes_images_is_refused(talk: Talk, make_rules: MakeRules) -> None:
    tokenizer = train_tokenizer(["text"], 300)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content[:3] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(SampleError, match="has 1 placeholders; template 'chat' made 0 image tokens"):
        build_sample(talk("<image>", "a", images=[X]), make_rules("chat", tokenizer))


def test_over_long_samples(talk: Talk, make_rules: MakeRules) -> None:
    long = talk("<image> first", "one", "second <image>", "two", "third", "three", images=[X, X], targets=[X])
    full = build_sample(long, make_rules())
    for on_long in ("error", "drop"):
        with pytest.raises(SampleError, match=f"has {full.length} tokens, max_length is {full.length - 1}") as caught:
            build_sample(long, make_rules(max_length=full.length - 1, on_long=on_long))
        assert caught.value.kind == "long"
    assert build_sample(long, make_rules(max_length=full.length)).length == full.length
    lengths = []
    for turns, images in ((4, 2), (2, 1)):  # cut after the second answer, then after the first
        part = build_sample(Conversation("a", long.turns[:turns], long.images[:images] + long.images[2:]), make_rules())
        lengths.append(part.length)
        cut = build_sample(long, make_rules(max_length=part.length, on_long="cut"))
        assert torch.equal(cut.input_ids, part.input_ids) and torch.equal(cut.labels, part.labels)
        assert [record.index for record in cut.images] == [*range(images), 2] and cut.images[-1].role == "target"
        assert [record.start for record in cut.images] == [record.start for record in part.images]
    assert build_sample(long, make_rules(max_length=lengths[0] - 1, on_long="cut")).length == lengths[1]
    with pytest.raises(SampleError, match="even its first answer ends later"):
        build_sample(long, make_rules(max_length=lengths[1] - 1, on_long="cut"))


def test_an_unanswered_last_question_is_cut_first(talk: Talk, make_rules: MakeRules) -> None:
    part = build_sample(talk("one", "answer"), make_rules())
    cut = build_sample(talk("one", "answer", "and then?"), make_rules(max_length=part.length, on_long="cut"))
    assert torch.equal(cut.input_ids, part.input_ids)


def test_text_that_no_tokenizer_takes_is_a_defect(talk: Talk, make_rules: MakeRules) -> None:
    with pytest.raises(SampleError, match=r"sample 'a': .*surrogates not allowed"):
        build_sample(talk("half a pair \ud83d", "x"), make_rules())


def test_pixels_and_content_boxes(
    talk: Talk, make_rules: MakeRules, digits: list[Image.Image], photographs: list[Image.Image], tmp_path: Path
) -> None:
    digits[0].save(tmp_path / "digit.png")
    conversation = talk("<image><image>", "a", images=[tmp_path / "digit.png", photographs[0]], targets=[digits[1]])
    rules = make_rules(geometry="pad")
    outline = build_sample(conversation, rules)
    assert outline.pixels == []
    sample = load_pixels(outline, rules)
    assert [tuple(pixels.shape) for pixels in sample.pixels] == [(3, 48, 48)] * 3
    assert sample.images[0].content == (0.0, 0.0, 1.0, 1.0)
    assert sample.images[1].content == (0.0, 106 / 640, 1.0, 533 / 640)
    assert [record.start for record in sample.images] == [record.start for record in outline.images]
    with pytest.raises(SampleError, match=r"sample 'a': .*gone\.png does not exist"):
        load_pixels(build_sample(talk("<image>", "a", images=[tmp_path / "gone.png"]), rules), rules)
