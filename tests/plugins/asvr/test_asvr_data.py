"""A stage of captioned pictures, pictures without a word and text without a picture: who counts in which loss.

The reference goes sample by sample: token ids written by hand, transformers' own Qwen2, codes by brute force.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from asvr_parts import OPTIONS, write
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from foveate import assemble, load_recipe
from foveate.data.images import to_pixels
from foveate.data.packing import pack
from foveate.data.sample import build_sample, load_pixels
from foveate.progress import Display
from foveate.training import train
from tests.unit.test_objectives_in_training import same

GRID = 16
"""Visual tokens of a picture."""
ROWS: dict[str, list[dict[str, Any]]] = {
    "captioned": [
        {"id": "one", "image": ["0.png"], "talk": [("<image>\nWhich digit?", "It is 0.")]},
        {"id": "again", "image": ["2.png"], "talk": [("Which digit is <image>?", "Two, I think."), ("Sure?", "Yes.")]},
        {"id": "two", "image": ["6.png", "7.png"], "talk": [("<image><image>\nWhich two?", "A 6 and a 7.")]},
    ],
    "bare": [
        {"id": "bare", "image": ["4.png"]},
        {"id": "another", "image": ["10.png"]},
        {"id": "pair", "image": ["12.png", "14.png"]},
    ],
    "text": [
        {"id": "hello", "talk": [("Say hello.", "Hello there, hello!")]},
        {"id": "bye", "talk": [("Say goodbye to all of them.", "Bye.")]},
    ],
}  # fmt: skip
READ = {"captioned": 4 * GRID, "bare": 2 * (GRID - 1) + (2 * GRID - 1), "text": 0}
"""Visual tokens that have a state before them: all but the first of each sample that begins with a picture."""


def source(folder: Path, corpus: Path, kind: str, **keys: Any) -> dict[str, Any]:
    """An entry of a stage's `data`, its file written."""
    rows = copy.deepcopy(ROWS[kind])
    for row in rows:
        turns = [(who, text) for pair in row.pop("talk", ()) for who, text in zip(("human", "gpt"), pair, strict=True)]
        row |= {"conversations": [{"from": who, "value": text} for who, text in turns]} if turns else {}
    folder.mkdir(exist_ok=True)
    (folder / f"{kind}.json").write_text(json.dumps(rows))
    return {"path": str(folder / f"{kind}.json"), "images": str(corpus / "images"), **keys}


def recipe(folder: Path, corpus: Path, budget: int = 100_000, size: int = 8, **keys: dict[str, Any]) -> Any:
    """Of a stage that shows all samples in each step; `keys` go to the sources of these names."""
    data = [source(folder, corpus, kind, **keys.get(kind, {})) for kind in ROWS]
    changes = {"hardware": {"workers": 0, "tokens_per_microbatch": budget}, "batch_size": size, "max_steps": 4}
    exact = {"compute": "fp64", "teachers": "fp64"}
    return load_recipe(write(folder, corpus, {"asvr": OPTIONS}, data=data, precision=exact, **changes))


def run(made: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor], Path]:
    """Metrics, all weights, the folder."""
    done = train(made, display=Display(quiet=True))
    files = sorted((done.folder / "model").rglob("*.safetensors"))
    weights = {f"{path.parent.name}:{name}": value for path in files for name, value in load_file(path).items()}
    return done.metrics(), weights, done.folder


