"""Where Triton cannot build a kernel (no compiler, no ptxas, an old driver): a reason, once, and another attention may run."""

from __future__ import annotations

import subprocess
import sys

import matrix
import pytest

import sageattention
from sageattention import CudaError, KernelMissing, dispatch
from sageattention.backends.call import Call
from sageattention.device.capability import Capability
from sageattention.planning.plan import plan
from sageattention.planning.problem import Problem
from sageattention.variants import TRITON_FP16

host = pytest.importorskip("sageattention.backends.triton.host", reason="Triton has no wheel for this platform")


def failing_call(monkeypatch: pytest.MonkeyPatch, error: Exception) -> tuple[Call, list[int]]:
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
    return Call(t["q"], t["k"], t["v"], None, problem, chosen, {}), launches


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
            dispatch.run(call)
    assert type(error).__name__ in raised.value.reason
    assert len(launches) == 1


def test_another_form_is_still_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    call, launches = failing_call(monkeypatch, FileNotFoundError("ptxas"))
    for causal in (False, True, True):
        with pytest.raises(KernelMissing):
            dispatch.run(call._replace(problem=call.problem._replace(causal=causal)))
    assert len(launches) == 2


def test_a_failing_launch_is_a_cuda_error_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    call, launches = failing_call(monkeypatch, RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))
    for _ in range(2):
        with pytest.raises(CudaError, match="illegal memory access"):
            dispatch.run(call)
    assert len(launches) == 2


def test_a_triton_of_another_release_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    call, _ = failing_call(monkeypatch, RuntimeError())
    monkeypatch.delattr(sageattention.backends.triton, "host")
    monkeypatch.setitem(sys.modules, "sageattention.backends.triton.host", None)  # importing it raises ImportError
    with pytest.raises(KernelMissing, match="can't be imported"):
        dispatch.run(call)
    with pytest.raises(KernelMissing, match="can't be imported"):
        dispatch._triton_host()
