"""The record types that every dataset reader yields and every later stage takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL import Image


Kind = Literal["open", "closed", "report"]


@dataclass(frozen=True)
class Example:
    """One question (or report request) of one image, with its reference answer."""

    id: str  # unique within the dataset; predictions are joined by it
    images: tuple[str, ...]  # keys for Dataset.open_image; one for a question, one or two views for a report
    question: str
    answer: str
    kind: Kind  # "closed" as the dataset labels it; readers say in their docstring what that means
    split: str
    meta: dict[str, str] = field(
        default_factory=dict, hash=False, compare=False
    )  # modality, organ, language, ...


@dataclass(frozen=True)
class Problem:
    """Something wrong in a data file, and how to mend it. Never holds patient text."""

    file: str
    row: str  # row number or row id, "" where the whole file is meant
    what: str
    mend: str

    def __str__(self) -> str:
        where = f"{self.file}, row {self.row}" if self.row else self.file
        return f"{where}: {self.message}"

    @property
    def message(self) -> str:
        """What is wrong and how to mend it, as sentences."""
        return f"{self.what}{'' if self.what.endswith('?') else '.'} {self.mend}"


@dataclass
class Dataset:
    """All examples of all splits, in file order, with what was wrong in the files."""

    name: str
    examples: list[Example]
    open_image: Callable[[str], Image.Image]  # key -> RGB image; raises InputError naming the file
    problems: list[Problem] = field(default_factory=list)
    licence: str = "unknown"
    skipped: list[Example] = field(default_factory=list)  # rows that cannot be used; `problems` says why
    notes: list[str] = field(default_factory=list)  # how the reader took the files, where there was a choice

    def split(self, name: str) -> list[Example]:
        """The examples of one split, in file order.

        Raises:
            InputError: there is no such split; the message lists those there are.
        """
        from normtune.errors import InputError, did_you_mean

        found = [example for example in self.examples if example.split == name]
        if not found:
            splits = sorted({example.split for example in self.examples})
            raise InputError(
                f"dataset {self.name} has no split '{name}'{did_you_mean(name, splits) or '.'} "
                f"Its splits: {', '.join(splits) or 'none'}."
            )
        return found


@dataclass(frozen=True)
class Prediction:
    """A model's answer to the example of the same id; `score` is the mean log-probability of its tokens."""

    id: str
    text: str
    score: float | None = None