@dataclass
class Reference:
    """Losses of the model before its first step, a sample at a time; `books` `[Q, K, C]` are the fitted codebooks."""

    recipe: Any
    books: Tensor
    images: Path

    @cached_property
    def made(self) -> Any:
        return assemble(self.recipe)

    @cached_property
    def llm(self) -> Any:
        """transformers' own."""
        own = self.made.lmm.llm.model
        stock = AutoModelForCausalLM.from_config(copy.deepcopy(own.config), attn_implementation="eager").double()
        stock.load_state_dict(own.state_dict())
        return stock.eval()

    def sums(self, row: dict[str, Any]) -> tuple[float, int, float, int]:
        """Of a sample: sum of the text loss, supervised tokens; sum of the loss of codes, visual tokens that count."""
        ids, marked = self.tokens(row)
        pictures = [Image.open(self.images / name).convert("RGB") for name in row.get("image", [])]
        where = (ids == self.image_id).nonzero()[:, 0]
        lmm = self.made.lmm
        with torch.no_grad():
            embeds, codes = lmm.llm.embed(ids), list[Tensor]()
            for number, picture in enumerate(pictures):
                features = lmm.encoder(to_pixels(picture, lmm.encoder.spec, "pad")[None].double())
                embeds[where[number * GRID : (number + 1) * GRID]] = lmm.projector(features)[0]
                codes.append(self.codes(features[0]))
            found = self.llm(inputs_embeds=embeds[None], output_hidden_states=True)
            text = F.cross_entropy(found.logits[0, :-1][marked[1:]], ids[1:][marked[1:]], reduction="sum")
            kept = where > 0
            if not pictures:
                return float(text), int(marked[1:].sum()), 0.0, 0
            states, wanted = found.hidden_states[-1][0][where[kept] - 1], torch.cat(codes)[kept]
            return float(text), int(marked[1:].sum()), self.loss(states, wanted), len(states)

    @property
    def image_id(self) -> int:
        return int(self.made.data.tokenizer.convert_tokens_to_ids("<image>"))

    def tokens(self, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Token ids as the template chatml has them, an image in all its places; which of them are learned to say."""
        if "talk" not in row:
            count = GRID * len(row["image"])
            return torch.full((count,), self.image_id), torch.zeros(count, dtype=torch.bool)
        text, spans = "", []
        for question, answer in row["talk"]:
            text += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            spans.append((len(text), len(text) + len(answer) + len("<|im_end|>")))
            text += f"{answer}<|im_end|>\n"
        found = self.made.data.tokenizer(text, return_offsets_mapping=True)
        ids, marked = list[int](), list[bool]()
        for token, (first, last) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            times = GRID if token == self.image_id else 1
            ids += [token] * times
            marked += [any(first < end and last > start for start, end in spans)] * times
        return torch.tensor(ids), torch.tensor(marked)

    def codes(self, features: Tensor) -> Tensor:
        """`[N, C]` → `[N, Q]`: nearest vectors, one depth after the other, every distance written out."""
        rest, found = features, list[Tensor]()
        for book in self.books:
            found.append((rest[:, None] - book).square().sum(2).argmin(1))
            rest = rest - book[found[-1]]
        return torch.stack(found, 1)

    def loss(self, states: Tensor, codes: Tensor) -> float:
        """The sum over visual tokens of the mean over depths of cross-entropies."""
        tokenizer = self.made.learner.teachers.of("asvr")["semantic"]
        tokenizer.quantizer.codebooks.copy_(self.books)
        scores = self.made.learner.objectives["asvr"].heads["semantic"].logits(states, codes, tokenizer.quantizer)
        losses = F.cross_entropy(scores.flatten(0, 1), codes.flatten(), reduction="none").unflatten(0, codes.shape)
        return float(losses.mean(1).sum())


def expected(reference: Reference, kinds: Sequence[str]) -> dict[str, tuple[float, int]]:
    """Sum and count of each loss over the rows of these sources."""
    sums = [reference.sums(row) for kind in kinds for row in ROWS[kind]]
    text, tokens, codes, visual = (sum(values) for values in zip(*sums, strict=True))
    return {"text": (text, int(tokens)), "asvr": (codes, int(visual))}


def reference_of(folder: Path, made: Any, corpus: Path) -> Reference:
    books = load_file(folder / "teachers" / "asvr" / "weights.safetensors")["semantic.quantizer.codebooks"]
    return Reference(made, books, corpus / "images")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, shared_corpus: Path) -> tuple[Any, Any, Reference]:
    """A run on all three sources, and the reference of its model."""
    made = recipe(tmp_path_factory.mktemp("mixed"), shared_corpus)
    result = run(made)
    return made, result, reference_of(result[2], made, shared_corpus)


def test_codes_of_all_pictures_and_words_of_the_captioned(mixed: tuple[Any, Any, Reference]) -> None:
    """The first step's losses are the reference's sums over its counts, which the loader knew before."""
    made, (lines, *_), reference = mixed
    found = expected(reference, list(ROWS))
    assert found["asvr"][1] == sum(READ.values())
    assert expected(reference, ["bare"])["text"] == (0.0, 0) and expected(reference, ["text"])["asvr"] == (0.0, 0)
    for part, (total, count) in found.items():
        assert lines[0][f"loss/{part}"] == pytest.approx(total / count, rel=1e-9)
    [work, *_] = reference.made.data.stage(made.stages[0]).steps()
    assert work.counts == {part: count for part, (_, count) in found.items()}
    assert (lines[0]["samples"], lines[0]["images"]) == (8, 8)
    assert lines[-1]["loss/asvr"] < lines[0]["loss/asvr"] and lines[-1]["loss/text"] < lines[0]["loss/text"]


@pytest.mark.parametrize("budget", [60, 1])
def test_splitting_changes_nothing(
    mixed: tuple[Any, Any, Reference], tmp_path: Path, shared_corpus: Path, budget: int
) -> None:
    """With a budget of 1 every sample has a micro-batch to itself, a picture without a word too."""
    same(mixed[1], run(recipe(tmp_path, shared_corpus, budget)))


@pytest.mark.parametrize("number", range(3), ids=[row["id"] for row in ROWS["bare"]])
def test_a_picture_alone(mixed: tuple[Any, Any, Reference], number: int) -> None:
    """Nothing stands before its first visual token, which counts nowhere; the others teach projector, LLM and head."""
    _, _, reference = mixed
    room, learner, row = reference.made.data, reference.made.learner, ROWS["bare"][number]
    [stage] = reference.recipe.stages
    rules, bare = room.rules(stage), room.sources(stage.data)[1]
    batch = pack([load_pixels(build_sample(bare.dataset[number], rules), rules)], rules.objectives)
    _, _, total, count = reference.sums(row)
    learner.zero_grad()
    output = learner(batch)
    term = output.terms["asvr"]
    assert float(term.total.detach()) == pytest.approx(total, rel=1e-9)
    assert batch.sample_ids == [row["id"]] and batch.input_ids.numel() == GRID * len(row["image"])
    assert term.metrics["top1/1"][1] == count == batch.input_ids.numel() - 1
    assert float(output.terms["text"].total.detach()) == 0
    term.total.backward()
    for part in (reference.made.lmm.projector, reference.made.lmm.llm, learner.objectives["asvr"]):
        gradients = [parameter.grad for parameter in part.parameters() if parameter.grad is not None]
        assert gradients and max(float(gradient.abs().max()) for gradient in gradients) > 0


def test_what_a_source_can_be_told(mixed: tuple[Any, Any, Reference], tmp_path: Path, shared_corpus: Path) -> None:
    """`objectives: []`: its pictures are shown, and no objective looks at them, not even the fit. `weight: 2`: each of
    its samples comes twice an epoch, and counts twice; it is no weight of the loss."""
    made = recipe(tmp_path, shared_corpus, size=11, captioned={"objectives": []}, bare={"weight": 2})
    lines, _, folder = run(made)
    reference = reference_of(folder, made, shared_corpus)
    assert not torch.allclose(reference.books, mixed[2].books)
    text, (codes, visual) = expected(reference, list(ROWS))["text"], expected(reference, ["bare"])["asvr"]
    assert lines[0]["samples"] == 11
    assert lines[0]["loss/text"] == pytest.approx(text[0] / text[1], rel=1e-9)
    assert lines[0]["loss/asvr"] == pytest.approx(codes / visual, rel=1e-9)
    [work, *_] = reference.made.data.stage(made.stages[0]).steps()
    assert work.counts == {"text": text[1], "asvr": 2 * visual} and visual == READ["bare"]
