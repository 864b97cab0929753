"""docs/data.md: every block of it is used."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from PIL import Image

from foveate.data.check import check
from foveate.data.dataset import ConversationDataset, DefectKind
from foveate.data.hub import HubDataset
from foveate.data.llava import LlavaDataset
from foveate.data.mixture import Source
from foveate.data.sample import SampleRules
from foveate.data.templates import SHIPPED
from foveate.data.tokenizer import train_tokenizer

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def test_every_block_has_a_test() -> None:
    assert [name for name, _ in BLOCKS] == ["yaml", "json", "jsonl", "yaml", "python", "python"]


@pytest.mark.parametrize(("language", "samples"), [("json", 5), ("jsonl", 2)])
def test_rows_are_read_and_sound(
    language: str, samples: int, corpus: Callable[..., tuple[Path, Path]], make_rules: Callable[..., SampleRules]
) -> None:
    path, images = corpus(blocks(language)[0], f"rows.{language}")
    data = LlavaDataset(LlavaDataset.Options(path=path, images=images))
    report = check([Source(data)], make_rules())
    assert report.defects == [] and report.samples == samples == len(data)


def test_sources_are_options_of_their_data_sets(tmp_path: Path, digits: list[Image.Image]) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "images").mkdir()
    for name in ("rows.json", "captions.jsonl"):
        (tmp_path / name).write_text("")
    talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]
    row = {"key": "k", "talk": talk, "image": digits[0], "question": "q", "answer": "a", "caption": "c"}
    columns = {**row, "pictures": [digits[0]], "goal": digits[1]}
    table = datasets.Dataset.from_dict({name: [value] for name, value in columns.items()})
    table.to_parquet(tmp_path / "table.parquet")
    entries = [*yaml.safe_load(blocks("yaml")[0])["data"], *yaml.safe_load(blocks("yaml")[1])]
    assert len(entries) == 7
    for entry in entries:
        own = {key: value for key, value in entry.items() if key not in ("type", "weight", "max_samples", "objectives")}
        if entry.get("type", "llava") == "llava":
            assert LlavaDataset.Options.model_validate(own, context={"folder": tmp_path}).path.parent == tmp_path
            continue
        options = HubDataset.Options.model_validate(own, context={"folder": tmp_path})
        if Path(options.path).exists():
            conversation = HubDataset(options)[0]
            assert conversation.images and conversation.turns[-1].text in ("x", "a", "c")


def test_checking_a_corpus_in_python(
    tmp_path: Path, corpus: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    corpus(blocks("json")[0])
    train_tokenizer(["a text"], 300).save_pretrained(tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[0], "docs/data.md", "exec"), {})
    assert "median" in capsys.readouterr().out


def test_a_data_set_of_your_own(make_rules: Callable[..., SampleRules]) -> None:
    names: dict[str, Any] = {"__name__": "docs"}
    exec(compile(blocks("python")[1], "docs/data.md", "exec"), names)
    colours: type[ConversationDataset] = names["Colours"]
    report = check([Source(colours(colours.Options()))], make_rules())
    assert report.samples == 3 and report.defects == [] and set(report.measures["width"]) == {48}


def test_every_template_and_kind_of_defect_is_named() -> None:
    for name in (*SHIPPED, *get_args(DefectKind)):
        assert f"`{name}`" in PAGE
