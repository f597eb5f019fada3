"""The records that dataset readers return and all later stages use: examples, datasets, predictions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from normtune.data.examples import KINDS as KINDS
from normtune.data.examples import Example, Examples, count_values, image_keys
from normtune.data.examples import History as History
from normtune.data.examples import Kind as Kind
from normtune.data.split_names import standard_split
from normtune.errors import InputError, did_you_mean
from normtune.runtime.notebook import MAX_HTML_ROWS, Rows, data_frame, html_table

if TYPE_CHECKING:
    import pandas
    from PIL import Image

    from normtune.data.summary import DatasetSummary


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


@dataclass(frozen=True)
class Picture:
    """What is kept of one picture after it was opened."""

    digest: str  # hash of the size and the decoded pixels; "" if the picture cannot be decoded
    perceptual_hash: int = 0  # 64 bits: whether each cell of an 8 x 9 grid is darker than the one to its right
    thumbnail: bytes = b""  # 16 x 16 grey values
    error: str = ""  # why it cannot be decoded
    size: tuple[int, int] = (0, 0)  # width and height


@dataclass(repr=False)
class Dataset:
    """The examples of all splits, in file order, with the problems of the files.

    `dataset.train`, `dataset.validation` and `dataset.test` are the usual splits; `dataset.split(name)` returns
    any split, and `dataset.summary()` counts what the dataset contains.
    """

    name: str
    examples: Examples  # a list is converted
    open_image: Callable[[str], Image.Image]  # key -> RGB image; raises InputError naming the file
    problems: list[Problem] = field(default_factory=list)
    licence: str = "unknown"
    skipped: list[Example] = field(default_factory=list)  # unusable rows; `problems` holds the reasons
    notes: list[str] = field(default_factory=list)  # choices of the reader, such as the source of splits
    # fields of `DataOptions` that open this dataset again; empty for a dataset that was made in Python
    options: dict[str, Any] = field(default_factory=dict)
    # Reason -> number of rows of the files that are not in `examples`. It covers `skipped`, and also the rows of
    # other languages and tasks: len(examples) + sum(dropped.values()) is the number of rows that were read.
    dropped: Counter[str] = field(default_factory=Counter)
    # For a mixture: label of each dataset -> {"name": its name, "weight"}; see `normtune.data.mixtures`.
    mixture: dict[str, dict[str, Any]] = field(default_factory=dict)
    # Image key -> picture, for the pictures that were opened; see `normtune.data.pictures.read_pictures`.
    pictures: dict[str, Picture] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.examples, Examples):
            self.examples = Examples(self.examples)

    @property
    def train(self) -> Split:
        """The training examples."""
        return self.split("train")

    @property
    def validation(self) -> Split:
        """The validation examples."""
        return self.split("validate")

    @property
    def test(self) -> Split:
        """The test examples."""
        return self.split("test")

    def split(self, name: str) -> Split:
        """The examples of one split, in file order.

        Raises:
            InputError: there is no such split; the message lists the existing ones.
        """
        codes, splits = self.examples.codes("split")
        if name not in splits and standard_split(name) != name:
            return self.split(standard_split(name))
        if name not in splits:
            raise InputError(
                f"dataset {self.name} has no split '{name}'{did_you_mean(name, sorted(splits)) or '.'} "
                f"Its splits: {', '.join(sorted(splits)) or 'none'}."
            )
        return Split(self, self.examples.where(codes == splits.index(name)), name)

    def summary(self) -> DatasetSummary:
        """Count the rows, images, problems and leaks of every split, as `normtune data` prints them."""
        from normtune.data.summary import summarize

        return summarize(self)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def __repr__(self) -> str:
        counts = count_values(*self.examples.codes("split"))
        return f"<Dataset {self.name}: {', '.join(f'{name} {count:,}' for name, count in counts.items())} examples>"

    def _repr_html_(self) -> str:
        splits = [self.split(name) for name in self.examples.codes("split")[1]]
        rows = [{"split": split.name, "examples": len(split), "images": split.image_count} for split in splits]
        return html_table(rows, f"{self.name} (licence: {self.licence})")


class Split(Examples):
    """Some examples of a dataset, usually one of its splits: a sequence that knows its dataset."""

    def __init__(self, dataset: Dataset, examples: Iterable[Example], name: str = "") -> None:
        super().__init__(examples)
        self.dataset = dataset
        self.name = name

    @property
    def image_count(self) -> int:
        """Number of different images."""
        return len(image_keys(self))

    def rows(self) -> Rows:
        """Return one dict for each example; `meta` fields are columns of their own."""
        return Rows(_row(example) | example.meta | _row(example) for example in self)

    def to_pandas(self) -> pandas.DataFrame:
        """Return the rows as a data frame."""
        return data_frame(self.rows())

    def __repr__(self) -> str:
        return f"<Split {self.name or 'examples'} of {self.dataset.name}: {len(self):,} examples>"

    def _repr_html_(self) -> str:
        table = self[:MAX_HTML_ROWS].rows()._repr_html_()
        more = len(self) - MAX_HTML_ROWS
        return table + (f"<p>and {more:,} more rows</p>" if more > 0 else "")


def _row(example: Example) -> dict[str, Any]:
    """The fields of an example that every dataset has."""
    row: dict[str, Any] = {"id": example.id, "images": list(example.images), "kind": example.kind}
    row |= {"history": [list(turn) for turn in example.history]} if example.history else {}
    row |= {"options": list(example.options)} if example.options else {}
    return row | {"question": example.question, "answer": example.answer}


def confidence(score: float | None) -> float | None:
    """Return exp of the mean log-probability of an answer's tokens, at most 1; None if it is unknown."""
    return None if score is None or not math.isfinite(score) else math.exp(min(score, 0.0))


def is_abstained(score: float | None, abstain_below: float | None) -> bool:
    """Whether an answer is withheld: its confidence is below the threshold, or unknown."""
    return abstain_below is not None and (confidence(score) or 0.0) < abstain_below


@dataclass(frozen=True)
class ChoiceResult:
    """How a model chose among the options of a question. The scorings are those of `normtune.metrics.choices`."""

    # scoring -> the position of the selected option as the model saw it, first for the order of the example, then for
    # its rotations if they were scored; None if no option could be read from the generated answer
    selected: dict[str, tuple[int | None, ...]]
    # scoring -> the log-likelihood of each option, in the order of the example; None for -inf
    scores: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    generated: str | None = None  # the generated answer, for the order of the example
    options_cut: int = 0  # number of options of which the model could not read all tokens


@dataclass(frozen=True)
class Prediction:
    """A model's answer to the example with the same id; of a choice, the text of the selected option."""

    id: str
    text: str
    score: float | None = None  # mean log-probability of the answer's tokens
    finish_reason: str | None = None  # "stop", or "length" if a generated answer reached the token limit
    choice: ChoiceResult | None = None  # for a question with options
    shares: Mapping[str, float] | None = None  # candidate answer -> its share of the candidates' probabilities
    abstained: bool = False  # its confidence is below the threshold of the evaluation

    @property
    def confidence(self) -> float | None:
        """How sure the model is, from 0 to 1; None if it is unknown."""
        return confidence(self.score)
