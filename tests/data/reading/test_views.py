from __future__ import annotations

import pytest

from normtune.data.reading.radiology import select_views


@pytest.mark.parametrize(
    ("views", "selected"),
    [
        (["Lateral", "Frontal"], (1, 0)),
        (["AP", "PA", "LL"], (1, 2)),
        (["AP AXIAL", "LATERAL"], (0, 1)),
        (["PA", "PA"], (0,)),
        (["LATERAL"], (0,)),
        (["", ""], (0,)),
        (["SWIMMERS", "pa "], (1,)),
        (["PAX"], (0,)),
        ([], ()),
    ],
)
def test_one_frontal_and_one_lateral_view_are_selected(views: list[str], selected: tuple[int, ...]) -> None:
    assert select_views([(view, str(n)) for n, view in enumerate(views)]) == tuple(str(n) for n in selected)
