"""What encrypted updates cost: error against the plain average, bytes and seconds of a round.

    PYTHONPATH=src:. python benchmarks/federated_encryption.py --out benchmarks/federated_encryption.json

Three sites of phantoms train nano for a few steps; their updates are averaged as they are and encrypted. Seconds are
those of encryption, averaging and decryption alone, the median of five.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from record import record
from tests.federated.test_secure import make_contexts

from normtune.federated import secure
from normtune.federated.config import FederateConfig, parse_sites
from normtune.federated.rounds import read_start
from normtune.federated.rules import average, site_weights, update_norm
from normtune.federated.site import RoundTask, train_at_site

SITES = ["a=phantom-a:60", "b=phantom-b:60@1/2", "c=phantom-b:60@2/2"]
RECIPES = ("ln", "lora(r=8)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [measure(recipe) for recipe in RECIPES]
    for row in rows:
        print(row)
    record(arguments.out, "federated_encryption", rows)


def measure(recipe: str) -> dict[str, Any]:
    """One round of three sites, as it is and encrypted."""
    site, server = make_contexts()
    sites = parse_sites(SITES)
    with tempfile.TemporaryDirectory() as folder:
        config = FederateConfig(
            model="nano", tune=recipe, site=SITES, out=Path(folder), local_steps=8, batch=8, device="cpu"
        )
        _, start = read_start(config)
        updates = {
            name: train_at_site(RoundTask(config, 1, start), options, Path(folder) / name)
            for name, options in sites.items()
        }
    weights = list(site_weights(updates, "pairs").values())
    values = [update.values for update in updates.values()]
    plain, _ = average(values, weights, "naive")
    encrypted, encryption = timed(lambda: [secure.encrypt(update, start, site) for update in values])
    averaged, averaging = timed(lambda: secure.average(encrypted, weights, server))
    decrypted, decryption = timed(lambda: secure.decrypt(start | averaged, start, site))
    error = max(float(np.abs(decrypted[name].astype(np.float64) - plain[name]).max()) for name in start)
    size = sum(value.nbytes for value in start.values())
    sent, received = (sum(value.nbytes for value in part.values()) for part in (encrypted[0], start | averaged))
    return {
        "recipe": recipe, "values": sum(value.size for value in start.values()), "sites": len(sites),
        "largest_value": max(float(np.abs(value).max()) for value in plain.values()),
        "largest_change": max(float(np.abs(plain[name] - start[name]).max()) for name in start),
        "largest_error": error, "relative_error": update_norm(decrypted, plain) / update_norm(plain, start),
        "bytes_a_round_plain": 2 * size, "bytes_a_round_encrypted": sent + received,
        "seconds_of_a_site": encryption / len(sites) + decryption, "seconds_of_the_server": averaging,
    }  # fmt: skip


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a call and its median time."""
    seconds = []
    for _ in range(5):
        started = perf_counter()
        result = call()
        seconds.append(perf_counter() - started)
    return result, statistics.median(seconds)


if __name__ == "__main__":
    main()
