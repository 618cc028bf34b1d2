"""Loads the pack the way ComfyUI does: from its folder, under a module name that is a path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def load_pack(root: Path = ROOT) -> ModuleType:
    """The pack's root module; its parts are attributes (`pack.nodes.adapter`, `pack.sageattention.dispatch`)."""
    name = str(root).replace(".", "_x_")
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, root / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
