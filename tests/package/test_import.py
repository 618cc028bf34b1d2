"""An import of the package touches nothing, needs no torch, and works under another name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def test_import_without_torch():
    code = """
import sys
sys.modules["torch"] = None
sys.modules["triton"] = None
import sageattention
try:
    sageattention.sageattn(None, None, None)
except ImportError as error:
    print("ImportError", "torch" in str(error))
"""
    assert python(code) == "ImportError True"


def test_import_touches_neither_torch_nor_cuda():
    code = """
import sys
import sageattention
print([m for m in ("torch", "triton", "numpy") if m in sys.modules])
import torch
sageattention.available_variants("cpu")
x = torch.ones(1, 1, 4, 64)
sageattention.sageattn(x, x, x)
print(torch.cuda.is_initialized())
"""
    assert python(code) == "[]\nFalse"


def test_the_package_works_under_another_name(tmp_path):
    """The node pack loads it beside a foreign `sageattention`."""
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").touch()
    shutil.copytree(ROOT / "sageattention", tmp_path / "pack" / "ours", ignore=shutil.ignore_patterns("*.xz", "__pycache__"))
    (tmp_path / "sageattention.py").write_text("raise RuntimeError('the foreign package was imported')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch
from pack import ours
x = torch.ones(1, 1, 4, 64)
print(tuple(ours.sageattn(x, x, x, variant="reference").shape), "sageattention" in sys.modules)
"""
    assert python(code) == "(1, 1, 4, 64) False"
