"""Options of the commands that read a dataset: which dataset, and which of its examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from normtune.data.formats import name_and_root, parse_mixture
from normtune.data.split_names import standard_split
from normtune.errors import InputError, did_you_mean


class Options(BaseModel):
    """Options that are checked when they are set; a field that does not exist is an error."""

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


class DataOptions(Options):
    """The dataset and the selection of its examples. The descriptions are what `--help` prints."""

    data: str = Field(
        description="Dataset: slake, vqa-rad, path-vqa, openi, mimic-cxr, medpix, roco, mimic-cxr-vqa, "
        "mimic-ext-cxr-qba, vindr-cxr-vqa, kvasir-vqa, gemex, pmc-vqa, omnimedvqa, medxpertqa, mmmu, rexvqa, "
        "medpix-vqa, pathmmu, vqa-med-2019, phantom-a, phantom-b, phantom-acquisition, "
        "phantom-wording, phantom-knowledge; or a file or folder of your own (its format is recognised); or, with "
        "--root, its format: csv, tsv, xlsx, json, jsonl, parquet, messages (conversations), arrow (save_to_disk), "
        "imagefolder, dicom; or several with weights for training: slake=FOLDER:0.7,rows.csv:0.3."
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
    columns: str | None = Field(
        None,
        description="Columns of a table of your own, such as image=scan,answer=findings+impression; fields: image, "
        "question, answer, options, id, kind, split, patient, language, modality, organ. Default: by their usual "
        "names.",
    )
    slices: int | None = Field(
        None,
        gt=0,
        description="Evenly spaced slices of a volume (.nii.gz, DICOM series), one image each; default: 9, as a "
        "montage.",
    )
    montage: bool = Field(False, description="Show the slices of a volume as one picture.")
    split_ratio: str | None = Field(
        None,
        description="Make new splits train/validate/test by this ratio, such as 80/10/10: no picture and no patient in "
        "two splits, and every kind of answer in its share.",
    )
    split_seed: int | None = Field(None, description="Seed of --split-ratio; default: 0.")
    split_column: str | None = Field(None, min_length=1, description="Column that names the split of a row.")
    splits: Path | None = Field(None, description="File of splits that `normtune split` wrote.")
    fold: int | None = Field(
        None, ge=0, description="Fold of --splits that is the test split, from 0; the next one is validate."
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

    @field_validator("split", "train_split", "validate_split", "test_split", check_fields=False)
    @classmethod
    def _standard_split(cls, name: str) -> str:
        """Accept the other names of splits, such as val for validate."""
        return standard_split(name)

    def data_options(self) -> dict[str, Any]:
        """The options for a result file, with an absolute root: they open the same data from any folder."""
        options = self.model_dump(mode="json", include=set(DataOptions.model_fields))
        options["data"], root = name_and_root(self.data, self.root)
        if mixture := parse_mixture(self.data):
            options["data"] = ",".join(map(str, mixture))
        if root is not None and root.exists():  # a root that does not exist is a hub name
            options["root"] = str(root.resolve())
        if self.splits is not None:
            options["splits"] = str(self.splits.resolve())
        return options


class SplitOptions(DataOptions):
    """The options of `normtune split`."""

    folds: int | None = Field(None, ge=2, description="Make this many folds, instead of train, validate and test.")
    out: Path = Field(Path("splits.json"), description="File to write: .json, or .csv with the columns id and split.")


class InspectOptions(DataOptions):
    """The options of `normtune data`."""

    model: str | None = Field(
        None, description="Model that sets the limits of the texts: a local directory, a hub name, or 'nano'."
    )
