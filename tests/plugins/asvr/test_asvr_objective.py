"""The objective in the model: the contract, what a shift may know, what changes no gradient, image-only runs."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from asvr_parts import APPEARANCE, HEAD, OPTIONS, TOKENIZER, TRAIN, bench, write
from safetensors.torch import load_file
from torch import Tensor

from foveate import LossTerm, assemble, load_recipe, load_run
from foveate.errors import FoveateError, RecipeError
from foveate.progress import Display
from foveate.session import Interrupted
from foveate.testing import check_objective
from foveate.testing.kit import MOMENT
from foveate.training import train
from foveate_asvr.objective import Asvr, AsvrOptions
from foveate_asvr.pictures import colour
from tests.objectives_plugin import environment
from tests.unit.test_objectives_in_training import same

FP64 = {"compute": "fp64", "teachers": "fp64"}


@pytest.mark.parametrize(
    "options",
    [
        {}, {"shift": 0, "head": "linear"}, {"target": "both"},
        {"target": "early_layer", "head": {**HEAD, "residual": "released"}},
    ],
    ids=["paper", "linear head, released shift", "both", "early layer"],
)  # fmt: skip
def test_it_keeps_the_contract(options: dict[str, Any]) -> None:
    check_objective("asvr", {**OPTIONS, **options}, gradient_to=("head", "projector", "llm"))


@pytest.mark.parametrize("shift", [1, 0])
def test_with_shift_1_a_visual_tokens_own_information_does_not_reach_its_logits(shift: int) -> None:
    """A nudge of the projector's output at token i moves the logits of those after i, and with shift 0 of i itself."""
    made = bench(shift=shift)
    batch = made.pack([made.samples["one image"]])

    def logits(nudged: int | None = None) -> Tensor:
        def nudge(module: Any, arguments: Any, output: Tensor) -> Tensor:
            output = output.clone()
            if nudged is not None:
                output[0, nudged] += torch.randn(output.shape[-1], dtype=output.dtype)
            return output

        handle = made.lmm.projector.register_forward_hook(nudge)
        try:
            seen = made.learner.look(batch, MOMENT)["asvr"]
        finally:
            handle.remove()
        head, tokenizer = made.objective.heads["semantic"], seen.outputs.teacher["semantic"]
        return head.logits(seen.outputs.states(), seen.targets.rows("semantic"), tokenizer.quantizer).detach()

    before = logits()
    assert len(before) == 16
    for token in range(16):
        moved = (logits(token) - before).abs().amax((1, 2)) > 1e-12
        assert moved.tolist() == [row > token - (1 - shift) for row in range(16)]


@pytest.mark.parametrize("target", ["semantic", "both"])
def test_the_loss_is_the_mean_over_depths_of_cross_entropies(target: str) -> None:
    """From states and codes of every image, in float64; with `both` the sum of two; metrics by depth."""
    weights = (0.5, 2.0, 0.0)
    made = bench(target=target, depth_weights=weights)
    seen = made.learner.look(made.mixed, MOMENT)["asvr"]
    term = made.learner(made.mixed, MOMENT).terms["asvr"]
    expected, rows = 0.0, 0
    for name, head in made.objective.heads.items():
        states, codes = seen.outputs.states(), seen.targets.rows(name)
        scores = head.logits(states, codes, seen.outputs.teacher[name].quantizer).detach()
        start = f"{name}/" if target == "both" else ""
        for depth, weight in enumerate(weights):
            losses, hits = 0.0, 0
            for row, wanted in zip(scores[:, depth].tolist(), codes[:, depth].tolist(), strict=True):
                losses += math.log(sum(math.exp(x) for x in row)) - row[wanted]
                hits += max(range(len(row)), key=row.__getitem__) == wanted
            expected, rows = expected + losses * weight / sum(weights), len(states)
            assert float(term.metrics[f"{start}cross_entropy/{depth + 1}"][0]) == pytest.approx(losses, rel=1e-9)
            assert term.metrics[f"{start}top1/{depth + 1}"] == (hits, rows)
    assert float(term.total.detach()) == pytest.approx(expected, rel=1e-9)
    images = [record for record in made.mixed.images if "asvr" in record.objectives]
    assert rows == sum(record.rows(1) for record in images) < sum(record.tokens for record in images)


def run(
    folder: Path, corpus: Path, objectives: dict[str, Any], resume: bool = False, **changes: Any
) -> tuple[Any, ...]:
    """Metrics, weights and the run of a recipe."""
    recipe = load_recipe(write(folder, corpus, objectives, **changes))
    done = train(recipe, resume=resume, display=Display(quiet=True))
    files = sorted((done.folder / "model").rglob("*.safetensors"))
    weights = {f"{path.parent.name}:{name}": value for path in files for name, value in load_file(path).items()}
    return done.metrics(), weights, done


