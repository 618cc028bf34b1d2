"""Where Triton cannot build a kernel (no compiler, no ptxas, an old driver): a reason, once, and another attention may run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import matrix
import pytest
import torch

import sageattention
from sageattention import CudaError, KernelMissing, dispatch
from sageattention.device.capability import Capability
from sageattention.planning.plan import plan
from sageattention.planning.problem import Problem
from sageattention.variants import TRITON_FP16

host = pytest.importorskip("sageattention.backends.triton.host", reason="Triton has no wheel for this platform")


def failing_call(monkeypatch: pytest.MonkeyPatch, error: Exception) -> tuple[dispatch.Call, list[int]]:
    """A call whose first kernel launch raises `error`, and a list that grows with every launch."""
    launches: list[int] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]):
            def launch(*arguments: object, **options: object) -> None:
                launches.append(1)
                raise error

            return launch

    monkeypatch.setattr(host, "statistics", Kernel())
    monkeypatch.setattr(host, "_broken", {})
    t, _ = matrix.tensors(matrix.Case(64))
    problem = Problem.from_tensors(**t)
    chosen = plan(problem, Capability("cuda", 90, triton="native"), TRITON_FP16.name)
    return dispatch.Call(t["q"], t["k"], t["v"], None, problem, chosen, {}), launches


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        FileNotFoundError("ptxas"),
        ImportError("DLL load failed while importing cuda_utils"),
        subprocess.CalledProcessError(1, ["gcc"]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_cannot_be_built_is_missing_and_not_tried_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    call, launches = failing_call(monkeypatch, error)
    for _ in range(3):
        with pytest.raises(KernelMissing, match="can't build it here") as raised:
            call.run()
    assert type(error).__name__ in raised.value.reason
    assert len(launches) == 1


def test_another_form_is_still_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    call, launches = failing_call(monkeypatch, FileNotFoundError("ptxas"))
    for causal in (False, True, True):
        with pytest.raises(KernelMissing):
            replace(call, problem=call.problem._replace(causal=causal)).run()
    assert len(launches) == 2


def test_a_failing_launch_is_a_cuda_error_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    call, launches = failing_call(monkeypatch, RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))
    for _ in range(2):
        with pytest.raises(CudaError, match="illegal memory access"):
            call.run()
    assert len(launches) == 2


@pytest.mark.parametrize("said", ["device kernel image is invalid", "no kernel image is available for execution on the device"])
def test_a_kernel_that_the_driver_does_not_load_is_missing(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    call, launches = failing_call(monkeypatch, RuntimeError(f"Triton Error [CUDA]: {said}"))
    for _ in range(2):
        with pytest.raises(KernelMissing, match=said):
            call.run()
    assert len(launches) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_no_number_of_heads_is_too_large_for_a_grid(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    """CUDA's grids hold 65,535 blocks along y: 80,000 batches of 4:1 heads, or 4,096 windows of 20 heads, have more programs than that."""
    grids: dict[str, tuple[int, ...]] = {}

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]):
            grids[self.name] = grid
            return lambda *arguments, **options: None

    for name in ("statistics", "quantize_kv", "_attend_kernel"):
        monkeypatch.setattr(host, name, Kernel(name))
    card = Capability("cuda", 90, triton="native")
    if packed:
        q, (batch, heads) = torch.empty(4096 * 64, 20, 64, dtype=torch.float16, device="meta"), (4096, 20)
        cu_seqlens = torch.empty(4097, dtype=torch.int32, device="meta")
        problem = Problem.from_packed(q, q, q, cu_seqlens, cu_seqlens, 64, 64)
        host.run_packed(q, q, q, host.Packed(cu_seqlens, cu_seqlens), problem, plan(problem, card, TRITON_FP16.name))
    else:
        q, k = (torch.empty(80_000, n, 64, 64, dtype=torch.float16, device="meta") for n in (4, 1))
        problem, (batch, heads) = Problem.from_tensors(q, k, k), (80_000, 4)
        chosen = replace(plan(problem, card, TRITON_FP16.name), heads_per_group=80_000)
        host.run(dispatch.Call(q, k, k, None, problem, chosen, {}))
    assert all(len(grid) == 1 and 65_535 < grid[0] < 2**31 for grid in grids.values()) and len(grids) == 3
    assert grids["_attend_kernel"] == (batch * heads,)


def test_a_triton_of_another_release_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    call, _ = failing_call(monkeypatch, RuntimeError())
    monkeypatch.delitem(dispatch._BACKENDS, "triton", raising=False)
    monkeypatch.delattr(sageattention.backends.triton, "host")
    monkeypatch.setitem(sys.modules, "sageattention.backends.triton.host", None)  # importing it raises ImportError
    with pytest.raises(KernelMissing, match="can't be imported"):
        call.run()
