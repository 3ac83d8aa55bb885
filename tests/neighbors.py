"""Packages that masks and edges are exchanged with; few machines have all of them."""

import importlib
import warnings
from types import ModuleType

import pytest


def require(name: str) -> ModuleType:
    """Import a module of another package, or skip the test where that fails, as it also does by a part of the package.

    Each test that needs one has a twin with a stand-in, which runs everywhere.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except Exception as error:
            pytest.skip(f"{name} cannot be imported: {type(error).__name__}: {error}")
