"""A run and its export answer token for token alike, in batches as alone, and as whole forwards of our own do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from foveate import LanguageModel, load_run
from foveate.data.packing import pack
from foveate.data.sample import build_prompt, build_sample, load_pixels
from foveate.errors import DataError, ModelError
from foveate.export import export_model
from foveate.types import IGNORE_INDEX, Turn
from foveate_lab.evaluation import answer_all, evaluate
from foveate_lab.generation import Answerer, ExportAnswerer, Reply, RunAnswerer
from foveate_lab.queries import Query, read_queries
from tests.exports import MLP, encoder, llama_tokenizer, llm, trained_run
from tests.plugins.lab.asking import data, turns

LONGEST = 8
LORA = {"projector": 1e-2, "llm": {"lr": 1e-2, "lora": {"r": 4, "alpha": 8}}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: (model, stage)
    "vicuna": ({"encoder": encoder("clip"), "projector": MLP, "llm": "BOS"}, {"template": "vicuna"}),
    "llama2": (
        {"encoder": encoder("siglip"), "projector": MLP, "llm": "BOS"},
        {"template": "llama2", "system": "Be brief.", "geometry": "crop"},
    ),
    "qwen2-lora": (
        {"encoder": encoder("siglip"), "projector": MLP, "llm": llm("qwen2", tied=True)},
        {"template": "qwen2", "train": LORA, "geometry": "resize"},
    ),
    "plain": ({"encoder": encoder("clip"), "projector": MLP, "llm": "BOS"}, {"template": "plain"}),
    "chat-gpt2": ({"encoder": encoder("clip"), "projector": MLP, "llm": llm("gpt2")}, {"system": "Say a \"word\"."}),
    "chat-mistral": (
        {"encoder": encoder("dinov2"), "projector": MLP, "llm": llm("mistral", sliding_window=12)}, {}
    ),
    "own-granite": (
        {"encoder": encoder("registers"), "projector": {"type": "linear", "normalize": True},
         "llm": llm("granite", logits_scaling=3.0)},
        {},
    ),
}  # fmt: skip
BOS = {"vicuna": 1, "llama2": 3, "plain": 1}
"""Beginnings of text in the prompt of a third question."""


class Made:
    """Runs and exports of the cases, made when they are first asked for."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder, self.corpus = folder, corpus

    def paths(self, name: str) -> tuple[Path, Path]:
        model, stage = CASES[name]
        run, out = self.folder / name / "run", self.folder / name / "export"
        if not run.exists():
            tokenizer = llama_tokenizer(self.folder / "tokenizer")
            model = {**model, "llm": llm("llama", tokenizer=tokenizer)} if model["llm"] == "BOS" else model
            assert trained_run(self.folder / name, self.corpus, model, **stage) == run
            export_model(run, out, own_code=name.startswith("own"), check=False)
        return run, out

    def answerers(self, name: str, dtype: torch.dtype = torch.float32) -> tuple[RunAnswerer, ExportAnswerer]:
        run, out = self.paths(name)
        return RunAnswerer(load_run(run, device="cpu"), dtype=dtype), ExportAnswerer(out, dtype)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, shared_corpus: Path) -> Made:
    return Made(tmp_path_factory.mktemp("made"), shared_corpus)


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> list[Query]:
    """None, one and three pictures; histories, and questions with pictures in different turns; any size of picture."""
    folder = tmp_path_factory.mktemp("asked")
    generator = torch.Generator().manual_seed(3)
    for number, (height, width) in enumerate(((17, 31), (40, 14), (12, 12))):
        noise = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    rows: list[dict[str, Any]] = [
        {"image": "0.png", "conversations": turns("<image>\nWhich digit?", "It is 4.")},
        {"image": ["0.png", "1.png", "2.png"], "conversations": turns("<image><image>\nTwo, and <image>?", "No.")},
        {"image": ["1.png", "2.png"],
         "conversations": turns("<image>\nWhich?", "4.", "Sure?", "Quite.", "And <image>, é 😀?", "It is 3.")},
        {"image": "2.png", "conversations": turns(f"Is <image> {'very ' * 12}large?", "Yes.")},
    ]  # fmt: skip
    rows.append({"conversations": turns("Say the word.", "Word.", "Again.", "Word.")})
    return read_queries(data(folder, rows))


def askable(name: str, queries: list[Query]) -> list[Query]:
    """A template of captions has nothing to ask where there is no picture."""
    return [query for query in queries if query.conversation.images] if name == "plain" else queries


def tokens(replies: Sequence[Reply]) -> list[tuple[int, ...]]:
    return [reply.tokens for reply in replies]


