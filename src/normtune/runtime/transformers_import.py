"""Imports transformers without torch's compiler, distributed tensors and SciPy, for commands that use none of them.

`import transformers.modeling_utils` takes 2.3 s. Two imports take 1.6 s of it: `torch._dynamo`, with which
transformers marks kernels for the compiler, and `torch.distributed.tensor`. SciPy, where it is installed, takes
0.6 s more, for losses of object detection. Only the command line calls `import_transformers`; the library leaves
transformers as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_NEED_COMPILER = ("torchao", "torchvision")  # transformers imports them if they are installed


def import_transformers() -> None:
    """Import transformers' model code, if it is not imported yet, for a process that runs alone.

    The compiler can still be imported afterwards. It then traces the few functions that transformers would have
    marked (those of its FlexAttention, FP8 and mixture-of-experts kernels) as it traces any other.
    """
    if "transformers.modeling_utils" in sys.modules or _COMPILER in sys.modules:
        return
    if any(find_spec(package) is not None for package in _NEED_COMPILER):
        return
    import torch.distributed

    is_available = torch.distributed.is_available
    sys.modules[_COMPILER] = _without_marks()
    torch.distributed.is_available = lambda: False  # as in a torch that is built without it
    try:
        with without_scipy():
            import transformers.modeling_layers
            import transformers.modeling_utils  # noqa: F401
    finally:
        torch.distributed.is_available = is_available
        del sys.modules[_COMPILER]


@contextmanager
def without_scipy() -> Iterator[None]:
    """Inside the block, modules of transformers are imported as if SciPy were not installed."""
    import transformers.utils

    has_scipy = transformers.utils.is_scipy_available
    transformers.utils.is_scipy_available = lambda: False
    try:
        yield
    finally:
        transformers.utils.is_scipy_available = has_scipy


def _without_marks() -> ModuleType:
    """A substitute for `torch._dynamo`: its marks return the function unchanged."""

    def unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
        return unchanged if function is None else function

    spec = find_spec(_COMPILER)
    assert spec is not None
    module: Any = ModuleType(_COMPILER)
    module.__path__ = spec.submodule_search_locations  # one small submodule is imported as it is
    module.allow_in_graph = module.assume_constant_result = module.disable = unchanged
    return module  # type: ignore[no-any-return]
