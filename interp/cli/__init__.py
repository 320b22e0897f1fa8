"""The commands `interp` and `sae`.

stdout carries results (with --json: one JSON document), stderr everything else. Exit codes: 0 done, 1 failed, 2 usage,
3 a model, file or extra is missing, 130 / 143 interrupted or terminated after saving. --debug anywhere shows the
traceback of an error.
"""

import os
import signal
import sys
from typing import Any

import typer

from interp.cli.common import FAILED, INTERRUPTED, MISSING, TERMINATED, USAGE, say


class _Terminated(BaseException):
    """SIGTERM: leaves through every `finally`, as Ctrl-C does."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _run(application: typer.Typer) -> None:
    debug = "--debug" in sys.argv[1:]
    sys.argv[1:] = [arg for arg in sys.argv[1:] if arg != "--debug"]
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # threads that spin at barriers slow each other tenfold on a busy machine; read when torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        application()
    except (KeyboardInterrupt, _Terminated) as stop:
        say("interrupted: what was finished is kept" if isinstance(stop, KeyboardInterrupt) else "terminated")
        sys.exit(INTERRUPTED if isinstance(stop, KeyboardInterrupt) else TERMINATED)
    except Exception as error:
        if debug:
            raise
        say(f"error: {_first_line(error)}")
        sys.exit(_exit_code(error))


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    known = isinstance(error, (ValueError, LookupError, OSError, RuntimeError, TypeError, ArithmeticError, MemoryError))
    return text if known and text else f"{type(error).__name__}: {text} (run again with --debug for the traceback)"


def _exit_code(error: Exception) -> int:
    if type(error).__name__ == "HookPointError":  # not imported: errors may come before torch is needed
        return USAGE
    return MISSING if isinstance(error, FileNotFoundError) else FAILED


def main() -> None:
    """Run the command `interp`."""
    from interp.cli.concepts import app

    _run(app)


def sae_main() -> None:
    """Run the command `sae`."""
    from interp.cli.sae import app

    _run(app)
