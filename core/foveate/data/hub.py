"""Conversations from the `datasets` library: parquet and Arrow files, saved folders, or the Hugging Face hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from foveate.data.dataset import ConversationDataset
from foveate.data.llava import conversation, picture_inside
from foveate.errors import DataError
from foveate.options import ExistingPath, absolute, recipe_folder
from foveate.types import IMAGE_PLACEHOLDER, Conversation

Column = Literal["id", "conversations", "images", "target_images", "question", "answer"]
COLUMNS = """Which column holds what: `conversations`, or `answer` and perhaps `question` (images are put before it);
`images` and `target_images` (one or a list: image features, bytes, or paths inside the folder `images`); `id`."""


class HubDataset(ConversationDataset):
    """A table of the `datasets` library, which comes with `pip install 'foveate[datasets]'`."""

    class Options(ConversationDataset.Options):
        path: str = Field(description="Parquet or Arrow file, folder of parquet files or of `save_to_disk`, or hub id.")
        subset: str | None = Field(None, description="Configuration of a hub data set.")
        split: str = Field("train", description="Split of a hub data set or of a saved folder with splits.")
        revision: str | None = Field(None, description="Git revision of a hub data set.")
        images: ExistingPath | None = Field(None, description="Folder of the pictures where a column holds paths.")
        columns: dict[Column, str] = Field(description=COLUMNS)

        @field_validator("path")
        @classmethod
        def _local_first(cls, path: str, info: ValidationInfo) -> str:
            local = absolute(path, recipe_folder(info)).resolve()
            if not local.exists() and (path.startswith((".", "/", "~")) or path.endswith((".parquet", ".arrow"))):
                raise ValueError(f"no such file or folder: {local}")
            return str(local) if local.exists() else path

    options: Options

    def __init__(self, options: Options):
        super().__init__(options)
        self.table = _open(options)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Conversation:
        values = self.table[index]
        row: dict[str, Any] = {key: values[name] for key, name in self.options.columns.items()}
        if "answer" in row:
            images = row.get("images")
            shown = len(images) if isinstance(images, list) else int(images is not None)
            prompt = "\n".join(filter(None, [IMAGE_PLACEHOLDER * shown, row.get("question")]))
            row["messages"] = [{"role": "user", "content": prompt}, {"role": "gpt", "content": row["answer"] or ""}]
        return conversation(row, f"{self.options.path} row {index}", str(index), self._picture)

    def _picture(self, value: Any) -> Any:
        if isinstance(value, Mapping):  # an undecoded image
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        return value if isinstance(value, bytes) else picture_inside(self.options.images, value)

    def fingerprint(self) -> str:
        return f"{self.table._fingerprint}-{len(self.table)}"


def _open(options: HubDataset.Options) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("data of type 'hf' needs a library that is missing: pip install 'foveate[datasets]'") from error

    def undecoded(feature: Any) -> Any:
        if isinstance(feature, datasets.List):
            return datasets.List(undecoded(feature.feature))
        return datasets.Image(decode=False) if isinstance(feature, datasets.Image) else feature

    path = Path(options.path)
    try:
        if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            table = datasets.load_from_disk(str(path))
            table = table[options.split] if isinstance(table, dict) else table
        elif path.exists():
            files = [str(path)] if path.is_file() else sorted(map(str, path.rglob("*.parquet")))
            kind = "arrow" if path.suffix == ".arrow" else "parquet"
            table = datasets.load_dataset(kind, data_files=files, split="train")
        else:
            table = datasets.load_dataset(options.path, options.subset, split=options.split, revision=options.revision)
    except Exception as error:  # the library raises anything from KeyError to its own classes
        raise DataError(f"the data set {options.path} cannot be opened ({type(error).__name__}: {error})") from error
    if missing := set(options.columns.values()) - set(table.column_names):
        raise DataError(f"{options.path} lacks columns {sorted(missing)}; it has {table.column_names}")
    for name in {name for key, name in options.columns.items() if key.endswith("images")}:
        table = table.cast_column(name, undecoded(table.features[name]))  # pictures are opened by foveate, when needed
    return table