@torch.no_grad()
def one_forward_a_token(answerer: RunAnswerer, query: Query) -> list[int]:
    """Greedy tokens of one question, each from training's own forward over everything before it."""
    prompt = load_pixels(build_prompt(query.conversation, answerer.rules), answerer.rules)
    found = list[int]()
    while len(found) < LONGEST and (not found or found[-1] not in answerer.ends):
        grown = torch.cat([prompt.input_ids, torch.tensor(found, dtype=torch.int64)])
        logits = answerer.lmm.logits(pack([replace(prompt, input_ids=grown, labels=grown)]))
        found.append(int(logits[-1].argmax()))
    return [token for token in found if token not in answerer.ends]


@pytest.mark.parametrize("name", CASES)
def test_a_run_and_its_export_answer_alike(made: Made, queries: list[Query], name: str) -> None:
    queries = askable(name, queries)
    run, export = made.answerers(name)
    assert sorted(run.ends) == sorted(export.ends) and run.tokenizer.eos_token_id in run.ends
    ours, theirs = (answer_all(answerer, queries, 4, LONGEST) for answerer in (run, export))
    assert ours == theirs
    assert len({reply.text for reply in ours}) > len(queries) // 2, "answers that are all alike prove nothing"
    assert [run.prompt(query) for query in queries] == [export.prompt(query) for query in queries]
    for query, reply in zip(queries, ours, strict=True):
        assert list(reply.tokens) == one_forward_a_token(run, query)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_answers_as_its_questions_do_alone(made: Made, queries: list[Query], name: str) -> None:
    queries = askable(name, queries)
    for answerer in made.answerers(name):
        alone = [reply for query in queries for reply in answerer.answer([query], LONGEST)]
        assert answer_all(answerer, queries, len(queries), LONGEST) == alone
        assert answer_all(answerer, queries, 3, LONGEST) == alone


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_begins_as_training_reads_it(made: Made, queries: list[Query], name: str) -> None:
    """The prompt's tokens are those of the same conversation with its answer, but perhaps a blank before the answer."""
    run, _ = made.answerers(name)
    for query in askable(name, queries):
        prompt = build_prompt(query.conversation, run.rules)
        answered = replace(query.conversation, turns=(*query.conversation.turns, Turn("assistant", query.reference)))
        whole = build_sample(answered, run.rules)
        assert whole.input_ids[: prompt.length].tolist() == prompt.input_ids.tolist()
        rest = whole.input_ids[prompt.length :]
        unlearned = rest[whole.labels[prompt.length :] == IGNORE_INDEX]
        assert run.tokenizer.decode(unlearned).strip() == ""
        assert [(image.start, image.grid) for image in prompt.images] == [(i.start, i.grid) for i in whole.images]


def test_bos_stands_where_the_template_says_and_nowhere_else(made: Made, queries: list[Query]) -> None:
    third = next(query for query in queries if query.id.endswith("#3"))
    for name in CASES:
        run, export = made.answerers(name)
        inputs = export.processor(
            images=[Image.new("RGB", (9, 9))] * len(third.conversation.images), text=[export.prompt(third)],
            return_tensors="pt",
        )["input_ids"][0].tolist()  # fmt: skip
        ours = build_prompt(third.conversation, run.rules).input_ids.tolist()
        assert ours == inputs
        bos = run.tokenizer.bos_token_id
        assert (0 if bos is None else ours.count(bos)) == BOS.get(name, 0), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_precision_is_that_of_transformers(made: Made, queries: list[Query], dtype: torch.dtype) -> None:
    run, export = made.answerers("vicuna", dtype)
    assert {tensor.dtype for tensor in run.lmm.state_dict().values() if tensor.is_floating_point()} == {dtype}
    frequencies = {n: t for n, t in run.lmm.llm.named_buffers() if "inv_freq" in n}
    assert frequencies and all(tensor.dtype is torch.float32 for tensor in frequencies.values())
    assert answer_all(run, queries, 4, LONGEST) == answer_all(export, queries, 4, LONGEST)


def test_training_attention_is_back_afterwards(made: Made, queries: list[Query]) -> None:
    run, _ = made.answerers("qwen2-lora")
    samples = [load_pixels(build_prompt(query.conversation, run.rules), run.rules) for query in queries]
    with torch.no_grad():
        before = run.lmm.logits(pack(samples))
        run.answer(queries, 2)
        assert torch.equal(run.lmm.logits(pack(samples)), before)


