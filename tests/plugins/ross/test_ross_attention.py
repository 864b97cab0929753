"""How much a model looks at its images: attention by hand and transformers' own, the statistics, the command."""

from __future__ import annotations

import json
import math
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from foveate import LMM, Batch, Conversation, LoadedRun, load_run
from foveate.data.llava import LlavaDataset
from foveate.data.packing import pack
from foveate.data.sample import build_prompt, load_pixels
from foveate.errors import DataError, ModelError
from foveate.export import export_model
from foveate.model.attention import Segments
from foveate.model.language import LanguageModel
from foveate_ross.attention import Looks, Question, compare, last_row, look, read_questions
from tests.conftest import Command
from tests.exports import MLP, encoder, llm, trained_run

MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 1, "initializer_range": 0.3},
    "mistral": {"sliding_window": 12, "initializer_range": 0.3},
}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]


ROWS: list[dict[str, Any]] = [
    {"id": "one", "image": "0.png", "conversations": turns("<image>\nWhich digit?", "It is 4.", "Sure?", "Yes.")},
    {"id": "text", "conversations": turns("Say the word.", "Word.")},
    {"id": "two", "image": ["1.png", "2.png"], "conversations": turns("<image> or <image>?", "It is 4.")},
    {"id": "late", "image": "2.png", "conversations": turns("Say.", "Word.", "And <image>?", "It is 4.")},
]
IDS = ["one", "one#2", "two", "late#2"]


