"""Options of the commands that read a dataset: which dataset, and which of its examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from normtune.errors import InputError, did_you_mean

# Suffix of a data file -> the dataset name (its format) that reads it.
FILE_FORMATS = {".jsonl": "jsonl", ".parquet": "parquet", ".json": "messages"}


def name_and_root(data: str, root: Path | None) -> tuple[str, Path | None]:
    """Return a dataset's name and root; a data file such as "rows.jsonl" is the root of its format."""
    path = Path(data)
    return (FILE_FORMATS[path.suffix], path) if root is None and path.suffix in FILE_FORMATS else (data, root)


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """Validate option values and build the config.

        Raises:
            InputError: a value is invalid; one line lists all invalid values, each with its option.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            messages = []
            for item in error.errors():
                option = ".".join(str(part) for part in item["loc"])
                if item["type"] == "extra_forbidden":
                    messages.append(f"{option}: unknown{did_you_mean(option, cls.model_fields)}")
                elif item["type"] == "missing":
                    messages.append(f"--{option.replace('_', '-')} is missing")
                else:
                    messages.append(f"--{option.replace('_', '-')}: {item['msg']} (got {item['input']!r})")
            raise InputError("; ".join(messages)) from error


class DataOptions(_Options):
    """The dataset and the selection of its examples. The descriptions are what `--help` prints."""

    data: str = Field(
        description="Dataset: slake, vqa-rad, path-vqa, openi, mimic-cxr, medpix, roco, messages, jsonl, "
        "parquet, phantom-a, phantom-b; or a .jsonl, .json or .parquet file."
    )
    root: Path | None = Field(None, description="Folder or file of the dataset; phantoms need none.")
    language: str = Field(
        "en",
        min_length=1,
        description="Language of the questions: a tag such as en, zh or fr, or all. Rows that name no language are "
        "always read.",
    )
    image_disjoint: bool = Field(
        False,
        description="Make new splits that share no picture (by pixels) and no patient, instead of the dataset's own.",
    )
    group_by: str | None = Field(
        None,
        min_length=1,
        description="Column that names the patient of a row, for --image-disjoint and the leak report; default: the "
        "usual names, such as patient_id, subject_id, case or study.",
    )
    task: Literal["vqa", "report"] = Field(
        "vqa", description="Answer questions, or write reports; ignored for datasets with reports only."
    )
    sections: Literal["findings", "impression", "both"] = Field(
        "findings", description="Sections that a report consists of (openi, mimic-cxr)."
    )
    text_only: bool = Field(False, description="Keep rows with missing image files, for their text.")
    skip_bad: bool = Field(
        False, description="Leave out rows that cannot be used (damaged image, bad cell), instead of stopping at them."
    )
    history: bool = Field(
        False, description="Let each later question of a conversation see the turns before it (messages)."
    )
    strict: bool = Field(False, description="Stop if anything is lost: a row, a picture, or a text that is cut.")

    def data_options(self) -> dict[str, Any]:
        """The options for a result file, with an absolute root: they open the same data from any folder."""
        options = self.model_dump(mode="json", include=set(DataOptions.model_fields))
        options["data"], root = name_and_root(self.data, self.root)
        if root is not None and root.exists():  # a root that does not exist is a hub name
            options["root"] = str(root.resolve())
        return options


class InspectOptions(DataOptions):
    """The options of `normtune data`."""

    model: str | None = Field(
        None, description="Model that sets the limits of the texts: a local directory, a hub name, or 'nano'."
    )
