"""Conversations from the `datasets` library: parquet and Arrow files, saved folders, or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from foveate.data.dataset import ConversationDataset
from foveate.data.llava import conversation, picture_inside
from foveate.errors import DataError
from foveate.options import ExistingPath, recipe_folder
from foveate.options import Options as BaseOptions
from foveate.types import IMAGE_PLACEHOLDER, Conversation


class Columns(BaseOptions):
    """Which column holds what; without `conversations` a sample is its images, a question if any, and an answer."""

    id: str | None = Field(None, description="Sample ids; default: the row's number.")
    conversations: str | None = Field(None, description="Lists of turns, {from, value} or {role, content}.")
    images: str | None = Field(None, description="One image or a list: image features, bytes, or paths.")
    target_images: str | None = Field(None, description="Images that only objectives see.")
    question: str | None = Field(None, description="The user's text; the images are put before it.")
    answer: str | None = Field(None, description="The assistant's text: an answer, a caption.")


class HubDataset(ConversationDataset):
    """A table of the `datasets` library, which comes with `pip install 'foveate[datasets]'`."""

    class Options(ConversationDataset.Options):
        path: str = Field(description="Parquet or Arrow file, folder of parquet files or of `save_to_disk`, or hub id.")
        subset: str | None = Field(None, description="Configuration of a hub data set.")
        split: str = Field("train", description="Split of a hub data set or of a saved folder with splits.")
        revision: str | None = Field(None, description="Git revision of a hub data set.")
        images: ExistingPath | None = Field(None, description="Folder of the pictures where a column holds paths.")
        columns: Columns = Field(description="Which column holds what.")

        @field_validator("path")
        @classmethod
        def _local_first(cls, path: str, info: ValidationInfo) -> str:
            local = (recipe_folder(info) / Path(path).expanduser()).resolve()
            if not local.exists() and (path.startswith((".", "/", "~")) or path.endswith((".parquet", ".arrow"))):
                raise ValueError(f"no such file or folder: {local}")
            return str(local) if local.exists() else path

    options: Options

    def __init__(self, options: Options):
        super().__init__(options)
        self._columns = {key: name for key, name in options.columns if name is not None}
        self.table = _open(options)
        if missing := set(self._columns.values()) - set(self.table.column_names):
            has = ", ".join(self.table.column_names)
            raise DataError(f"{options.path} has no column {', '.join(sorted(missing))}; it has {has}")
        for name in {self._columns[key] for key in ("images", "target_images") if key in self._columns}:
            self.table = self.table.cast_column(name, _undecoded(self.table.features[name]))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Conversation:
        values = self.table[index]
        row = {key: values[name] for key, name in self._columns.items()}
        if "answer" in row:
            images = row.get("images")
            shown = len(images) if isinstance(images, list) else int(images is not None)
            prompt = "\n".join(filter(None, [IMAGE_PLACEHOLDER * shown, row.get("question")]))
            turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": row["answer"] or ""}]
            row["conversations"] = turns
        return conversation(row, f"{self.options.path} row {index}", str(index), self._picture)

    def _picture(self, value: Any) -> Any:
        if isinstance(value, Mapping):  # an undecoded image: its bytes, or the path of a local file
            return value["bytes"] if value.get("bytes") is not None else Path(value["path"])
        return value if isinstance(value, bytes) else picture_inside(self.options.images, value)

    def fingerprint(self) -> str:
        return f"{self.table._fingerprint}-{len(self.table)}"


def _open(options: HubDataset.Options) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data of type 'hf' needs the datasets library, which is not installed: pip install 'foveate[datasets]'"
        ) from error
    path = Path(options.path)
    try:
        if path.suffix == ".arrow":
            return datasets.Dataset.from_file(str(path))
        if (path / "state.json").exists():
            return datasets.load_from_disk(str(path))
        if (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(path))[options.split]
        if path.exists():
            files = [str(path)] if path.is_file() else sorted(str(file) for file in path.rglob("*.parquet"))
            return datasets.load_dataset("parquet", data_files=files, split="train")
        return datasets.load_dataset(options.path, options.subset, split=options.split, revision=options.revision)
    except Exception as error:  # the library raises anything from KeyError to its own classes
        raise DataError(f"the data set {options.path} cannot be opened ({type(error).__name__}: {error})") from error


def _undecoded(feature: Any) -> Any:
    """The same feature with its images left encoded, so that pictures are opened by foveate and only when needed."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    return datasets.List(_undecoded(feature.feature)) if isinstance(feature, datasets.List) else feature