def write_rows(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Questions about pictures of noise."""
    random = np.random.default_rng()
    for number, (height, width) in enumerate(((17, 31), (40, 14), (12, 12))):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shared_corpus: Path) -> dict[str, Path]:
    """A run of each LLM."""
    folder, made = tmp_path_factory.mktemp("runs"), dict[str, Path]()
    for name, fields in MODELS.items():
        model = {"encoder": encoder("siglip"), "projector": MLP, "llm": llm(name, **fields)}
        made[name] = trained_run(folder / name, shared_corpus, model, template="chatml")
    return made


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    found, blind = read_questions(rows_of(write_rows(tmp_path_factory.mktemp("rows"))))
    assert [question.conversation.id for question in found] == IDS and blind == 2
    return found


def rows_of(path: Path) -> LlavaDataset:
    return LlavaDataset(LlavaDataset.Options(path=path))


def prompt(run: LoadedRun, conversation: Conversation) -> Batch:
    rules = run.data.rules(run.recipe.stages[-1], objectives=False)
    return pack([load_pixels(build_prompt(conversation, rules), rules)])


def qwen2(lmm: LMM, batch: Batch) -> tuple[Tensor, Tensor]:
    """The last token's attention on each token and its logits, written down from Qwen2's formulas in float64."""
    model: Any = lmm.llm.model
    config, w = model.config, {name: value.double() for name, value in model.state_dict().items()}
    x = lmm.place(batch, lmm.see(batch.pixels).tokens).double()
    total, heads, shared = len(x), config.num_attention_heads, config.num_key_value_heads
    side, theta = config.hidden_size // heads, config.rope_parameters["rope_theta"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * w[f"{name}.weight"]

    def turned(x: Tensor) -> Tensor:
        """Pairs (i, i + side/2) as complex numbers, each turned by its frequency times the position."""
        number = torch.complex(x[:, : side // 2], x[:, side // 2 :])
        waves = torch.tensor([theta ** (-2 * i / side) for i in range(side // 2)], dtype=torch.float64)
        number = number * torch.polar(torch.ones(total, side // 2, dtype=torch.float64),
                                      torch.arange(total, dtype=torch.float64)[:, None] * waves)  # fmt: skip
        return torch.cat([number.real, number.imag], -1)

    rows = []
    for layer in (f"model.layers.{number}" for number in range(config.num_hidden_layers)):
        normed, seen = norm(x, f"{layer}.input_layernorm"), []
        query, key, value = (linear(normed, f"{layer}.self_attn.{part}_proj") for part in "qkv")
        for head in range(heads):
            mine, its = slice(head * side, (head + 1) * side), head // (heads // shared)
            lent = slice(its * side, (its + 1) * side)
            scores = turned(query[:, mine]) @ turned(key[:, lent]).T / math.sqrt(side)
            scores = scores.masked_fill(torch.ones(total, total).triu(1).bool(), -math.inf).exp()
            weights = scores / scores.sum(-1, keepdim=True)
            rows.append(weights[-1])
            seen.append(weights @ value[:, lent])
        x = x + linear(torch.cat(seen, -1), f"{layer}.self_attn.o_proj")
        normed = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(normed, f"{layer}.mlp.gate_proj")
        x = x + linear(gate / (1 + (-gate).exp()) * linear(normed, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    return torch.stack(rows).mean(0), linear(norm(x[-1], "model.norm"), "lm_head")


@torch.no_grad()
def test_it_is_the_attention_of_the_formulas(runs: dict[str, Path], questions: list[Question]) -> None:
    """In float64, of every question; and what is said next is what the run says next."""
    run = load_run(runs["qwen2"], device="cpu")
    run.lmm.double()
    found = look(run, questions, dtype=torch.float64)
    for number, question in enumerate(questions):
        batch = prompt(run, question.conversation)
        row_T, logits_V = qwen2(run.lmm, batch)
        made_T, said_V = last_row(run.lmm, batch)
        torch.testing.assert_close(made_T, row_T, rtol=1e-5, atol=1e-8)  # transformers' angles and softmax are float32
        torch.testing.assert_close(said_V, logits_V, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(said_V, run.lmm.logits(batch)[-1], rtol=1e-5, atol=1e-5)
        visual = batch.input_ids == run.data.rules(run.recipe.stages[-1]).image_token_id
        assert int(visual.sum()) == 9 * len(question.conversation.images)
        assert found.means[number] == pytest.approx(float(row_T[visual].sum() / visual.sum()), rel=1e-5)
        assert found.shares[number] == pytest.approx(float(row_T[visual].sum()), rel=1e-5)
    assert len(set(found.means.round(6))) == len(questions)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_own_llava_tells_the_same(
    name: str, runs: dict[str, Path], questions: list[Question], tmp_path: Path
) -> None:
    """In an export: its processor, its model, all tokens at once; also where old tokens are out of a window's sight."""
    export_model(runs[name], tmp_path / "export", check=False)
    model: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "export", attn_implementation="eager")
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "export")
    run = load_run(runs[name], device="cpu")
    found = look(run, questions)
    for number, question in enumerate(questions):
        asked = question.conversation
        messages = [{"role": turn.role, "content": turn.text} for turn in asked.turns]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        pictures: list[Any] = [Image.open(ref.source) for ref in asked.images]  # type: ignore[arg-type]
        inputs = processor(images=pictures, text=text, return_tensors="pt")
        with torch.no_grad():
            told = model(**inputs, output_attentions=True)
        last = torch.stack([layer[0, :, -1].mean(0) for layer in told.attentions]).mean(0)
        seen = last[inputs["input_ids"][0] == model.config.image_token_id]
        assert len(seen) == 9 * len(pictures)
        assert found.means[number] == pytest.approx(float(seen.mean()), rel=1e-4)
        with torch.no_grad():
            own = run.lmm.logits(prompt(run, asked))[-1]
        torch.testing.assert_close(told.logits[0, -1], own, rtol=1e-4, atol=1e-4)


