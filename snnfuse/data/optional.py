"""The optional packages of the extra `data`, imported where they are used, never before."""

import importlib
from types import ModuleType


def require(name: str) -> ModuleType:
    """The module `name`, or an ImportError that says which extra holds it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'snnfuse.data needs {name} here ({error}): pip install "snnfuse[data]"') from error
