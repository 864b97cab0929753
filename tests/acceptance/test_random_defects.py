"""Random defects of recipes and conversation files: every one ends in success or in one clear error, none in a hang.

Recipes and data that work get up to four defects each and go through `foveate plan`, `foveate data check` and, where
the plan shows that they are tiny, `foveate train`. The default budget is 100 recipes and 100 conversation files, the
same every time; new ones by the thousand: `DEFECTS=5000 pytest -m slow tests/acceptance/test_random_defects.py`.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import io
import json
import os
import re
import shutil
import signal
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import foveate.cli
from foveate.plugins import installed_plugins
from tests import objectives_plugin
from tests.corpus import recipe_dict, write_corpus

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.yaml"
SECONDS = 60
"""Of the processor: no command may take longer."""
CORPUS, SAMPLES = "CORPUS", 12
"""Where recipes find the corpus, beside them; and the rows of it."""

FEW = settings(
    max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
MANY = settings(FEW, max_examples=int(os.environ.get("DEFECTS", "2000")), derandomize=False, print_blob=True)

Json = Any
Files = dict[str, bytes | None]
"""Content by name; None is a folder of that name."""


# Running and judging


@dataclass
class Outcome:
    """What a command did."""

    words: list[str]
    status: int
    out: str
    err: str


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """More seconds of the processor are an error; where none can be raised, all stacks are shown and all ends."""

    def late(*_: object) -> None:
        raise RuntimeError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    faulthandler.dump_traceback_later(10 * seconds, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)


def run(*words: object) -> Outcome:
    """Runs the command in this process, as `python -m foveate` does."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    spoken, status = [str(word) for word in words], -1
    with limited(SECONDS), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            foveate.cli.main(spoken)
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else -1
    said = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return Outcome(spoken, status, *said)


def judge(outcome: Outcome, files: Files) -> None:
    """Success; or a table of defects; or one error for people, which names the file and, where it can, the line."""
    words, status = outcome.words, outcome.status
    shown = f"foveate {' '.join(words)[:300]!r} left with {status}\n{outcome.out[-1500:]}\n{outcome.err[-3000:]}"
    assert "Traceback" not in outcome.out + outcome.err and "not foreseen" not in outcome.err, shown
    if status == 0:
        return
    if words[0] == "data" and re.search(r"defects: \d", outcome.out):
        assert status == 2, shown
        return
    assert status in (1, 2) and outcome.err.count("error: ") >= 1, shown
    message = outcome.err[outcome.err.index("error: ") + 7 :].strip()
    assert 15 < len(message) < 6000, shown
    assert status == 2 or "stage " in message or "out of memory" in message, shown  # 1: the training itself failed
    heading, _, problems = message.partition("\n")
    if heading.endswith("in the recipe"):
        names = "|".join(map(re.escape, [*files, "registry.yaml"]))
        together = r"stage [^:]+|trackers|objectives\.[^:]+"  # what shows only when the parts meet
        for problem in problems.splitlines():
            assert re.match(rf"(.*({names})(:\d+:\d+)?|--set .*|{together}): ", problem), (problem, shown)


def tiny(plan: Outcome) -> bool:
    """Whether what `foveate plan --json` shows can be trained here in a second or two."""
    if plan.status:
        return False
    shown = json.loads(plan.out)
    largest = max(part["parameters"] for stage in shown["stages"] for part in stage["parts"])
    tokens = max(stage["tokens_per_step"] or 0 for stage in shown["stages"])
    steps = sum(stage["steps"] for stage in shown["stages"])
    return largest < 500_000 and steps <= 6 and tokens < 20_000 and shown["image_size"] <= 128


