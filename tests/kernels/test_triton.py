"""The Triton variant: interpreted on a CPU, compiled for every architecture without a GPU, and (marker gpu) for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import matrix
import pytest

from sageattention.kernels.architectures import ARCHITECTURES
from sageattention.variants import TRITON_FP16

HERE = Path(__file__).parents[1]
NAME = TRITON_FP16.name

pytest.importorskip("triton", reason="Triton has no wheel for this platform")


def child(code: str, interpret: bool, timeout: int = 600) -> str:
    """Run a test's body in a process of its own: whether Triton interprets is settled when it is imported."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    env["OMP_NUM_THREADS"] = "1"  # small tensors: a second thread costs more in waiting than it computes
    env["PYTHONPATH"] = os.pathsep.join((str(HERE), str(HERE.parent)))
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("part", ["cases", "packed", "halves", "masked_keys", "groups", "finite", "any_size", "tiles"])
def test_interpreted(part: str) -> None:
    assert "passed" in child(f"import triton_interpreted as t; t.{part}(); print('passed')", interpret=True)


@pytest.mark.parametrize("arch", [75, 80, 89, 90, 120])
def test_compiles_without_a_gpu(arch: int) -> None:
    rows = [json.loads(line) for line in child(f"import triton_compile as t; t.main([{arch}])", False).splitlines()]
    assert {row["kernel"] for row in rows} == {"statistics", "quantize_kv", "attend"}
    assert {row["head_dim"] for row in rows if row["kernel"] == "attend"} == ({64, 128, 256} if arch >= 80 else {64})
    for row in rows:
        assert row["shared"] <= ARCHITECTURES[arch].shared_of_block, row
        if row["kernel"] == "attend":  # Triton has no INT8 dot for Turing; everywhere else it must be there
            assert row["int8_mma"] == (arch != 75), row


@pytest.mark.gpu
@pytest.mark.parametrize("case", matrix.full(), ids=str)
def test_matrix_on_gpu(case: matrix.Case) -> None:
    matrix.check(case, NAME, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["packed", "halves", "masked_keys", "groups", "finite"])
def test_parts_on_gpu(part: str) -> None:
    import triton_interpreted

    getattr(triton_interpreted, part)(device="cuda")
