"""The plan of an imported LLaVA-Med: where each tensor comes from and how it is changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from normtune.errors import InputError
from normtune.models.checkpoints.reader import OriginalCheckpoint, first_names
from normtune.models.checkpoints.writer import PlannedTensor
from normtune.models.importers.llava_med.clip import VisionTower
from normtune.models.importers.llava_med.tensor_names import (
    EMBEDDING,
    HEAD,
    PROJECTOR,
    TOWER,
    convert_name,
    has_no_weights,
)

_ROWS = 1024  # rows of an embedding that are summed at a time for their mean


class TensorPlan:
    """Every tensor of the imported model and where it comes from, in the order in which it is read.

    Args:
        source: the checkpoint's name, for messages and the report.
        tower: a separate image encoder, used in place of the checkpoint's; None: the checkpoint's.
        base_checkpoint: the LLaMA to which the checkpoint is a delta, or None.
        original_rows: vocabulary size of the checkpoint.

    Attributes:
        shapes: name in the model -> shape.
        mapped, added, missing, dropped, left_over: as in `ImportReport`.
        groups: the tensors to write, one list per source file.
        dtype: the dtype of the embedding.

    Raises:
        InputError: a name is unknown, or a tensor is missing or has a wrong shape.
    """

    def __init__(
        self,
        source: str,
        checkpoint: OriginalCheckpoint,
        tower: VisionTower | None,
        base_checkpoint: OriginalCheckpoint | None,
        config: LlavaConfig,
        base: str | None,
        original_rows: int,
    ) -> None:
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(config)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.source, self.checkpoint, self.original_rows = source, checkpoint, original_rows
        self.base, self.base_checkpoint = base, base_checkpoint
        self.mapped: dict[str, str] = {}
        self.added: list[str] = []
        self.missing: dict[str, str] = {}
        self.dropped: dict[str, str] = {}
        self.left_over: list[str] = []
        self.groups: list[list[PlannedTensor]] = []
        self.dtype: torch.dtype = torch.float32
        self._plan_checkpoint(replace_tower=tower is not None)
        if tower is not None:
            self._plan_tower(tower)
        self._plan_missing(config)
        lacking = [name for name in self.shapes if name not in self.mapped and name not in self.missing]
        if lacking:
            raise InputError(
                f"{source} lacks {first_names(lacking)} (by transformers' names). Give a complete checkpoint."
            )
        if base_checkpoint is not None:
            self._check_base(base_checkpoint)

    def _plan_checkpoint(self, *, replace_tower: bool) -> None:
        """Plan the tensors of the checkpoint; with `replace_tower` all but its image encoder."""
        unknown = []
        file = None
        for original_name, entry in self.checkpoint.entries.items():
            name = convert_name(original_name)
            if has_no_weights(original_name):
                self.dropped[original_name] = self.source
            elif replace_tower and name is not None and name.startswith(TOWER):
                self.left_over.append(original_name)
            elif name is None or name not in self.shapes:
                unknown.append(original_name)
            else:
                if entry.file != file:
                    file = entry.file
                    self.groups.append([])
                self.groups[-1].append(self._plan_tensor(name, original_name))
        if unknown:
            raise InputError(
                f"{self.source} holds {first_names(unknown)}, which LLaVA-Med of this config does not have. "
                "Check that its files belong together, and that it is neither an adapter nor quantised."
            )

    def _plan_tensor(self, name: str, original_name: str) -> PlannedTensor:
        """Plan one tensor: read as it is, or added to the base, or grown to the new vocabulary size."""
        entry = self.checkpoint.entries[original_name]
        if name in self.mapped:
            raise InputError(
                f"{self.source} holds {self.mapped[name]} and {original_name}, which are one tensor. "
                "Remove one of them."
            )
        self.mapped[name] = original_name
        make: Callable[[], Tensor] = partial(self.checkpoint.get_tensor, original_name)
        shape, origin = entry.shape, "checkpoint"
        if self.base_checkpoint is not None and original_name in self.base_checkpoint.entries:
            make, origin = self._add_base(original_name), "sum"
            self.added.append(name)
        new_shape = self.shapes[name]
        grows = name in (EMBEDDING, HEAD) and shape == (self.original_rows, *new_shape[1:]) and shape != new_shape
        if name == EMBEDDING:
            self.dtype = entry.dtype
        if grows:
            make_original = make
            make, origin = lambda: append_mean_rows(make_original(), new_shape[0]), f"{origin}, grown"
        elif shape != new_shape:
            raise InputError(_shape_error(self.source, original_name, shape, new_shape))
        return PlannedTensor(name, entry.dtype, new_shape, f"{origin}: {original_name}", make)

    def _add_base(self, name: str) -> Callable[[], Tensor]:
        """A function that computes base + delta in the delta's dtype, as LLaVA-Med's own script does.

        The delta's embedding and head can have more rows than the base's. These rows are not differences, and
        are used unchanged.
        """
        assert self.base_checkpoint is not None
        base_checkpoint, delta = self.base_checkpoint, self.checkpoint.entries[name]
        entry = base_checkpoint.entries[name]
        more_rows = entry.shape[:1] <= delta.shape[:1] if convert_name(name) in (EMBEDDING, HEAD) else False
        if entry.shape != delta.shape and not (more_rows and entry.shape[1:] == delta.shape[1:]):
            raise InputError(_shape_error(str(self.base), name, entry.shape, delta.shape))

        def add() -> Tensor:
            total = self.checkpoint.get_tensor(name).clone()
            total[: entry.shape[0]] += base_checkpoint.get_tensor(name).to(total.dtype)
            return total

        return add

    def _plan_tower(self, tower: VisionTower) -> None:
        """Plan the tensors of a separate image encoder."""
        unknown = [clip_name for name, clip_name in tower.names.items() if name not in self.shapes]
        if unknown:
            raise InputError(
                f"{tower.name} holds {first_names(unknown)}, which its config does not have. Copy it again."
            )
        self.dropped |= dict.fromkeys(tower.dropped, tower.name)
        group = []
        for name, clip_name in tower.names.items():
            entry = tower.checkpoint.entries[clip_name]
            if entry.shape != self.shapes[name]:
                raise InputError(_shape_error(tower.name, clip_name, entry.shape, self.shapes[name]))
            self.mapped[name] = clip_name
            make = partial(tower.checkpoint.get_tensor, clip_name)
            group.append(PlannedTensor(name, entry.dtype, entry.shape, f"{tower.name}: {clip_name}", make))
        self.groups.append(group)

    def _plan_missing(self, config: LlavaConfig) -> None:
        """Plan what the original does not have: the second layer of the projector, and a tied head."""
        if config.tie_word_embeddings and HEAD not in self.mapped:
            self.missing[HEAD] = "the embedding (tied)"
        weight, bias = f"{PROJECTOR}.linear_2.weight", f"{PROJECTOR}.linear_2.bias"
        if config.projector_hidden_act != "linear":
            return
        if weight in self.mapped:
            raise InputError(
                f"{self.source} holds {self.mapped[weight]}, but mm_projector_type is 'linear' in its "
                "config.json (or missing): LLaVA-Med 1.5 has 'mlp2x_gelu'. Correct it."
            )
        width, dtype = self.shapes[bias], self.dtype
        self.missing[weight] = "the identity (the original's projector has one layer)"
        self.missing[bias] = "zeros"
        square = (*width, *width)
        self.groups.append(
            [
                PlannedTensor(weight, dtype, square, "identity", lambda: torch.eye(*width, dtype=dtype)),
                PlannedTensor(bias, dtype, width, "zeros", lambda: torch.zeros(width, dtype=dtype)),
            ]
        )

    def _check_base(self, base_checkpoint: OriginalCheckpoint) -> None:
        """Check that base and delta belong together: each tensor of the language model is in both."""
        extra = base_checkpoint.entries.keys() - self.checkpoint.entries.keys()
        unmatched = [name for name in base_checkpoint.entries if name in extra and not has_no_weights(name)]
        if unmatched:
            raise InputError(
                f"{self.base} holds {first_names(unmatched)}, which {self.source} has no delta for. Check --base."
            )
        language = [name for name in self.mapped if not name.startswith((TOWER, PROJECTOR))]
        lacking = [self.mapped[name] for name in language if name not in self.added]
        if lacking:
            raise InputError(
                f"{self.base} lacks {first_names(lacking)}, which {self.source} is a delta of. Check --base."
            )


def append_mean_rows(tensor: Tensor, rows: int) -> Tensor:
    """Grow an embedding or head to `rows` rows; each new row is the mean of the old ones.

    The logit of such a row is the mean of all logits, so it is below the largest, and 64 such tokens get at
    most 64 / 32000 of the probability (Jensen's inequality).

    Args:
        tensor: [old rows, width].
        rows: number of rows of the result.
    """
    total = torch.zeros(tensor.shape[1], dtype=torch.float64)
    for start in range(0, len(tensor), _ROWS):  # in blocks: a float64 copy of it all takes 1 GB in a 7B
        total += tensor[start : start + _ROWS].double().sum(0)
    mean = (total / len(tensor)).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])


def _shape_error(source: str, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    sizes = f"{list(shape)}, not {list(expected)}"
    return f"{source}: {name} is of shape {sizes}. Check that its files belong together."
