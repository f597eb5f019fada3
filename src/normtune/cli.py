"""The command line's entry point: bad input is one line on stderr and exit status 2."""

from __future__ import annotations

import os
import sys

import typer

# Importing the modules registers their commands.
from normtune.commands import (  # noqa: F401
    adapters,
    ask,
    bench,
    evaluate,
    import_models,
    inspect,
    serve,
    study,
    train,
)
from normtune.commands.app import app
from normtune.errors import InputError
from normtune.runtime import distributed


def main() -> None:
    """Entry point: bad input is one line on stderr and exit status 2."""
    if distributed.launched_count() > 1:  # read when torch is imported; its warnings come once a process
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        status = app(standalone_mode=False)
        distributed.shut_down()
    except (typer.Abort, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        status = 130
    except InputError as error:
        status = _refuse(str(error))
    except Exception as error:
        if distributed.another_failed():
            sys.exit(2)  # this one met the end of that one
        if not hasattr(
            error, "format_message"
        ):  # the mark of click's own errors; typer carries its click along
            raise
        if not error.format_message():
            error.show()  # type: ignore[attr-defined]  # no command given: the help
            status = 2
        else:
            status = _refuse(error.format_message())
    sys.exit(status if isinstance(status, int) else 0)


def _refuse(message: str) -> int:
    if distributed.should_report_failure():
        print("normtune: " + " ".join(message.split()), file=sys.stderr)
    return 2