def test_token_budget_changes_nothing_in_float64(tmp_path: Path, shared_corpus: Path) -> None:
    """Text-only, image-only and two-image samples; both targets, both shifts, which share tokenizers and their fit."""
    both = {**OPTIONS, "target": "both"}
    objectives = {"asvr": both, "copy": {**both, "type": "asvr", "shift": 0}}
    results = [
        run(
            tmp_path / str(budget), shared_corpus, objectives, max_steps=3, precision=FP64,
            hardware={"workers": 0, "tokens_per_microbatch": budget},
        )
        for budget in (100_000, 120)
    ]  # fmt: skip
    same(*results)
    line = results[0][0][0]
    depths = [line[f"asvr/{name}/cross_entropy/{depth}"] for name in ("semantic", "appearance") for depth in (1, 2, 3)]
    assert line["loss/asvr"] == pytest.approx(sum(depths) / 3, rel=1e-9)
    teachers = sorted(path.name for path in (results[0][2].folder / "teachers").iterdir())
    assert teachers == ["asvr"], "objectives with the same tokenizers share one fit"
    told = json.loads((results[0][2].folder / "teachers" / "asvr" / "fit.json").read_text())["told"]
    assert {"semantic/error/1", "appearance/psnr", "appearance/perplexity/3", "semantic/guess/2"} <= told.keys()


def test_two_processes_equal_one(tmp_path: Path, shared_corpus: Path) -> None:
    lines = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        objectives = {"asvr": {**OPTIONS, "target": "both"}}
        path = write(folder, shared_corpus, objectives, max_steps=4, batch_size=5, precision=FP64)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
        command = [sys.executable, *launcher, "-m", "foveate", "train", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(folder / "installed"))
        assert done.returncode == 0, done.stderr[-3000:]
        text = (folder / "run" / "metrics.jsonl").read_text()
        lines.append([json.loads(line) for line in text.splitlines()])
    for line, other in zip(*lines, strict=True):
        for key in line.keys() - {"stage", "step_seconds", "data_wait"}:
            assert other[key] == pytest.approx(line[key], rel=1e-9, abs=1e-12), key


def test_a_stopped_run_resumes_bit_by_bit(
    tmp_path: Path, shared_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objectives = {"asvr": OPTIONS}
    unbroken, weights, _ = run(tmp_path / "a", shared_corpus, objectives, max_steps=4)
    loss = Asvr.loss

    def interrupting(self: Asvr, outputs: Any, *others: Any) -> LossTerm:
        if outputs._moment.step == 1:
            signal.raise_signal(signal.SIGINT)
        return loss(self, outputs, *others)

    monkeypatch.setattr(Asvr, "loss", interrupting)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", shared_corpus, objectives, max_steps=4)
    monkeypatch.undo()
    resumed, again, _ = run(tmp_path / "b", shared_corpus, objectives, max_steps=4, resume=True)
    for line, other in zip(unbroken, resumed, strict=True):
        assert {**line, "step_seconds": 0, "data_wait": 0} == {**other, "step_seconds": 0, "data_wait": 0}
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, shared_corpus: Path) -> tuple[Any, ...]:
    """A run on pictures without a word, both targets."""
    folder = tmp_path_factory.mktemp("bare")
    pictures = sorted((shared_corpus / "images").glob("*.png"))
    (folder / "data.json").write_text(json.dumps([{"id": path.stem, "image": path.name} for path in pictures]))
    data = [{"path": str(folder / "data.json"), "images": str(shared_corpus / "images")}]
    tokenizer = {**TOKENIZER, "fit": {**TOKENIZER["fit"], "images": 200}}
    objectives = {"asvr": {**OPTIONS, "tokenizer": tokenizer, "target": "both"}}
    changes = {"schedule": "constant", "warmup": 0, "train": {"projector": 3e-3, "llm": 3e-3, "asvr": 1e-2}}
    return run(folder / "made", shared_corpus, objectives, data=data, max_steps=25, **changes)


def test_image_only_data_alone_lowers_the_loss(bare: tuple[Any, ...]) -> None:
    lines = bare[0]
    assert all(line.get("loss/text", 0) == 0 for line in lines)
    for key in ("loss/asvr", "asvr/semantic/cross_entropy/1", "asvr/appearance/cross_entropy/1"):
        last = sum(line[key] for line in lines[-3:]) / 3
        assert last < 0.9 * lines[0][key], key
    told = json.loads((bare[2].folder / "teachers" / "asvr" / "fit.json").read_text())["told"]
    assert lines[-1]["asvr/semantic/top1/1"] > told["semantic/guess/1"]