class Strange(LanguageModel):
    """An LLM of some plugin: no transformers model, no cache."""

    def __init__(self, inner: LanguageModel) -> None:
        super().__init__()
        self.inner, self.width, self.logit_scale = inner, inner.width, inner.logit_scale

    def embed(self, input_ids: Tensor) -> Tensor:
        assert input_ids.ndim == 1
        return self.inner.embed(input_ids)

    def forward(self, embeds: Tensor, position_ids: Tensor, segments: Any) -> Tensor:
        found: Tensor = self.inner(embeds, position_ids, segments)
        return found

    def head(self) -> tuple[Tensor, Tensor | None]:
        return self.inner.head()

    def blocks(self) -> list[nn.Module]:
        return self.inner.blocks()

    def resize_vocabulary(self, size: int) -> None:
        raise AssertionError

    def portable_options(self) -> dict[str, Any]:
        raise AssertionError


@pytest.mark.parametrize("name", ["llama2", "own-granite"])
def test_an_llm_of_a_plugin_answers_without_a_cache(made: Made, queries: list[Query], name: str) -> None:
    run, _ = made.answerers(name)
    expected = answer_all(run, queries, 4, LONGEST)
    run.ends = (*run.ends, expected[0].tokens[2])  # so that one answer ends before the others
    expected = answer_all(run, queries, 4, LONGEST)
    assert {reply.ended for reply in expected} == {True, False}
    run.lmm.llm = Strange(run.lmm.llm)
    assert answer_all(run, queries, 4, LONGEST) == expected


def test_what_ends_an_answer_is_no_part_of_it(made: Made, queries: list[Query]) -> None:
    for answerer in made.answerers("vicuna"):
        whole = answer_all(answerer, queries, 4, LONGEST)
        answerer.ends = (*answerer.ends, whole[1].tokens[3])
        for before, after in zip(whole, answer_all(answerer, queries, 4, LONGEST), strict=True):
            cut = before.tokens.index(whole[1].tokens[3]) if whole[1].tokens[3] in before.tokens else None
            assert after.tokens == before.tokens[:cut] and after.ended == (cut is not None)


def test_a_template_of_items_gets_items(made: Made, queries: list[Query], tmp_path: Path) -> None:
    """As the chat templates of llava-hf are: contents are lists; text as it stands would be lost."""
    _, out = made.paths("vicuna")
    shutil.copytree(out, tmp_path / "items")
    template = (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] | upper }}: "
        "{% for item in message['content'] %}{% if item['type'] == 'image' %}<image>\n{% elif item['type'] == 'text' %}"
        "{{ item['text'] }}{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    (tmp_path / "items" / "chat_template.jinja").write_text(template)
    answerer = ExportAnswerer(tmp_path / "items")
    prompts = {query.id: answerer.prompt(query) for query in queries}
    assert prompts["rows-0"] == "<s>USER: <image>\nWhich digit? ASSISTANT:"
    assert prompts["rows-4#2"] == "<s>USER: Say the word. ASSISTANT: Word. USER: Again. ASSISTANT:"
    assert all(isinstance(reply, Reply) for reply in answerer.answer(queries, 1))


def test_control_tokens_in_a_question_are_told(made: Made, tmp_path: Path) -> None:
    rows = [{"conversations": turns(text, "So.")} for text in ("Is </s> a word?", "Is s a word?")]
    asked = read_queries(data(tmp_path, rows))
    run, export = made.answerers("vicuna")
    assert [export.misreads(query) for query in asked] == [True, False]
    assert [run.misreads(query) for query in asked] == [False, False]


@pytest.mark.parametrize("which", [0, 1])
def test_a_question_that_a_template_cannot_put_is_an_error_before_any_answer(
    made: Made, queries: list[Query], which: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`plain` leaves the words out: of a question without a picture, and with no BOS, nothing is left."""
    answerer: Answerer = made.answerers("plain")[which]
    monkeypatch.setattr(answerer, "answer", lambda *_: pytest.fail("something was computed"))
    answerer.tokenizer.bos_token = None
    if isinstance(answerer, ExportAnswerer):
        answerer.processor.chat_template = answerer.processor.chat_template.replace("{{- bos_token -}}", "")
    with pytest.raises(DataError, match=r"sample 'rows-4': .*empty prompt"):
        evaluate(answerer, queries)


def test_a_damaged_export_is_refused(made: Made, tmp_path: Path) -> None:
    _, out = made.paths("vicuna")
    for name, damage in (("tokenizer.json", None), ("chat_template.jinja", None), ("config.json", "vision_config")):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(out, tmp_path / "broken")
        path = tmp_path / "broken" / name
        if damage is None:
            path.unlink()
        else:
            content = json.loads(path.read_text())
            content[damage]["num_hidden_layers"] += 1
            path.write_text(json.dumps(content))
        with pytest.raises(ModelError, match=str(tmp_path / "broken")):
            ExportAnswerer(tmp_path / "broken")
