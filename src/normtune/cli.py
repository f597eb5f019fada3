"""The entry point of the command line. Bad input prints one line on stderr and exits with status 2."""

from __future__ import annotations

import os
import sys

import typer

# Importing these modules registers their commands.
from normtune.commands import (  # noqa: F401
    adapters,
    advise,
    ask,
    bench,
    doctor,
    evaluate,
    federate,
    import_models,
    init,
    inspect,
    serve,
    split,
    study,
    train,
)
from normtune.commands.app import app
from normtune.errors import InputError
from normtune.runtime import distributed


def main() -> None:
    """Run the command line and exit: 0 on success, 2 on bad input, 130 on an interrupt."""
    # Set before torch is imported, or every process of a distributed run prints the same warnings.
    if distributed.launched_count() > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        status = app(standalone_mode=False)
        distributed.shut_down()
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        status = 130
    except InputError as error:
        status = _report(str(error))
    except Exception as error:
        if distributed.has_another_failed():
            sys.exit(2)  # this error follows from the other process's error, which that process reports
        # Only errors of click have this method. Their class is not imported: typer has its own copy of click.
        if not hasattr(error, "format_message"):
            raise
        if not error.format_message():
            error.show()  # type: ignore[attr-defined]  # no command was given: prints the help
            status = 2
        else:
            status = _report(error.format_message())
    sys.exit(status if isinstance(status, int) else 0)


def _report(message: str) -> int:
    if distributed.should_report_failure():
        print("normtune: " + " ".join(message.split()), file=sys.stderr)
    return 2
