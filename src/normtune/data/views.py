"""The views of one study that a model sees: one frontal, one lateral."""

from __future__ import annotations

from collections.abc import Sequence

_FRONTAL = ("FRONTAL", "PA", "AP")  # PA before AP: it is the better film where a study has both
_LATERAL = ("LATERAL", "LL", "XTABLE LATERAL")


def two_views(images: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """(view, key) of a study's images -> at most two keys, frontal first, then lateral.

    Views are named as the files name them: Frontal and Lateral, or DICOM's ViewPosition (PA, AP, LATERAL, LL,
    also with more words after). Of several frontal or lateral images the first counts. A study without a
    frontal image shows its lateral one; where no view is named, its first image.
    """
    frontal = next((key for want in _FRONTAL for view, key in images if _is(view, want)), None)
    lateral = next((key for want in _LATERAL for view, key in images if _is(view, want)), None)
    chosen = tuple(key for key in (frontal, lateral) if key is not None)
    return chosen or tuple(key for _, key in images[:1])


def _is(view: str, want: str) -> bool:
    words = view.strip().upper()
    return words == want or words.startswith(f"{want} ")
