"""Real programs call the package: diffusers' dispatcher, cache-dit's, yunchang's ring and Ulysses attention (marker clients)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
from conftest import CLIENTS

pytestmark = pytest.mark.clients


@pytest.mark.parametrize("program", ["diffusers", "cache_dit", "yunchang"])
def test_a_program_runs_on_ours(program, tmp_path):
    """In a process of its own, with the package as the pack's finder gives it; see clients.py."""
    environment = {
        **os.environ, "PYTHONPATH": str(CLIENTS), "SAGEATTENTION_VARIANT": "reference", "TRITON_INTERPRET": "1",
        "RENDEZVOUS": str(tmp_path / "rendezvous"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).parents[1] / "clients.py"), program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