@dataclass
class Trials:
    """Gives each example a current folder of its own, and counts what became of the examples."""

    root: Path
    corpus: Path
    every: int
    numbers: Iterator[int] = field(default_factory=count)
    outcomes: Counter[str] = field(default_factory=Counter)
    sound: int = 0

    def folder(self, files: Files) -> Path:
        """A new one; the recipes' relative paths that lead out of it stay inside of `root`."""
        shutil.rmtree(self.root, ignore_errors=True)
        here = self.root / str(next(self.numbers)) / "a"
        here.mkdir(parents=True)
        (here / CORPUS).symlink_to(self.corpus)
        for name, content in files.items():
            (here / name).mkdir() if content is None else (here / name).write_bytes(content)
        os.chdir(here)
        return here

    def try_recipe(self, files: Files, words: list[str]) -> None:
        """Plan, check, and, of every so many that are tiny enough, train."""
        self.judged(run("data", "check", "recipe.yaml", *words), files)
        plan = self.judged(run("plan", "recipe.yaml", "--json", *words), files)
        if tiny(plan):
            self.sound += 1
            if self.sound % self.every == 0:
                self.judged(run("train", "recipe.yaml", *words, "--set", "output=run"), files)

    def judged(self, outcome: Outcome, files: Files) -> Outcome:
        judge(outcome, files)
        self.outcomes[f"{outcome.words[0]} {outcome.status}"] += 1
        return outcome


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A sound corpus and odd pictures beside its own; the objectives of tests are installed as long as it is there."""
    installed_plugins.cache_clear()
    installed_plugins().add(objectives_plugin, "test-objectives (tests)")
    folder = write_corpus(tmp_path_factory.mktemp("random") / "corpus", SAMPLES)
    write_odd_pictures(folder / "images")
    yield folder
    installed_plugins.cache_clear()


@pytest.fixture
def trials(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Trials]:
    """Makes trials that train every so many of the sound examples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lambda every: Trials(tmp_path / "trials", corpus, every)


# Recipes

FRAGMENTS = """
~ no yes true 0 -1 1 2 0.5 -0.0 1e-400 1e999 .inf -.inf .nan nan 1_000 0x1F 0o17 007 +1 1e3 12:30 2024-01-01 ١٢٣
4e 9223372036854775808 123456789012345678901234567890 1000000000 3000000000 1e300 '3' '' '·' "\\0" "\\uD800"
"\\UFFFFFFFF" "a\\0b" "\\e[31m" x é \u202e 🦊 a/b .. ../../.. . / /dev/null /dev/zero /proc/self/mem ~nobody/x
~/x [] {} [1] [[]] [[1,2],3] {a:·1} {type:·} {type:·hf} {type:·llava} {preset:·}
{preset:·[a]} {type:·{a:·1}} [~] [a,a] {?·[a]:·b} {<<:·{a:·1}}
{a:·1,·a:·2} !!binary·aGk= !!python/object:os.x·{} !x·1 !!str·5 !!int·5
!!set·{a} !!null·x &a·1 *none &a·[*a] &b·{b:·*b} << * & % @ ` noisy mlp hf chat
plain first only clip-vit-large-patch14-336 encoder -4: 0:0 9: 5:2 -1: all-linear fp64 bf16 error skip cut
recipe.yaml {config:·{model_type:·qwen2}} {path:·~} tensorboard [tensorboard] [digits]
{vocab_size:·3} CORPUS CORPUS/images CORPUS/data.json linear pixel_shuffle_mlp
""".replace("\\e", "\\x1b").split()  # fmt: skip
FRAGMENTS = [fragment.replace("·", " ") for fragment in FRAGMENTS]
FRAGMENTS += ["", "9" * 5000, "x" * 300, "0." + "1" * 5000, "|\n    text\n", ">-\n    text\n", "[" * 90 + "]" * 90]
"""What stands in the place of a value, as it is written in YAML."""

NEAR: dict[type, list[Any]] = {
    bool: [True, False], int: [0, 1, 2, 3, 4, 5, 7, 12, 16, 17, 24, 32, 64, 100, 1000, 4096, -1, -2, -9],
    float: [0.0, 1e-12, 1e-3, 0.5, 0.999, 1.0, 1.5, 100.0, 1e6, 1e30, -1.0],
    str: ["chat", "plain", "chatml", "llama3", "pad", "resize", "crop", "cut", "drop", "error", "skip",
          "fp64", "bf16", "fp32", "constant", "cosine", "mlp", "linear", "pixel_shuffle_mlp", "noisy", "queries", "q",
          "masked", "answers", "hf", "llava", "only", "first", "qwen2", "llama", "gpt2", "clip_vision_model", "dinov2",
          "siglip_vision_model", "q_proj", "all-linear", "-1:", ":1", "questions", "captions", f"{CORPUS}/data.json"],
}  # fmt: skip
"""What stands in the place of a value and may well be meant."""

