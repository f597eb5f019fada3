"""VQA-Med 2019 (Ben Abacha et al., ImageCLEF 2019): questions on modality, plane, organ and abnormality."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from normtune.data.reading.cells import is_yes_no
from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.tables import file_bytes
from normtune.data.records import Dataset
from normtune.errors import InputError

LICENCE = "CC BY 4.0"
# Split -> its file of questions, and its folder of images; both in any subfolder.
_FILES = {
    "train": ("All_QA_Pairs_train.txt", "Train_images"),
    "validate": ("All_QA_Pairs_val.txt", "Val_images"),
    "test": ("VQAMed2019_Test_Questions_w_Ref_Answers.txt", "VQAMed2019_Test_Images"),
}
_CATEGORIES = "QAPairsByCategory"  # files such as C1_Modality_train.txt


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read the unpacked release (zenodo.org/records/10499039).

    Checked against the 500 lines of VQAMed2019_Test_Questions_w_Ref_Answers.txt of github.com/abachaa/VQA-Med-2019:
    image|category|question|answer, the image without .jpg. From loaders of others: All_QA_Pairs_train.txt and
    All_QA_Pairs_val.txt with image|question|answer, QAPairsByCategory/C1_Modality_train.txt and so on with the same
    lines by category, and the folders Train_images, Val_images and VQAMed2019_Test_Images.

    The questions have no options: yes and no are closed, all others open. Of several right answers in test, separated
    by #, the first is the reference, and `meta` holds the others. Parentheses in answers are not removed: some mark an
    optional part, others belong to the name of a modality. Ids are `vqa-med-2019-<split>-<line>`.

    Raises:
        InputError: all files are missing, a line has another form, or no row can be used.
    """
    reader = RowReader("vqa-med-2019", text_only)
    for split, (name, folder) in _FILES.items():
        file = next(iter(sorted(root.rglob(name))), None)
        if file is None:
            reader.note_missing_split(name, split)
            continue
        images = next((path for path in sorted(root.rglob(folder)) if path.is_dir()), file.parent / folder)
        prefix = images.relative_to(root).as_posix()
        categories = {
            line: path.stem.split("_")[1].lower()
            for path in sorted((file.parent / _CATEGORIES).glob("C*_*.txt"))
            for _, line in _lines(path)
        }
        for number, line in _lines(file):
            parts = line.split("|")
            if len(parts) not in (3, 4):
                raise InputError(f"{name}, row {number}: not IMAGE|QUESTION|ANSWER. Use the file as released.")
            image, question, answer = parts[0].strip(), parts[-2].strip(), parts[-1]
            category = parts[1] if len(parts) == 4 else categories.get(line, "")
            row = reader.start_row(name, str(number), f"vqa-med-2019-{split}-{number}")
            first, *others = (row.read_text("answer", part.strip()) for part in answer.split("#"))
            row.finish(
                images=(row.image_key(f"{prefix}/{image}.jpg") if image else "",),
                question=row.read_text("question", question),
                answer=first,
                kind="closed" if is_yes_no(first) else "open",
                split=split,
                meta={"language": "en", "question_type": category, "other_answers": "#".join(others)},
            )
    if not reader.locations:
        names = ", ".join(name for name, _ in _FILES.values())
        raise InputError(f"{root} holds no {names}. Point --root at the unpacked release.")
    return reader.finish(root, ("",), LICENCE)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of the lines that are not blank."""
    try:
        text = file_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file.name} is not UTF-8 text. Save it as UTF-8.") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line
