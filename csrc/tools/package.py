"""Modules of sageattention for the build, without the package itself, which would want torch."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "sageattention"
KERNELS = PACKAGE / "kernels"
_NAME = "_sageattention_tables"


def import_module(name: str) -> types.ModuleType:
    """`sageattention.NAME`; it and all that it imports need the standard library alone."""
    if _NAME not in sys.modules:
        package = types.ModuleType(_NAME)
        package.__path__ = [str(PACKAGE)]
        sys.modules[_NAME] = package
    return importlib.import_module(f"{_NAME}.{name}")