KEYS = ["x", "''", "'a b'", "<<", "1", "null", "? [a]", "? {a: 1}", '"\\0"', '"\\uD800"', "type", "preset", "extends"]
KEYS += ["lr", "lora", "layers", "path", "weight", "config", "from", "train", "data", "max_steps", "epochs", "frozen"]
JUNK = [*"\t\0{}[],#'\"&*!%@|>?-\n\r\x0b\x85\u2028\ufeff\ud7ff\uffffé ", ": ", "- ", "\r\n"]
TOPS = ["\ufeff", "%YAML 1.2\n---", "%YAML 9.9\n---", "%TAG ! x\n---", "%%", "---", "...", "- a", "x", "&a", "!!map"]
ENDS = ["---\na: 1", "...", "...\nx", "  x", "\ufeff", "*x", "seed: 1", "extends: recipe.yaml", "extends: gone.yaml"]
DEEP = ["[" * 300, "[" * 300, "[" * 20_000, "[" * 400 + "]" * 400, "{a: " * 2000, "- " * 900]
BOMB = "bomb: &a0 [x, x]\n" + "".join(f"bomb{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
OVERRIDES = [
    "=", "", "a", "seed=1", "seed", "stages.0.batch_size=3", "stages.7.batch_size=3", "stages.-1.name=a", "stages=",
    "stages.0=~", "stages.x.y=1", "model.encoder.config.image_size=no", "a..b=1", ".=1", "stages.0.train.llm.lr=fast",
    "model=[[[", "seed='", "name=a=b", "objectives.q.weight=.nan", "stages.٣.name=x", "stages.0.data.0.path=gone.json",
    "a." * 3000 + "a=1", "seed=" + "[" * 600, "stages.²=1", "seed=\ud800", "\ud800=1", "seed=\0", "extends=x",
]  # fmt: skip
JUNK_FILES: list[bytes | None] = [
    None, b"", b"\n", b"# nothing\n", b"null\n", b"[]\n", b"{}\n", b"3\n", b"text", b"\x00\x01\x02\xff",
    b"\xff\xfe\x00a", bytes(range(256)), b"\x89PNG\r\n\x1a\n", b"a: \xe9\n", b"-", b"a: b: c", b"\xef\xbb\xbfseed: 1\n",
    b"name: x\nmodel: {}\nstages: []\n", b"? ? ? ?", b"\xed\xa0\x80: 1\n",
]  # fmt: skip
REGISTRIES = [
    b"encoders: {a: {type: hf, config: 3}}\n", b"encoders: {a: 3}\n", b"colours: {}\n", b"llms: {a: {type: ~}}\n",
    b"encoders: {clip-vit-large-patch14-336: {type: hf}}\n", b"encoders: {a: {type: [1]}, 1: {type: hf}}\n",
    b"encoders: {a: {distribution: 1, summary: 2, install: 3}}\n", b"encoders: *a\n", b"encoders: {a: {type: b}}\n",
]  # fmt: skip
PARENTS = ["base.yaml", "recipe.yaml", "base", ".", "..", "''", "3", "[base.yaml]", "~", '"a\\0b"', "gone/base.yaml"]
PARENTS += ["x" * 300, "~nobody/x", "/", "{a: 1}", "/dev/null", "recipe.yaml/x"]
ABOVE = ["extends: recipe.yaml\n", "extends: base.yaml\n", "3", "[]", "", "stages: 3\nmodel: []\n", "a: [", "name: x\n"]
BELOW = ["", "seed: 4\n", "stages: ~\n", "name: a\n", "model: {llm: ~}\n", "stages: {a: 1}\n", "objectives: 3\n"]


def sound_recipes() -> list[Json]:
    """Recipes without a defect: all sections, several stages, adapters, objectives, held-out data; an example too."""
    source = {"path": f"{CORPUS}/data.json", "images": f"{CORPUS}/images"}
    base = recipe_dict(Path(CORPUS), output="run", hardware={"workers": 0, "threads": 1})
    only = {**base["stages"][0], "data": [source], "max_steps": 2, "batch_size": 6}
    first = {
        **only, "name": "first", "train": {"projector": {"lr": 1e-3, "weight_decay": 0.1}, "q": 1e-3},
        "objectives": ["q"], "schedule": "linear", "warmup": 1, "betas": [0.9, 0.95], "template": "plain",
        "validate": {"data": [{**source, "max_samples": 4}], "every": 2}, "max_length": 512, "on_long_sample": "cut",
        "on_bad_sample": "skip", "max_bad_rate": 0.5, "geometry": "crop", "clip": None, "check_samples": 4,
    }  # fmt: skip
    second = {
        **only, "name": "second", "max_steps": 1, "data": [{**source, "weight": 1.5, "objectives": ["noisy"]}],
        "train": {"llm": {"lr": 1e-3, "lora": {"r": 2, "targets": ["q_proj"]}}, "noisy": 1e-3, "q": 1e-4,
                  "encoder": {"lr": 1e-4, "layers": "-1:"}},
    }  # fmt: skip
    heads = {"noisy": {}, "q": {"type": "queries", "tokens": 2, "fit": True, "weight": 0.5, "probability": 0.9}}
    many = {**base, "objectives": heads, "stages": [first, second], "precision": {"compute": "fp32"}, "seed": 3}
    many |= {"evaluate": {"data": [source], "metrics": ["answers"]}, "checkpoint_every": 1, "log_every": 1}
    example = yaml.safe_load(EXAMPLE.read_text())
    for entry in [*example["stages"], example["evaluate"]]:
        for data in entry["data"]:
            data["size"] = 24  # as many scenes as here is time for
    return [{**base, "stages": [only]}, many, many, example]


SOUND_RECIPES = sound_recipes()


def spots(value: Json) -> Iterator[tuple[Json, Any]]:
    """Every mapping with each of its keys, every list with each of its indices."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from spots(value[key])


@st.composite
def recipes(draw: Any) -> tuple[Files, list[str]]:
    """The files of a recipe with one to four defects, and words of the command."""

    def one(*of: Any) -> Any:
        return draw(st.sampled_from(of))

    kind = one("file", *["extends"] * 3, *["registry"] * 2, *["override"] * 3, *["plain"] * 20)
    if kind == "file":
        return {"recipe.yaml": one(*JUNK_FILES)}, []
    root, fragments = copy.deepcopy(one(*SOUND_RECIPES)), list[str]()
    if kind == "registry":
        root["model"]["encoder"] = one("a", "a", root["model"]["encoder"])
    for _ in range(one(1, 1, 1, 2, 3) if kind == "plain" else one(0, 0, 1, 2)):
        spoil_values(one, root, fragments)
    text = yaml.safe_dump(root, sort_keys=False, allow_unicode=True, width=10_000)
    for number, fragment in enumerate(fragments):
        text = re.sub(rf"['\"]?@@{number}@@['\"]?", lambda _, fragment=fragment: fragment, text)
    if one(True, *[False] * 6):
        text = spoil_text(draw, text)
    files: Files = {"recipe.yaml": text.encode()}
    if kind == "extends":
        above, below = one(text, text, *ABOVE), one(*BELOW) + f"extends: {one(*PARENTS)}\n"
        files = {"recipe.yaml": below.encode(), "base.yaml": above.encode()}
    elif kind == "registry":
        files["registry.yaml"] = one(*JUNK_FILES, *REGISTRIES)
    given_words = [one(*OVERRIDES) for _ in range(one(1, 2) if kind == "override" else 0)]
    return files, [word for text in given_words for word in ("--set", text)]


def spoil_values(one: Callable[..., Any], root: Json, fragments: list[str]) -> None:
    """One defect of a tree of values, in place. What only YAML can say goes to `fragments`; its mark, into the tree."""

    def mark(*of: str) -> str:
        fragments.append(one(*of))
        return f"@@{len(fragments) - 1}@@"

    found = list(spots(root))
    owner, key = one(*found) if found else ({}, "")
    rare = ("drop", "rename", "twice", "list", "mapping", "inner", "move", "extra", "more")
    kind = one(*["near"] * 9, *["replace"] * 5, *rare)
    if kind == "extra" and isinstance(owner, dict):
        owner[mark(*KEYS)] = mark(*FRAGMENTS)
    elif kind == "more" and isinstance(owner, list):
        owner += copy.deepcopy(owner)
    elif key == "":
        return
    elif kind == "near" and type(owner[key]) in NEAR:
        owner[key] = one(*NEAR[type(owner[key])])
    elif kind == "drop":
        del owner[key]
    elif kind == "rename" and isinstance(owner, dict):
        owner[one(key[:-1], key + "s", key.upper(), key[::-1], f"{key}.x", "type", "1", "é" * 9)] = owner.pop(key)
    elif kind == "twice" and isinstance(owner, dict):
        owner[mark(key)] = copy.deepcopy(owner[key])
    elif kind in ("list", "mapping"):
        owner[key] = [owner[key]] if kind == "list" else {one("x", str(key)): owner[key]}
    elif kind == "inner" and isinstance(owner[key], dict | list) and owner[key]:
        owner[key] = next(iter(owner[key].values() if isinstance(owner[key], dict) else owner[key]))
    elif kind == "move":
        other, place = one(*found)
        owner[key] = copy.deepcopy(other[place])
    else:
        owner[key] = mark(*FRAGMENTS)


def spoil_text(draw: Any, text: str) -> str:
    """One defect of the text of a file."""
    lines, kind = text.split("\n"), draw(st.sampled_from(["cut", "in", "in", "tab", "crlf", "lose", "again", "far",
                                                         "deep", "bomb", "top", "end"]))  # fmt: skip
    at, line = draw(st.integers(0, len(text))), draw(st.integers(0, len(lines) - 1))
    if kind == "cut":
        return text[:at]
    if kind == "in":
        return text[:at] + draw(st.sampled_from(JUNK)) + text[at:]
    if kind == "crlf":
        return text.replace("\n", "\r\n")
    if kind == "lose":
        del lines[line]
    elif kind in ("tab", "far"):
        lines[line] = ("\t" if kind == "tab" else draw(st.sampled_from([" ", "  ", "       "]))) + lines[line]
    elif kind == "top":
        lines.insert(0, draw(st.sampled_from(TOPS)))
    else:
        more = {"again": [lines[line]], "deep": [f"deep: {deep}" for deep in DEEP], "bomb": [BOMB], "end": ENDS}[kind]
        lines.append(draw(st.sampled_from(more)))
    return "\n".join(lines)


def check_recipes(trials: Trials, chosen: settings) -> None:
    @chosen
    @given(recipes())
    def works(case: tuple[Files, list[str]]) -> None:
        files, words = case
        trials.folder(files)
        trials.try_recipe(files, words)

    works()
    told = trials.outcomes
    assert told["plan 0"] > chosen.max_examples // 20 and told["plan 2"] > chosen.max_examples // 4, told
    assert told["train 0"], told


def test_recipes_with_random_defects(trials: Callable[[int], Trials]) -> None:
    check_recipes(trials(4), FEW)


@pytest.mark.slow
def test_many_recipes_with_random_defects(trials: Callable[[int], Trials]) -> None:
    check_recipes(trials(2), MANY)


# Conversation files

PATHS = """
0.png 2.png gone.png images/0.png ../data.json ../images/0.png /etc/hostname a\0b 0.png/ 0.png/x ~ ~/x . ..
./0.png sub/../0.png http://x/y.png data:image/png;base64,aGk= C:\\x.png 0.PNG é.png \ud800.png \ud800
truncated.png empty.png text.png huge.png flat.png bomb.png crc.png animated.gif cmyk.jpg deep.png deep.tif
palette.png grey-alpha.png bit.png float.tif turned.jpg one.png long.png longer.png thin.png wrong-name.jpg
out.png inside.png loop.png dangling.png folder.png pipe.png chunk.png vector.svg half.gif cut.webp ycc.tif
premade.ico note.pdf post.eps lab.tif
""".split()  # noqa: SIM905  (a table)
PATHS += ["", "0.png\n", " 0.png", "x" * 300 + ".png", "x/" * 3000, "0.png" + "\0"]
TEXTS = [
    "", " ", "\n", "<image>", "<image><image>", "<image>" * 200, "<image", "<IMAGE>", "a<image>b", "yes", "\0",
    "\ud800", "\udc00\ud800", "<|im_end|>", "<|im_start|>assistant\n", "<pad>", "</s>", "{{ 7 * 7 }}",
    "{% generation %}", "\ufdd1", "\ufdd1<image>\ufdd1", "é\u0301\u202e🦊", "\r\n", "word " * 3000, "x" * 1_000_000,
    " " * 100_000,
]  # fmt: skip
ODD = [None, 0, 3, -1, True, False, 1.5, float("nan"), float("inf"), 10**30, [], {}, [[]], [[[1]]], {"a": {"b": []}}]
NAMES = ["id", "image", "images", "roles", "target_images", "conversations", "messages", "from", "value", "role"]
NAMES += ["content", "meta", "type", "conversation", "Image", "", "human"]
ROLES = ["human", "gpt", "user", "assistant", "system", "tool", "Human", "", "input", "target"]
LITERALS = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "0x1", "'a'", "tru", "[" * 100_000, '{"a":' * 100_000,
            "[" * 900 + "]" * 900, '"\\ud800"', '"\\u12"', '"\t"', "\x00", "// a", "[1,]", "{,}"]  # fmt: skip
WRAPS: list[Callable[[bytes], bytes]] = [
    lambda content: b"\xef\xbb\xbf" + content, lambda content: content.replace(b"\n", b"\r\n"),
    lambda content: content.decode("utf-8", "replace").encode("utf-16"), lambda content: b"\n\n  " + content + b"\n \n",
    lambda content: b"[" + content + b"]", lambda content: content + content, lambda content: content + b",",
    lambda content: content + b"]", lambda content: b'{"data": ' + content + b"}", zlib.compress,
    lambda content: content + b"\xff\xfe", lambda content: b" " * 5000 + content,
    lambda content: content + b"\x00" * 512,
]  # fmt: skip
SMALL_FILES: list[bytes | None] = [
    None, b"", b" ", b"[]", b"{}", b"null", b'""', b"3", b"[", b"]", b"[null]", b"[[]]", b"[{}]", b"{}\n{}\n",
    b"[1, 2]", b"\xff", b"\x00", b'{"conversations": []}\n',
]  # fmt: skip


def png(width: int, height: int, body: bytes, *chunks: bytes, depth: int = 8) -> bytes:
    """A PNG file whose header says anything."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def write_odd_pictures(folder: Path) -> None:
    """One of each kind of file that `PATHS` names."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    photo, sound = Image.fromarray(pixels), (folder / "0.png").read_bytes()
    files = {
        "truncated.png": sound[: len(sound) // 2], "empty.png": b"", "text.png": b"not a picture",
        "flat.png": png(0, 9, b""), "huge.png": png(60_000, 60_000, b""),
        "bomb.png": png(10_001, 10_000, b"\0" * 10_000_000),
        "crc.png": sound[:-20] + b"\0" + sound[-19:], "vector.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "note.pdf": b"%PDF-1.4\n", "post.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "chunk.png": png(2, 2, b"\0" * 14, struct.pack(">I", 2**31 - 1) + b"tEXt"),
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    photo.save(folder / "animated.gif", save_all=True, append_images=[photo.rotate(90), photo.rotate(180)])
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray((np.arange(600).reshape(20, 30) * 100).astype(np.uint16)).save(folder / "deep.png")
    Image.fromarray((np.arange(600).reshape(20, 30) * 100).astype(np.int32)).save(folder / "deep.tif")
    Image.fromarray(np.full((20, 30), np.nan, dtype=np.float32)).save(folder / "float.tif")
    photo.convert("P").save(folder / "palette.png", transparency=3)
    photo.convert("LA").save(folder / "grey-alpha.png")
    photo.convert("1").save(folder / "bit.png")
    photo.convert("YCbCr").save(folder / "ycc.tif")
    photo.convert("LAB").save(folder / "lab.tif")
    photo.save(folder / "premade.ico", sizes=[(16, 16)])
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(folder / "turned.jpg", exif=exif)
    for name, size in (("one", (1, 1)), ("long", (150, 1)), ("longer", (1, 5000)), ("thin", (60_000, 1))):
        Image.new("RGB", size, (9, 99, 199)).save(folder / f"{name}.png")
    photo.save(folder / "wrong-name.jpg", format="PNG")
    (folder / "half.gif").write_bytes((folder / "animated.gif").read_bytes()[:400])
    photo.save(folder / "cut.webp", lossless=True)
    (folder / "cut.webp").write_bytes((folder / "cut.webp").read_bytes()[:-200])
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    for name, target in (("out", "/etc/hostname"), ("inside", "0.png"), ("loop", "loop.png"), ("dangling", "gone.png")):
        (folder / f"{name}.png").symlink_to(target)


@st.composite
def conversation_files(draw: Any) -> bytes | None:
    """A LLaVA file with one to four defects."""

    def one(*of: Any) -> Any:
        return draw(st.sampled_from(of))

    if one(*[False] * 14, True):
        return one(*SMALL_FILES)  # type: ignore[no-any-return]
    rows, literals = copy.deepcopy(one(*SOUND_ROWS)), list[str]()
    for _ in range(one(1, 1, 2, 3)):
        spoil_rows(one, rows, literals)
    listed = rows if isinstance(rows, list) else [rows]
    lined = "\n".join(map(json.dumps, listed)) + "\n"
    text = one(json.dumps(rows), json.dumps(rows, indent=1), lined, lined)
    for number, literal in enumerate(literals):
        text = text.replace(f'"@@{number}@@"', literal)
    content: bytes = text.encode("utf-8", "surrogatepass")
    kind = one(*["as it is"] * 6, "cut", "wrap", "junk")
    at = draw(st.integers(0, len(content)))
    if kind == "cut":
        return content[:at]
    if kind == "wrap":
        return one(*WRAPS)(content)  # type: ignore[no-any-return]
    junk = one(b"\x00", b"\xff", b'"', b",", b"[", b"}", b"\\", b"\n") if kind == "junk" else b""
    return content[:at] + junk + content[at:]


def sound_rows() -> list[Json]:
    """The rows of the corpus, as LLaVA and with the other names that are understood."""
    turns = [("user", "<image> and <image>?"), ("assistant", "Two.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    other = {"id": 7, "images": ["0.png", "2.png", "4.png"], "roles": ["input", "input", "target"]}
    other["messages"] = messages
    more = {"image": ["0.png"], "target_images": ["2.png"], "meta": {"kind": "x"}, "type": "y"}
    more["conversations"] = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "<image>"}]
    more["conversations"] += [{"from": "gpt", "value": "No <b>."}]  # type: ignore[operator]
    return [LLAVA, LLAVA, [other, more, other, {"id": "bare", "image": "0.png"}]]


def spoil_rows(one: Callable[..., Any], rows: Json, literals: list[str]) -> None:
    """One defect of rows, in place. What only JSON's text can say goes to `literals`; its mark, into the tree."""
    found = list(spots(rows))
    owner, key = one(*found) if found else ({}, "")
    kind = one(*["path", "text", "odd"] * 3, "role", "drop", "rename", "extra", "list", "more", "move", "raw", "turn")
    if kind == "path":
        pictures = [(mapping, name) for mapping, name in found if name in ("image", "images", "target_images")]
        owner, key = one(*pictures) if pictures else (owner, key)
    elif kind in ("text", "role"):
        wanted = ("value", "content") if kind == "text" else ("from", "role")
        words = [(mapping, name) for mapping, name in found if name in wanted]
        owner, key = one(*words) if words else (owner, key)
    if key == "":
        return
    if kind == "path":
        owner[key] = one(one(*PATHS), [one(*PATHS)], [one(*PATHS), "0.png"])
    elif kind in ("text", "role", "odd"):
        owner[key] = one(*{"text": TEXTS, "role": ROLES, "odd": ODD}[kind])
    elif kind == "drop":
        del owner[key]
    elif kind == "rename" and isinstance(owner, dict):
        owner[one(*NAMES)] = owner.pop(key)
    elif kind == "extra" and isinstance(owner, dict):
        owner[one(*NAMES)] = one(*ODD, *TEXTS[:9], *PATHS[:9])
    elif kind == "list":
        owner[key] = one([owner[key]], {"x": owner[key]})
    elif kind == "more" and isinstance(owner, list):
        owner += copy.deepcopy(owner)
    elif kind == "turn" and isinstance(owner, list):
        owner.insert(0, one({"from": one(*ROLES), "value": one(*TEXTS)}, *ODD))
    elif kind == "move":
        other, place = one(*found)
        owner[key] = copy.deepcopy(other[place])
    else:
        literals.append(one(*LITERALS))
        owner[key] = f"@@{len(literals) - 1}@@"


def llava_rows() -> Json:
    """The rows of `tests.corpus`."""
    with tempfile.TemporaryDirectory() as folder:
        return json.loads((write_corpus(Path(folder), SAMPLES) / "data.json").read_text())


LLAVA = llava_rows()
SOUND_ROWS = sound_rows()


def check_conversations(trials: Trials, chosen: settings) -> None:
    base = recipe_dict(Path(CORPUS), output="run", hardware={"workers": 0, "threads": 1})

    @chosen
    @given(conversation_files(), st.sampled_from(["error", "skip"]), st.sampled_from(["pad", "resize", "crop"]),
           st.sampled_from(["chat", "plain", "qwen2"]), st.booleans())  # fmt: skip
    def works(content: bytes | None, on_bad: str, geometry: str, template: str, fits: bool) -> None:
        stage = {**base["stages"][0], "data": [{"path": "rows.json", "images": f"{CORPUS}/images"}], "max_steps": 2}
        stage |= {"on_bad_sample": on_bad, "max_bad_rate": 0.9, "geometry": geometry, "template": template}
        objectives = {"objectives": {"queries": {"fit": True}, "noisy": {}}} if fits else {}
        stage["train"] = {**stage["train"], **dict.fromkeys(objectives.get("objectives", {}), 1e-3)}
        recipe = yaml.safe_dump({**base, **objectives, "stages": [stage]}).encode()
        files: Files = {"rows.json": content, "recipe.yaml": recipe}
        trials.folder(files)
        trials.judged(run("data", "check", "rows.json", "--images", f"{CORPUS}/images"), files)
        trials.try_recipe(files, [])

    works()
    told = trials.outcomes
    assert told["data 2"] > chosen.max_examples // 4 and told["plan 0"] > chosen.max_examples // 4, told
    assert told["train 0"] and told["train 2"], told


def test_conversation_files_with_random_defects(trials: Callable[[int], Trials]) -> None:
    check_conversations(trials(6), FEW)


@pytest.mark.slow
def test_many_conversation_files_with_random_defects(trials: Callable[[int], Trials]) -> None:
    check_conversations(trials(2), MANY)


# What such examples have brought up, one by one


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, r"recipe\.yaml:\d+:\d+: YAML syntax: more than \d+ values; aliases multiply them"),
        ("a: " + "[" * 60 + "]" * 60, r"recipe\.yaml:1:\d+: YAML syntax: nested deeper than 40 levels"),
        ("a: " + "[" * 900, r"recipe\.yaml:1:\d+: YAML syntax: nested deeper"),
        ('name: "\\UFFFFFFFF"', r"recipe\.yaml:1:\d+: YAML syntax: "),
        ('name: "\\uD800"', r"recipe\.yaml:1:7: name: text must not hold NUL or half of a surrogate pair"),
        ("seed: " + "9" * 5000, r"recipe\.yaml:1:1: seed: must be"),
        ("seed: ٣", r"recipe\.yaml:1:1: seed: must be a whole number, not '٣'"),
        ("output: ~nobody_of_this_name/x", r"recipe\.yaml:1:1: output: '~nobody_of_this_name/x' cannot be a path"),
        ("extends: " + "x" * 5000, r"recipe\.yaml:1:1: extends: .* cannot be a path"),
        ("seed: 4294967296", r"recipe\.yaml:1:1: seed: must be less than 4294967296"),
        ("hardware: {workers: 1000000}", r"recipe\.yaml:1:12: hardware\.workers: must be less than or equal to 512"),
        ("model: {encoder: {config: {model_type: [a]}}}", r"model\.encoder: no encoder '\['a'\]'"),
        ('"a\\nb": 1', r"recipe\.yaml:1:1: a key must be plain text"),
    ],
)  # fmt: skip
def test_recipes_that_once_hung_or_crashed(text: str, said: str, trials: Callable[[int], Trials]) -> None:
    files: Files = {"recipe.yaml": text.encode()}
    trials(1).folder(files)
    outcome = run("plan", "recipe.yaml")
    judge(outcome, files)
    assert outcome.status == 2 and re.search(said, outcome.err), outcome.err


