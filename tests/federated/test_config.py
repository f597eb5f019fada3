"""The sites of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from normtune.data.registry import open_dataset
from normtune.data.splits import part_of_images
from normtune.federated.config import FederateConfig, parse_sites
from tests.support.base_models import input_error


def test_sites_have_data_a_root_and_a_part(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("data: csv\nroot: rows.csv\nimage_disjoint: true\nlimit: 20\n")
    sites = parse_sites(["a=slake:/data/slake", "b=phantom-b:30@2/3", f"c={file}"])
    assert (sites["a"].data, str(sites["a"].root), sites["a"].part) == ("slake", "/data/slake", None)
    assert (sites["b"].data, sites["b"].root, sites["b"].part) == ("phantom-b:30", None, "2/3")
    assert (sites["c"].data, sites["c"].image_disjoint, sites["c"].limit) == ("csv", True, 20)


@pytest.mark.parametrize("entry", ["slake", "a=", "=slake", "a/b=slake", "a=phantom-a@0/2"])
def test_a_bad_site_is_an_input_error(entry: str) -> None:
    assert "--site" in (message := input_error(lambda: parse_sites([entry]))) or "--part" in message
    assert "once" in input_error(lambda: parse_sites(["a=phantom-a", "a=phantom-b"]))


def test_parts_of_a_dataset_share_no_image() -> None:
    examples = open_dataset("phantom-a:9").split("train")
    parts = [part_of_images(examples, number, 2) for number in (1, 2)]
    images = [{example.images[0] for example in part} for part in parts]
    assert not images[0] & images[1] and len(images[0] | images[1]) == 9
    assert sum(map(len, parts)) == len(examples)


def test_options_that_exclude_each_other(tmp_path: Path) -> None:
    def checked(**options: object) -> FederateConfig:
        return FederateConfig.checked(model="nano", site=["a=phantom-a"], out=tmp_path, **options)

    assert checked().needed(3) == checked(quorum=2).needed(3) == 2
    assert "--server: " in input_error(lambda: checked(average="exact", server="adam"))
    assert "'image' is no part" in input_error(lambda: checked(local="image"))