class Own(LanguageModel):
    """Not of transformers."""

    def __init__(self, inner: LanguageModel):
        super().__init__()
        self.inner, self.width = inner, inner.width

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.inner.embed(input_ids)

    def forward(self, embeds: Tensor, position_ids: Tensor, segments: Segments) -> Tensor:
        made: Tensor = self.inner(embeds, position_ids, segments)
        return made

    def head(self) -> tuple[Tensor, Tensor | None]:
        return self.inner.head()

    def blocks(self) -> list[torch.nn.Module]:
        return self.inner.blocks()

    def resize_vocabulary(self, size: int) -> None:
        self.inner.resize_vocabulary(size)

    def portable_options(self) -> dict[str, Any]:
        return self.inner.portable_options()


def test_an_llm_that_does_not_tell_its_attention_is_refused(
    runs: dict[str, Path], questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(runs["qwen2"], device="cpu")
    inner: Any = run.lmm.llm
    packed = inner.model.config._attn_implementation
    with monkeypatch.context() as patch, pytest.raises(ModelError, match="no LLM of transformers"):
        patch.setitem(run.lmm._modules, "llm", Own(inner))
        look(run, questions)
    with monkeypatch.context() as patch, pytest.raises(ModelError, match="Qwen2ForCausalLM has no eager attention"):
        patch.setattr(type(inner.model), "set_attn_implementation", refuse)
        look(run, questions)
    body = inner.body.forward
    with monkeypatch.context() as patch, pytest.raises(ModelError, match=r"tells its attention in 0 of its \d layers"):
        patch.setattr(inner.body, "forward", lambda **given: body(**{**given, "output_attentions": False}))
        look(run, questions)
    rotary = inner.body.rotary_emb.forward
    with monkeypatch.context() as patch, pytest.raises(ModelError, match="computes something else than its training"):
        patch.setattr(inner.body.rotary_emb, "forward", lambda x, at: rotary(x, at * (2 if x.shape[1] > 1 else 3)))
        look(run, questions)
    assert inner.model.config._attn_implementation == packed, "training's own attention is back, whatever happened"


def refuse(*given: Any) -> None:
    raise ValueError("only flash")


def test_the_tests_are_those_of_the_textbook() -> None:
    """Welch's t and its p by integrating the density; Mann-Whitney's exact p by counting all assignments."""
    random = np.random.default_rng()
    a, b = random.normal(2.0, 0.3, 6), random.normal(2.4, 0.7, 5)
    found = compare(Looks(a, a), Looks(b, b))
    spread = a.var(ddof=1) / 6, b.var(ddof=1) / 5
    t = (a.mean() - b.mean()) / math.sqrt(sum(spread))
    freedom = sum(spread) ** 2 / (spread[0] ** 2 / 5 + spread[1] ** 2 / 4)
    angles = np.linspace(math.atan(abs(t) / math.sqrt(freedom)), math.pi / 2, 200_001)  # x = sqrt(freedom) tan(angle)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    p = 2 * constant * np.trapezoid(np.cos(angles) ** (freedom - 1), angles)
    assert found["welch"] == pytest.approx({"statistic": t, "p": p}, rel=1e-6)

    def larger(first: Any, second: Any) -> int:
        return sum(x > y for x in first for y in second)

    values, u = np.concatenate([a, b]), larger(a, b)
    others = [
        larger(values[list(chosen)], np.delete(values, list(chosen))) for chosen in combinations(range(11), 6)
    ]
    p = min(1.0, 2 * min(np.mean([other >= u for other in others]), np.mean([other <= u for other in others])))
    assert found["mann_whitney"] == pytest.approx({"statistic": u, "p": p}, rel=1e-9)
    flat = Looks(np.full(4, 0.5), np.full(4, 0.5))
    assert compare(flat, flat)["welch"] == {"statistic": None, "p": None}


def test_the_command(runs: dict[str, Path], tmp_path: Path, foveate_command: Command) -> None:
    """Table, JSON and plot of two runs; the numbers are those of the library."""
    path, out = write_rows(tmp_path), tmp_path / "out"
    words = ("analyze", "attention", *runs.values(), "--data", path, "--out", out)
    status, table, errors = foveate_command(*words)
    assert status == 0, errors
    told = json.loads((out / "attention.json").read_text())
    assert (told["questions"], told["without_picture"]) == (4, 2)
    assert [row["id"] for row in told["by_question"]] == IDS
    for number, run in enumerate(runs.values()):
        found = look(load_run(run, device="cpu"), read_questions(rows_of(path))[0])
        np.testing.assert_allclose([row["mean"][number] for row in told["by_question"]], found.means, rtol=1e-5)
        entry, ordered = told["runs"][number], sorted(found.means)
        assert entry["mean"] == pytest.approx(sum(ordered) / 4, rel=1e-5)
        assert entry["median"] == pytest.approx((ordered[1] + ordered[2]) / 2, rel=1e-5)
        assert entry["p95"] == pytest.approx(0.15 * ordered[2] + 0.85 * ordered[3], rel=1e-5)
        assert entry["share"] == pytest.approx(found.shares.mean(), rel=1e-5)
        assert f"{1e4 * entry['mean']:.3f}" in table
    assert f"{told['tests']['welch']['p']:.2e}" in table and "2 questions without a picture" in table
    drawn = np.asarray(Image.open(out / "attention.png").convert("RGB")).reshape(-1, 3)
    assert len(np.unique(drawn, axis=0)) > 20
    status, text, _ = foveate_command(*words, "--json", "--limit", 3, "--precision", "bf16")
    fewer = json.loads(text)
    assert status == 0 and [row["id"] for row in fewer["by_question"]] == IDS[:3]
    for row, other in zip(fewer["by_question"], told["by_question"], strict=False):
        assert row["mean"] == pytest.approx(other["mean"], rel=0.1)


def test_what_the_command_refuses(
    runs: dict[str, Path], tmp_path: Path, shared_corpus: Path, foveate_command: Command
) -> None:
    first, second = runs.values()
    path = write_rows(tmp_path)
    blind = tmp_path / "blind.json"
    blind.write_text(json.dumps([ROWS[1]]))
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps([{**ROWS[0], "image": "gone.png"}]))
    (tmp_path / "file").touch()
    for words, problem in (
        ((first, tmp_path, "--data", path), "is not a run"),
        ((first, second), "its recipe has no `evaluate`"),
        ((first, second, "--images", tmp_path), "give --data FILE too"),
        ((first, second, "--data", tmp_path / "none.json"), "no such file or folder"),
        ((first, second, "--data", blind), "the data ask nothing about a picture"),
        ((first, second, "--data", broken), "gone.png does not exist"),
        ((first, second, "--data", path, "--device", "abacus"), "device abacus"),
        ((first, second, "--data", path, "--out", tmp_path / "file"), "cannot be made"),
    ):
        out = () if "--out" in words else ("--out", tmp_path / "out")
        status, _, errors = foveate_command("analyze", "attention", *words, *out)
        assert status == 2 and problem in " ".join(errors.split()), (words, errors)
    with pytest.raises(DataError, match="sample 'x': has neither turns nor an image"):
        read_questions([Conversation("x", ())])  # type: ignore[arg-type]


def test_runs_that_evaluate_the_same_questions(
    runs: dict[str, Path], tmp_path: Path, foveate_command: Command
) -> None:
    """Without --data it is what both recipes evaluate; the same names and words about other pictures are refused."""
    made = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for run in made:
        shutil.copytree(runs["qwen2"], run)
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        recipe["evaluate"] = {"data": [{"path": str(write_rows(run.parent))}], "metrics": ["answers"]}
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    status, _, errors = foveate_command("analyze", "attention", *made)
    assert status == 2 and "question 1 is 'one' of the first. Give the same to both with --data" in errors, errors
    status, table, errors = foveate_command("analyze", "attention", made[0], made[0])
    assert status == 0 and (made[0] / "attention" / "attention.png").is_file(), errors
    assert "run (A)" in table and "p = 1.00e+00" in table