def row(text: str = "<image>?", picture: Json = "0.png") -> bytes:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "Yes."}]
    return json.dumps([{"id": "r", "image": picture, "conversations": turns}]).encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "is not JSON or JSONL in UTF-8, after 0 rows"),
        (None, "is not JSON or JSONL in UTF-8, after 0 rows: it is not a file"),
        (row(picture="pipe.png"), "pipe.png cannot be read .*it is not a file"),
        (row(picture="folder.png"), "folder.png cannot be read .*it is not a file"),
        (row(picture="thin.png"), "60000 x 1 pixels are beyond the limits: sides up to 20000"),
        (row(picture="longer.png"), "1 x 5000 pixels are beyond the limits"),
        (row("<image>\ud800"), "row: .*surrogates not allowed"),
        (row(picture=["x" * 100_000 + "\0"]), "row: "),
        (b'[{"id": [1], "image": "0.png"}]', "'id' must be text or a number, got"),
    ],
)
def test_conversation_files_that_once_hung_or_crashed(
    content: bytes | None, said: str, trials: Callable[[int], Trials]
) -> None:
    files: Files = {"rows.json": content}
    trials(1).folder(files)
    outcome = run("data", "check", "rows.json", "--images", f"{CORPUS}/images")
    judge(outcome, files)
    assert outcome.status == 2 and re.search(said, outcome.out + outcome.err), outcome.out + outcome.err


def test_a_file_with_a_byte_order_mark_is_read(trials: Callable[[int], Trials]) -> None:
    trials(1).folder({"rows.json": b"\xef\xbb\xbf" + row()})
    assert run("data", "check", "rows.json", "--images", f"{CORPUS}/images").status == 0


def test_a_word_of_a_megabyte_is_no_work_for_the_tokenizer(trials: Callable[[int], Trials]) -> None:
    """Once the square of its length: minutes."""
    from foveate.data.tokenizer import train_tokenizer

    with limited(10):
        tokenizer = train_tokenizer(["x" * 1_000_000, "some words", " " * 1_000_000], 400)
    assert tokenizer.decode(tokenizer("some words")["input_ids"]) == "some words"
