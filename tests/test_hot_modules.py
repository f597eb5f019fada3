"""Modules of a training step and of decoding: no new calls that make the host wait for the device.

`.item()`, `.tolist()`, `.cpu()`, `.numpy()`, `.nonzero()` and an index with a boolean mask copy values to the host or
need their number there. Each such call in a hot module is listed below with the reason why it is no problem.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "src" / "normtune"
HOT = (
    "adapters/multi/lora.py",
    "adapters/multi/norms.py",
    "adapters/multi/rows.py",
    "methods/output_modules.py",
    "methods/lora.py",
    "methods/norms.py",
    "methods/prefix.py",
    "models/answer_loss.py",
    "models/causal/attention.py",
    "models/causal/decoding.py",
    "models/causal/answering.py",
    "models/causal/family.py",
    "models/causal/frozen_layers.py",
    "models/causal/shared_prefix.py",
    "models/causal/step_graph.py",
    "models/families/gemma3.py",
    "models/families/miss.py",
    "models/families/paligemma.py",
    "models/families/qwen_vl.py",
    "models/family.py",
    "models/generation.py",
    "models/miss/model.py",
    "models/quantization.py",
    "training/layer_wrapping.py",
    "training/saved_activations.py",
    "training/trainer.py",
)
WAITING = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "masked_scatter"}
MASK = "a boolean index"
# (module, function, call): why it may stay; as many calls as reasons
ALLOWED = {
    ("adapters/multi/rows.py", "select", "tolist"): ["once for each prompt that ends, not once a token"],
    ("models/causal/decoding.py", "_continue_from", "tolist"): ["when prompts end; the rows are read on the host"],
    ("models/causal/answering.py", "_prompts", "tolist"): ["of tensors of the host, before the batch is copied"],
    ("models/causal/family.py", "encode_images", "cpu"): ["once an image: encoded images are kept on the host"],
    ("models/causal/family.py", "layout", "nonzero"): ["of a tensor of the host, before the batch is copied"],
    ("models/causal/frozen_layers.py", "states", "cpu"): ["once an image: its states are kept on the host"],
    ("models/families/miss.py", "_answers", "nonzero"): ["of a tensor of the host, before the batch is copied"],
    ("models/families/miss.py", "encode_images", "cpu"): ["once an image: encoded images are kept on the host"],
    ("models/families/miss.py", "states", "cpu"): ["once an image: its states are kept on the host"],
    ("models/families/qwen_vl.py", "positions", MASK): ["of tensors of the host, before the batch is copied"] * 2,
    ("models/generation.py", "arrived", "tolist"): ["of pinned memory, after the event of a step that is over"],
    ("models/generation.py", "beam_search", "tolist"): [
        "only with a score processor, which computes its rules on the host",
        "once a batch, at its end",
        "once a batch, at its end",
    ],
    ("training/trainer.py", "_mean_unlogged", "item"): ["once a log entry"],
    ("training/trainer.py", "trained_values", "cpu"): ["once a checkpoint"],
}


def waiting_calls(source: str) -> Iterator[tuple[str, str]]:
    """(innermost function, call) of everything that may wait."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITING:
            yield function, node.func.attr
        if function and isinstance(node, ast.Subscript) and any(map(_is_mask, _indices(node))):
            yield function, MASK
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "returns"):  # types, such as `list[int | None]`
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from visit(child, function)

    yield from visit(ast.parse(source), "")


def _indices(node: ast.Subscript) -> list[ast.expr]:
    return node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]


def _is_mask(index: ast.expr) -> bool:
    """A comparison, or a logical operation on tensors: `x[y > 0]`, `x[~y]`, `x[y & z]`."""
    operator = getattr(index, "op", None)
    return isinstance(index, ast.Compare) or isinstance(operator, ast.Invert | ast.BitAnd | ast.BitOr)


def test_calls_that_wait_for_the_device_have_a_reason() -> None:
    calls: dict[tuple[str, str, str], int] = {}
    for module in HOT:
        for function, call in waiting_calls((PACKAGE / module).read_text(encoding="utf-8")):
            calls[module, function, call] = calls.get((module, function, call), 0) + 1
    expected = {place: len(reasons) for place, reasons in ALLOWED.items()}
    assert calls == expected, "keep values on the device, or add the call with the reason why it does not wait"


def test_the_calls_are_recognised() -> None:
    source = """
def step(x, mask):
    x[mask > 0].sum().item()
    x[1:, ~mask] = x.cpu()
    y = x[mask & x][0, :2].tolist()
    return x.item, x[0], x[..., None], [item for item in y], x.nonzero()
"""
    calls = sorted(call for function, call in waiting_calls(source) if function == "step")
    assert calls == [MASK, MASK, MASK, "cpu", "item", "nonzero", "tolist"]