def test_pictures_of_codes(bare: tuple[Any, ...], shared_corpus: Path) -> None:
    """Maps in the colours of the codes, targets and predictions; what the decoder makes; patches that share a code."""
    loaded = load_run(bare[2].folder)
    files = sorted((shared_corpus / "images").glob("*.png"))[:2]
    shown = loaded.show(files)["asvr"]
    titles = [picture.title for picture in shown]
    assert sum("semantic codes of depth 1" in title for title in titles) == 2
    assert sum("patches that share" in title for title in titles) == 2
    assert sum("decoded from its appearance codes" in title and "dB" in title for title in titles) == 2
    rules = loaded.gallery._rules(("asvr",))
    from foveate.data.packing import pack
    from foveate.data.sample import build_sample, load_pixels
    from foveate.types import Conversation, ImageRef

    sample = Conversation(files[0].name, (), (ImageRef(files[0]),))
    batch = pack([load_pixels(build_sample(sample, rules), rules)], rules.objectives)
    with torch.no_grad():
        seen = loaded.learner.look(batch)["asvr"]
    codes = seen.targets[0]["semantic"][:, 0].tolist()
    picture = next(entry.image for entry in shown if "semantic codes" in entry.title)
    side = picture.height // 4
    assert picture.size == (12 * side, 4 * side)
    for token, code in enumerate(codes):
        across, down = token % 4 * side + side // 2, token // 4 * side + side // 2
        assert picture.getpixel((4 * side + across, down)) == colour(code)
    assert picture.getpixel((8 * side + 1, 1)) == (128, 128, 128), "nothing predicts the first token of a sample"
    assert len({colour(code) for code in range(16384)}) > 16000


def test_the_models_own_pass_is_read_once(tmp_path: Path, shared_corpus: Path) -> None:
    """As many runs of the encoder with the objective as without; features of its pass, at the layer asked for."""
    counts = []
    for objectives in ({}, {"asvr": {**OPTIONS, "tokenizer": {**TOKENIZER, "layer": 1}}}):
        recipe = load_recipe(write(tmp_path / str(len(objectives)), shared_corpus, objectives))
        made = assemble(recipe)
        for name in objectives:
            teacher = made.learner.teachers.of(name)
            assert not list(teacher.parameters())
            teacher["semantic"].quantizer.codebooks.normal_()
        calls: list[int] = []
        made.lmm.encoder.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        data = made.data.stage(recipe.stages[0])
        for work in data.steps():
            for batch in work.batches:
                made.learner(batch)
            break
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_a_stage_that_trains_the_encoder_keeps_the_codes_of_before(tmp_path: Path, shared_corpus: Path) -> None:
    seen: list[float] = []
    objectives = {"asvr": OPTIONS}
    changes: dict[str, Any] = {"train": {"encoder": 1e-2, **TRAIN, "asvr": 1e-2}, "batch_size": 48, "max_steps": 3}
    loss = Asvr.loss

    def recording(self: Asvr, outputs: Any, targets: Any, state: Any) -> LossTerm:
        seen.append(float(targets.rows("semantic").double().mean()))
        return loss(self, outputs, targets, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Asvr, "loss", recording)
        run(tmp_path / "a", shared_corpus, objectives, **changes)
    assert seen[-1] == pytest.approx(seen[-2], abs=1e-6), "every step shows the whole corpus"


def test_wrong_options_are_told(tmp_path: Path, shared_corpus: Path) -> None:
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "head": ({"head": {"width": 10, "heads": 3}}, "3 do not divide 10"),
        "negative": ({"depth_weights": [1, -1, 1]}, "numbers from 0 on"),
        "reuse": ({"tokenizer": {**TOKENIZER, "reuse": True}}, "`reuse` is for `pretrained`"),
        "folder": ({"tokenizer": {"pretrained": "nowhere"}}, "no such file or folder"),
        "unknown": ({"target": "everything"}, "semantic"),
        "shift": ({"shift": 2}, "shift"),
    }
    for name, (options, told) in wrong.items():
        with pytest.raises(RecipeError, match=told):
            load_recipe(write(tmp_path / name, shared_corpus, {"asvr": {**OPTIONS, **options}}))
    with pytest.raises(FoveateError, match="depth_weights has 2 entries, and semantic codes have 3 depths"):
        assemble(load_recipe(write(tmp_path / "two", shared_corpus, {"asvr": {**OPTIONS, "depth_weights": [1, 1]}})))
    few = {**TOKENIZER, "codebook_size": 4096}
    with pytest.raises(FoveateError, match="rows for codebooks of 4096"):
        run(tmp_path / "few", shared_corpus, {"asvr": {**OPTIONS, "tokenizer": few}})


def test_the_papers_values_are_the_defaults() -> None:
    options = AsvrOptions()
    assert (options.target, options.shift, options.weight) == ("semantic", 1, 1.0)
    tokenizer, head = options.tokenizer, options.head
    assert (tokenizer.depth, tokenizer.codebook_size, tokenizer.shared) == (8, 16384, False)
    assert (head.type, head.width, head.layers, head.heads, head.expansion) == ("depth_transformer", 2048, 3, 16, 2.0)
    assert APPEARANCE["depth"] == 3 and options.appearance.layer == 0.22
