from __future__ import annotations

import pytest

from normtune.studies.page.about import MIN_IMAGES, warnings
from normtune.studies.page.results import Results
from tests.support.study_results import fake_results


@pytest.mark.parametrize(("seeds", "text"), [(1, "Fewer than 3 seeds: nano"), (4, "have 4 seeds; 5 or more"), (5, "")])
def test_few_seeds_are_a_warning(seeds: int, text: str) -> None:
    texts = warnings(Results(fake_results(recipes=["ln"], seeds=seeds, losses=2)))
    assert len(texts) == (text != "") and text in " ".join(texts)


def test_few_test_images_are_a_warning() -> None:
    made = fake_results(recipes=["ln"], seeds=5, losses=2)
    for row in made["evaluations"]:
        row["images"] = MIN_IMAGES - (row["dataset"] == "medpix")
    (text,) = warnings(Results(made))
    assert text.startswith(f"medpix has {MIN_IMAGES - 1} test images")
