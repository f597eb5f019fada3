"""Options that select a dataset and its examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from normtune.errors import InputError, did_you_mean


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """Build a config.

        Raises:
            InputError: all faults in one line, each with the option it is about.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            faults = []
            for fault in error.errors():
                option = ".".join(str(part) for part in fault["loc"])
                if fault["type"] == "extra_forbidden":
                    faults.append(f"{option}: unknown{did_you_mean(option, cls.model_fields)}")
                else:
                    faults.append(f"--{option.replace('_', '-')}: {fault['msg']} (got {fault['input']!r})")
            raise InputError("; ".join(faults)) from error


class DataOptions(_Options):
    """Which examples of which dataset."""

    data: str = Field(
        description="Dataset: slake, vqa-rad, path-vqa, openi, mimic-cxr, medpix, roco, messages, jsonl, "
        "parquet, phantom-a, phantom-b."
    )
    root: Path | None = Field(None, description="Where the dataset's files lie.")
    language: Literal["en", "zh", "all"] = Field(
        "en", description="Questions of one language, where the dataset has several."
    )
    image_disjoint: bool = Field(
        False, description="Split by image anew, instead of the dataset's own splits."
    )
    task: Literal["vqa", "report"] = Field(
        "vqa", description="Answer questions, or write reports; datasets of reports alone need no word of it."
    )
    sections: Literal["findings", "impression", "both"] = Field(
        "findings", description="What a report is to hold, where the dataset tells its sections apart."
    )
    text_only: bool = Field(False, description="Keep rows whose image files are missing, for their text.")

    def data_options(self) -> dict[str, Any]:
        """The options that open the same data again, from any folder, as a result records them."""
        found = self.model_dump(mode="json", include=set(DataOptions.model_fields))
        if self.root is not None and self.root.exists():  # else it is a hub name
            found["root"] = str(self.root.resolve())
        return found
