"""Encrypted updates: the server averages ciphertexts, and only the sites can decrypt the average.

The scheme is CKKS of TenSEAL. NVFlare's `HEBuilder` writes the keys into the startup kits: all sites have the same
secret key, the server has none. What is encrypted is the change since the start values of the federation, such as the
7,936 values of nano's norms in two ciphertexts:

    {"encrypted/0": bytes with 4,096 values, "encrypted/1": bytes with 3,840 values}

The average has the same form. Each site decrypts it and adds it to the start values, which are not secret: they are
those of the base and of the recipe's seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tenseal
from numpy.typing import NDArray

from normtune.errors import InputError
from normtune.federated.config import SiteOptions
from normtune.federated.rules import SiteUpdate, Values, check_figures, update_norm
from normtune.federated.site import RoundTask, train_at_site
from normtune.runtime.files import read_json, write_json

PREFIX = "encrypted/"
SENT_FILE = "sent.json"  # in the folder of a site: round and size of its last update
_SLOTS = 4096  # values of a ciphertext; HEBuilder's polynomials have twice as many coefficients
_LARGEST = 1e5  # CKKS would return other values above 2**19
_SMALLEST_WEIGHT = 1e-9  # CKKS cannot represent a weight below 1e-12


def train_encrypted(task: RoundTask, site: SiteOptions, folder: Path, context: Any) -> SiteUpdate:
    """Train one round at a site from the encrypted average, and encrypt the update.

    Raises:
        InputError: as for `train_at_site`, and if the average or the update cannot be right; see `check_received`.
    """
    start, _ = split(task.values)
    values = decrypt(task.values, start, context)
    check_received(folder, task.round, values, start, task.config.max_update)
    update = train_at_site(replace(task, values=values), site, folder)
    write_json(folder / SENT_FILE, {"round": task.round, "change": update_norm(update.values, start)})
    return replace(update, values=encrypt(update.values, start, context))


def encrypt(values: Values, start: Values, context: Any) -> Values:
    """Encrypt what a site has changed since the start values.

    Args:
        values: after training.
        start: the start values, with the same names.
        context: TenSEAL's context with the secret key.

    Raises:
        InputError: a change is not finite or too large. The server could not notice it.
    """
    change = np.concatenate([(values[name].astype(np.float64) - start[name]).ravel() for name in sorted(start)])
    if not (np.abs(change) < _LARGEST).all():
        raise InputError("training has ended with values that are not finite or too large. Lower --lr.")
    pieces = [change[first : first + _SLOTS] for first in range(0, change.size, _SLOTS)]
    return {f"{PREFIX}{i}": _to_array(tenseal.ckks_vector(context, piece)) for i, piece in enumerate(pieces)}


def decrypt(received: Values, names: Iterable[str], context: Any) -> Values:
    """Add the decrypted average to the start values.

    Args:
        received: the start values, and from the second round on the encrypted average.
        names: of the tensors that are averaged.
        context: TenSEAL's context with the secret key.

    Raises:
        InputError: the average does not fit the start values, or was not encrypted with the key of the sites.
    """
    values, encrypted = split(received)
    if not encrypted:
        return values
    pieces = [_vector(encrypted[f"{PREFIX}{i}"], context).decrypt() for i in range(len(encrypted))]
    change, names = np.concatenate(pieces), sorted(names)
    if change.size != sum(values[name].size for name in names) or not (np.abs(change) < _LARGEST).all():
        raise InputError("the server's average cannot be decrypted: another key, or a site sent something else.")
    ends = np.cumsum([values[name].size for name in names])[:-1]
    for name, part in zip(names, np.split(change, ends), strict=True):
        values[name] = (values[name] + part.reshape(values[name].shape)).astype(values[name].dtype)
    return values


def split(values: Values) -> tuple[Values, Values]:
    """The plain values and the ciphertexts among these values."""
    encrypted = {name: value for name, value in values.items() if name.startswith(PREFIX)}
    return {name: value for name, value in values.items() if name not in encrypted}, encrypted


def find_refusals(
    updates: Mapping[str, SiteUpdate], start: Values, base_fingerprint: str, context: Any
) -> dict[str, str]:
    """Find the updates that the server cannot average. It cannot see whether the values are finite or scaled.

    Returns:
        Site -> the reason, for every update that is refused.
    """
    size = sum(value.size for value in start.values())
    refused = {}
    for site, update in updates.items():
        reason = check_figures(update, base_fingerprint)
        try:
            sizes = [(_vector(update.values[f"{PREFIX}{i}"], context) * 0.5).size() for i in range(len(update.values))]
        except Exception as error:  # a hostile site may send anything
            reason = reason or f"its update is no ciphertext of this federation: {str(error)[:100]}"
        else:
            if sizes != [min(_SLOTS, size - first) for first in range(0, size, _SLOTS)]:
                reason = reason or f"its update has {sum(sizes)} encrypted values, not {size}"
        if reason is not None:
            refused[site] = reason
    return refused


def average(updates: Sequence[Values], weights: Sequence[float], context: Any) -> Values:
    """Average ciphertexts with plain weights, without decrypting them.

    Raises:
        InputError: a weight is too small for CKKS.
    """
    if min(weights) < _SMALLEST_WEIGHT:
        raise InputError("a site has a billion times as many pairs as another one. Use --weights equal.")
    averaged = {}
    for name in updates[0]:
        total = _vector(updates[0][name], context) * weights[0]
        for update, weight in zip(updates[1:], weights[1:], strict=True):
            total += _vector(update[name], context) * weight
        averaged[name] = _to_array(total)
    return averaged


def check_received(folder: Path, number: int, values: Values, start: Values, max_update: float) -> None:
    """Check at the site that the average is about as large as what the site itself sent in the round before.

    Raises:
        InputError: it is more than `max_update` times as large. The site trains no further.
    """
    path = folder / SENT_FILE
    sent = read_json(path) if path.is_file() else {}
    if sent.get("round") == number - 1 and 0 < max_update * sent["change"] < (change := update_norm(values, start)):
        raise InputError(
            f"the average has changed {change / sent['change']:.3g} times as much as this site's values (limit "
            f"{max_update:g}): another site has sent a scaled update. Find it, and start another federation without it."
        )


def _vector(array: NDArray[Any], context: Any) -> Any:
    return tenseal.ckks_vector_from(context, array.tobytes())


def _to_array(vector: Any) -> NDArray[Any]:
    return np.frombuffer(vector.serialize(), np.uint8).copy()  # a copy that can be written, as torch expects
