"""The command: exit statuses, one paragraph an error, plugins' commands, and answers without torch."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Qwen2ForCausalLM, SiglipVisionModel

import foveate.cli
from foveate import hookimpl
from foveate.plugins import Plugins, load_plugins
from tests.corpus import ENCODER, LLM, recipe_dict, write_corpus, write_recipe

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), samples=24)


def test_help_and_version_answer_without_importing_torch() -> None:
    code = (
        "import sys\n"
        "from foveate.cli import main\n"
        "for words in (['--help'], ['--version'], ['train', '--help'], ['plan', '--help'], ['nonsense']):\n"
        "    try:\n"
        "        main(words)\n"
        "    except SystemExit as leaving:\n"
        "        print('STATUS', leaving.code)\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'numpy', 'PIL', 'accelerate'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert [line for line in done.stdout.splitlines() if line.startswith(("STATUS", "HEAVY"))] == [
        "STATUS 0", "STATUS 0", "STATUS 0", "STATUS 0", "STATUS 2", "HEAVY []",
    ]  # fmt: skip
    assert foveate.__version__ in done.stdout and "No such command 'nonsense'" in done.stderr


def test_all_problems_of_a_recipe_in_one_answer_and_exit_status_2(
    foveate_command: Command, corpus: Path, tmp_path: Path
) -> None:
    content = recipe_dict(corpus, colour="red")
    content["stages"][0]["batch_size"] = "many"
    content["stages"][0]["train"] = {"projektor": 1e-3}
    status, out, err = foveate_command("train", write_recipe(tmp_path, content))
    assert status == 2 and out == "" and "Traceback" not in err
    assert err.startswith("error: 3 problems in the recipe\n") and len(err.splitlines()) == 4
    assert all(word in err for word in ("colour", "batch_size", "projektor"))


def test_what_nobody_foresaw_is_one_paragraph_and_a_traceback_only_with_debug(
    foveate_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        """Divides."""
        _ = 1 / 0

    with_command(monkeypatch, "divide", broken)
    status, out, err = foveate_command("divide")
    assert (status, out) == (1, "")
    assert err.startswith("error: ZeroDivisionError: division by zero. ") and len(err.splitlines()) == 1
    status, _, err = foveate_command("divide", "--debug")
    assert status == 1 and "Traceback" in err and "_ = 1 / 0" in err


def test_out_of_memory_says_which_knob_to_turn(foveate_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy() -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    with_command(monkeypatch, "eat", greedy)
    status, _, err = foveate_command("eat")
    assert status == 1 and "9 GiB" in err and "tokens_per_microbatch" in err and "not foreseen" not in err


def test_ctrl_c_is_one_line_and_130(foveate_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with_command(monkeypatch, "wait", lambda: signal.raise_signal(signal.SIGINT))
    assert foveate_command("wait") == (130, "", "stopped by Ctrl-C\n")


def with_command(monkeypatch: pytest.MonkeyPatch, name: str, target: Any, owner: str = "third-party (x)") -> Plugins:
    """The command with one more plugin, which registers `name`."""

    @hookimpl
    def register_commands(register: Any) -> None:
        register(name, target)

    plugins = load_plugins()
    plugin: Any = ModuleType("a_plugin")
    plugin.HOOK_API, plugin.register_commands = 1, register_commands
    plugins.add(plugin, owner)
    monkeypatch.setattr(foveate.cli, "installed_plugins", lambda: plugins)
    return plugins


def test_a_plugins_command_stands_beside_cores_own_and_reads_its_signature(
    foveate_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def paint(out: Path, count: int = 3) -> None:
        """Paints pictures."""
        sys.stdout.write(f"{out} x {count}")

    with_command(monkeypatch, "data paint", paint)
    status, out, _ = foveate_command("data", "--help")
    assert status == 0 and "Paints pictures." in out and "check" in out
    assert foveate_command("data", "paint", "here", "--count", 5)[:2] == (0, "here x 5")
    status, _, err = foveate_command("data", "paint", "here", "--count", "five")
    assert status == 2 and "Invalid value for '--count'" in err
    with_command(monkeypatch, "zoo animals feed", paint)
    assert foveate_command("zoo", "animals", "feed", "there")[:2] == (0, "there x 3")
    assert "animals" in foveate_command("zoo", "--help")[1]


def test_a_plugins_module_is_not_imported_for_help_and_a_broken_one_harms_nobody(
    foveate_command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "crashing_commands.py").write_text("raise RuntimeError('half installed')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with_command(monkeypatch, "crash", "crashing_commands:run", owner="third-party (crash)")
    status, out, _ = foveate_command("--help")
    assert status == 0 and "From third-party (crash)." in out
    status, _, err = foveate_command("crash")
    assert status == 2 and "command 'crash' of third-party (crash) cannot be imported" in err
    assert "half installed" in err
    with_command(monkeypatch, "data crash", "crashing_commands:run")
    status, out, _ = foveate_command("data", "--help")
    assert status == 0 and "Broken: command 'data crash'" in out


def stock(model: Any, options: Any) -> Any:
    """The same architecture from transformers alone."""
    fields = dict(options["config"])
    return model(AutoConfig.for_model(fields.pop("model_type"), **fields))


def test_plan_counts_what_transformers_counts(foveate_command: Command, corpus: Path, tmp_path: Path) -> None:
    content = recipe_dict(corpus, precision="bf16")
    second = {**content["stages"][0], "name": "second", "batch_size": 5, "epochs": 1.5}
    del second["max_steps"]
    second["train"] = {"llm": {"lr": 2e-4, "lora": {"r": 4}}, "encoder": {"lr": 1e-4, "layers": "-1:"}}
    content["stages"][0]["train"] = {"projector": 1e-3}
    content["stages"].append(second)
    path = write_recipe(tmp_path, content)
    status, out, _ = foveate_command("plan", path, "--json")
    plan = json.loads(out)
    assert status == 0 and not (corpus / "run").exists()

    encoder = stock(SiglipVisionModel, ENCODER)
    encoder_size = sum(p.numel() for name, p in encoder.named_parameters() if "post_layernorm" not in name)
    block = sum(p.numel() for name, p in encoder.named_parameters() if "layers.1." in name)
    llm = stock(Qwen2ForCausalLM, LLM)
    bodies = sum(p.numel() for name, p in llm.named_parameters() if "embed" not in name and "lm_head" not in name)
    first, later = plan["stages"]
    rows = {row["part"]: row for row in first["parts"]}
    assert rows["encoder"] == {
        "part": "encoder", "how": "frozen", "parameters": encoder_size, "trained": 0, "lr": None, "dtype": "bf16",
    }  # fmt: skip
    assert rows["projector"]["trained"] == (24 * 32 + 32) + (32 * 32 + 32)
    assert (rows["projector"]["dtype"], rows["projector"]["lr"]) == ("fp32", 1e-3)
    vocabulary = rows["llm"]["parameters"] - bodies
    assert vocabulary % 32 == 0 and 260 * 32 < vocabulary <= 2 * 400 * 32
    rows = {row["part"]: row for row in later["parts"]}
    assert rows["encoder"]["trained"] == block and rows["encoder"]["how"] == "blocks -1:"
    assert rows["projector"]["how"] == "frozen"
    linear = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]  # q k v o gate up down
    assert rows["llm"]["trained"] == 2 * sum(4 * (a + b) for a, b in linear)
    assert (rows["llm"]["how"], rows["llm"]["dtype"]) == ("LoRA r=4", "bf16, adapters fp32")

    assert plan["visual_tokens"] == 16 and plan["image_size"] == 16
    assert (first["samples"], first["steps"], first["epochs"]) == (24, 4, 2.0)
    assert later["steps"] == 8  # an epoch of 24 is 5 steps of at most 5; one and a half are 7.5
    assert first["tokens_per_step"] > 12 * 16 * 0.8
    assert any("4 of the 24 samples looked at have no text" in warning for warning in plan["warnings"])

    status, out, _ = foveate_command("plan", path)
    assert status == 0 and "LoRA r=4" in out and "4 steps of 12 samples, 2 epochs of 24" in out


def test_plan_says_what_cannot_be_a_stock_llava(foveate_command: Command, corpus: Path, tmp_path: Path) -> None:
    content = recipe_dict(corpus)
    content["model"] = {**content["model"], "projector": {"type": "pixel_shuffle_mlp", "normalize": True}}
    status, out, _ = foveate_command("plan", write_recipe(tmp_path, content))
    assert status == 0 and "4 visual tokens" in out
    assert "no stock Llava" in out and "pixel_shuffle_mlp" in out and "normalized" in out


def test_plan_needs_neither_tokenizer_nor_weights(foveate_command: Command, corpus: Path, tmp_path: Path) -> None:
    content = recipe_dict(corpus)
    fields = {**LLM["config"], "vocab_size": 1000, "tie_word_embeddings": False}  # type: ignore[dict-item]
    (tmp_path / "empty").mkdir()
    content["model"] = {**content["model"], "llm": {"config": fields, "tokenizer": "empty"}}
    status, out, _ = foveate_command("plan", write_recipe(tmp_path, content), "--json")
    plan = json.loads(out)
    assert status == 0 and plan["stages"][0]["tokens_per_step"] is None and plan["stages"][0]["steps"] == 4
    assert any(warning.startswith("tokens are not estimated: ") for warning in plan["warnings"])
    size = sum(p.numel() for p in stock(Qwen2ForCausalLM, {"config": fields}).parameters())
    assert {row["part"]: row["parameters"] for row in plan["stages"][0]["parts"]}["llm"] == size


def test_plan_without_data_shows_the_model(foveate_command: Command, corpus: Path, tmp_path: Path) -> None:
    """The same parts; of the data nothing, wherever they are. What is wrong with the rest is still an error."""
    content = recipe_dict(corpus)
    content["model"] = {**content["model"], "llm": {"config": {**LLM["config"], "vocab_size": 500}}}  # type: ignore[dict-item]
    stage = content["stages"][0]
    rest = {key: value for key, value in stage.items() if key != "max_steps"}
    content["stages"] = [stage, {**rest, "name": "gone", "epochs": 1, "data": [{"path": "gone.json", "images": "no/"}]}]
    path = write_recipe(tmp_path, content)
    assert foveate_command("plan", path)[0] == 2
    status, out, _ = foveate_command("plan", path, "--no-data", "--json")
    plan = json.loads(out)
    assert status == 0 and [stage["steps"] for stage in plan["stages"]] == [4, None]
    assert all(stage["samples"] is stage["epochs"] is stage["tokens_per_step"] is None for stage in plan["stages"])
    assert plan["stages"][0]["parts"][0]["parameters"] > 0
    assert any("vocabulary is that of the LLM's config" in warning for warning in plan["warnings"])
    assert "gone: steps of 12 samples; the data were not read" in foveate_command("plan", path, "--no-data")[1]
    assert foveate_command("plan", path, "--no-data", "--set", "stages.gone.batch_size=0")[0] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trackers": ["wandb", "tensorbord"]}, ["'tensorbord'; did you mean 'tensorboard'?"]),
        ({"train": {"llm": {"lr": 1e-3, "layers": "5:9"}}}, ["`layers: 5:9` is none of the 2 blocks"]),
    ],
)
def test_plan_finds_what_training_would_stop_at(
    foveate_command: Command, corpus: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    content = recipe_dict(corpus, **{key: value for key, value in changes.items() if key != "train"})
    content["stages"][0] |= {key: value for key, value in changes.items() if key == "train"}
    status, _, err = foveate_command("plan", write_recipe(tmp_path, content))
    assert status == 2 and all(word in err for word in words), err


def test_data_check_of_a_file_lists_every_defect(foveate_command: Command, corpus: Path, tmp_path: Path) -> None:
    assert foveate_command("data", "check", corpus / "data.json", "--images", corpus / "images")[0] == 0
    rows = json.loads((corpus / "data.json").read_text())
    rows[0]["image"] = "missing.png"
    rows[1]["conversations"][0]["value"] = "no placeholder"
    rows[2]["conversations"][1]["value"] = "  "
    cut = (corpus / "images" / rows[6]["image"]).read_bytes()[:60]
    (tmp_path / "images").symlink_to(corpus / "images")
    (corpus / "images" / "cut.png").write_bytes(cut)
    rows[6]["image"] = "cut.png"
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    words = ("data", "check", tmp_path / "bad.json", "--images", tmp_path / "images")
    status, out, _ = foveate_command(*words)
    assert status == 2
    for sample, kind in (("one0", "image"), ("one1", "placeholders"), ("one2", "answer"), ("one6", "image")):
        assert f"sample {sample}: {kind}: " in out
    status, out, _ = foveate_command(*words, "--json")
    told = json.loads(out)["bad.json"]
    assert status == 2 and told["samples"] == 24
    assert told["counts"] == {"image": 2, "placeholders": 1, "answer": 1}


def test_data_check_of_a_recipe_reads_all_of_its_data(foveate_command: Command, corpus: Path, tmp_path: Path) -> None:
    content = recipe_dict(corpus)
    content["stages"][0]["validate"] = {"data": content["stages"][0]["data"]}
    path = write_recipe(tmp_path, content)
    status, out, _ = foveate_command("data", "check", path, "--json")
    told = json.loads(out)
    assert status == 0 and list(told) == ["only", "only (held out)"]
    assert told["only"]["statistics"]["tokens"]["count"] == 24
    status, out, _ = foveate_command("data", "check", path, "--set", "stages.0.max_length=20")
    assert status == 2 and "long: has " in out
    assert foveate_command("data", "check", path, "--images", corpus)[0] == 2
    assert foveate_command("data", "check", corpus / "data.json", "--max-length", 9)[0] == 2
    status, _, err = foveate_command("data", "check", corpus / "nothing.json")
    assert status == 2 and "no such file or folder" in err


def test_training_from_the_command_line_and_a_second_time(
    foveate_command: Command, corpus: Path, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, recipe_dict(corpus, output=str(tmp_path / "run")))
    words = ("train", path, "--set", "stages.0.max_steps=2", "--set", "stages.0.train={projector: 1e-3}")
    status, _, err = foveate_command(*words)
    assert status == 0 and "only 2/2  loss " in err and str(tmp_path / "run") in err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert set(lines[0]) >= {"stage", "loss", "loss/text", "lr/projector", "grad_norm", "samples", "images", "tokens"}
    status, _, err = foveate_command(*words)
    assert status == 2 and "holds a run already" in err and "--resume" in err
    assert foveate_command(*words, "--resume")[0] == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_finished_run_names_a_picture_of_each_objective(
    foveate_command: Command, corpus: Path, tmp_path: Path
) -> None:
    objectives = {
        name: {"type": "ross", "variant": "regress_pixels", "teacher": {"type": "patches", "patch_px": 8}}
        for name in ("see", "see-2")
    }
    content = recipe_dict(corpus, output=str(tmp_path / "run"), objectives=objectives)
    content["stages"][0] |= {"max_steps": 1, "train": dict.fromkeys(["projector", *objectives], 1e-3)}
    status, _, err = foveate_command("train", write_recipe(tmp_path, content))
    assert status == 0, err
    named = dict(re.findall(r"^what (\S+) has learned: (.*)$", err, re.M))
    assert list(named) == ["see", "see-2"]
    for name, path in named.items():
        assert Path(path).is_file() and Path(path).name.startswith(f"{name}-01-")


def test_sigterm_to_every_process_of_a_job_leaves_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    """As schedulers send it: to the loader workers too, which go on until the step is done."""
    content = recipe_dict(corpus, output=str(tmp_path / "run"), hardware={"workers": 2}, log_every=1)
    content["stages"][0]["max_steps"] = 500
    command = [sys.executable, "-m", "foveate", "train", str(write_recipe(tmp_path, content))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "only 3/500" not in process.stderr.readline():
            assert process.poll() is None
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(workers) >= 2
        for pid in (*map(int, workers), process.pid):
            os.kill(pid, signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume goes on" in err, err
    saved = sorted(int(path.name[5:]) for path in (tmp_path / "run" / "only" / "checkpoints").glob("step-*"))
    assert saved[-1] >= 3
