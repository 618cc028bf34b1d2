"""torch's names that are not public: the package works, and sees less at worst, on a torch that has none of them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")

import sageattention  # noqa: E402
from sageattention import torch_internals, tracing  # noqa: E402
from sageattention.backends import sdpa  # noqa: E402

PRIVATE = re.findall(r'_found\("([\w.]+)"', Path(torch_internals.__file__).read_text(encoding="utf-8"))


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as it is on a torch without any private name; the package uses it."""
    spec = importlib.util.spec_from_file_location("torch_internals_elsewhere", torch_internals.__file__)
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        for path in PRIVATE:
            *place, name = path.split(".")
            owner = torch
            for part in place:
                owner = getattr(owner, part)
            patch.delattr(owner, name, raising=False)  # a torch without CUDA has no streams
        spec.loader.exec_module(module)
    monkeypatch.setattr(tracing, "_internals", lambda: module)
    monkeypatch.setattr(sdpa, "torch_internals", module)
    return module


def test_the_names_are_there_in_this_torch() -> None:
    assert len(PRIVATE) == 7 and len(torch_internals.FAKE_TENSORS) == len(torch_internals.FUNCTIONAL_TENSORS) == 1
    assert not tracing.transformed() and torch_internals.dispatch_modes() == 0


def test_attention_without_them(without: ModuleType) -> None:
    q = torch.randn(1, 2, 40, 64)
    for variant in ("sdpa", "reference"):
        out = sageattention.sageattn(q, q, q, variant=variant)
        torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q), atol=0.03, rtol=0)
    with without.below_autograd():
        assert not torch.is_grad_enabled()


def test_tracing_is_noticed_without_them(without: ModuleType) -> None:
    seen = []
    torch.jit.trace(lambda x: seen.append(tracing.transformed()) or x + 1, torch.zeros(1))
    assert seen[0] and not tracing.transformed()
    with torch._subclasses.FakeTensorMode():
        assert tracing.traced(torch.zeros(1))
