"""Optional imports that say what to install, and the error of every missing thing."""

import importlib
from types import ModuleType

__all__ = ["MissingError", "require"]


class MissingError(FileNotFoundError):
    """A file, model or optional package that was asked for is not there (exit code 3 on the command line)."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module and return it.

    Raises MissingError, naming the extra to install, where the module (or something that it imports) is absent. A
    module that is there but broken raises its own error: hiding it would send the reader to the wrong cause.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingError(f"{module} is not installed; install it with: pip install 'interp[{extra}]'") from error
