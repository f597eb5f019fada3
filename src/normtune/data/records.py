"""The records that dataset readers return and all later stages use: examples, datasets, predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL import Image


Kind = Literal["open", "closed", "report"]


@dataclass(frozen=True)
class Example:
    """One question about an image (or one report request), with its reference answer."""

    id: str  # unique within the dataset; predictions are matched to examples by it
    images: tuple[str, ...]  # keys for Dataset.open_image; one for a question, one or two views for a report
    question: str  # may be empty for a report
    answer: str
    kind: Kind  # "closed" as the dataset labels it; each reader's docstring explains what that means
    split: str  # "train", "validate" or "test", or another name that the files use
    meta: dict[str, str] = field(default_factory=dict, hash=False, compare=False)  # modality, organ, language, ...


@dataclass(frozen=True)
class Problem:
    """A fault in a data file and how to fix it. Never contains text of a patient."""

    file: str
    row: str  # row number or row id; "" if the whole file is concerned
    what: str  # the fault
    fix: str  # what was done with the row, and what the user can do

    def __str__(self) -> str:
        where = f"{self.file}, row {self.row}" if self.row else self.file
        return f"{where}: {self.message}"

    @property
    def message(self) -> str:
        """The fault and its fix, as sentences."""
        return f"{self.what}{'' if self.what.endswith('?') else '.'} {self.fix}"


@dataclass
class Dataset:
    """All examples of all splits, in file order, with the problems of the files."""

    name: str
    examples: list[Example]
    open_image: Callable[[str], Image.Image]  # key -> RGB image; raises InputError naming the file
    problems: list[Problem] = field(default_factory=list)
    licence: str = "unknown"
    skipped: list[Example] = field(default_factory=list)  # unusable rows; `problems` holds the reasons
    notes: list[str] = field(default_factory=list)  # choices of the reader, such as the source of splits

    def split(self, name: str) -> list[Example]:
        """The examples of one split, in file order.

        Raises:
            InputError: there is no such split; the message lists the existing ones.
        """
        from normtune.errors import InputError, did_you_mean

        examples = [example for example in self.examples if example.split == name]
        if not examples:
            splits = sorted({example.split for example in self.examples})
            raise InputError(
                f"dataset {self.name} has no split '{name}'{did_you_mean(name, splits) or '.'} "
                f"Its splits: {', '.join(splits) or 'none'}."
            )
        return examples


@dataclass(frozen=True)
class Prediction:
    """A model's answer to the example with the same id."""

    id: str
    text: str
    score: float | None = None  # mean log-probability of the answer's tokens
