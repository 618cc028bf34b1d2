"""torch's names that are not public: the package works, and sees less at worst, on a torch that has none of them."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")

import sageattention  # noqa: E402
from sageattention import torch_internals, tracing  # noqa: E402
from sageattention.backends import sdpa  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
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
    assert len(PRIVATE) == 11 and len(torch_internals.FAKE_TENSORS) == len(torch_internals.FUNCTIONAL_TENSORS) == 1
    assert not tracing.transformed() and torch_internals.dispatch_modes() == 0


def test_attention_without_them(without: ModuleType) -> None:
    q = torch.randn(1, 2, 40, 64)
    for variant in ("sdpa", "reference"):
        out = sageattention.sageattn(q, q, q, variant=variant)
        torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q), atol=0.03, rtol=0)
    with without.below_autograd():
        assert not torch.is_grad_enabled()


def test_memory_counts_as_another_s_without_them(without: ModuleType) -> None:
    assert torch_internals.alone(torch.zeros(1)) and not without.alone(torch.zeros(1))


def test_tracing_is_noticed_without_them(without: ModuleType) -> None:
    seen = []
    torch.jit.trace(lambda x: seen.append(tracing.transformed()) or x + 1, torch.zeros(1))
    assert seen[0] and not tracing.transformed()
    with torch._subclasses.FakeTensorMode():
        assert tracing.traced(torch.zeros(1))


OPTIONS = {"is_causal": False, "scale": 0.125, "enable_gqa": False}


class _Card:
    """Stands for tensors on a card where torch prefers cuDNN, and for torch's order of backends."""

    device = torch.device("cpu")

    def __init__(self, order: list[int], chosen: list[int]):
        self.order, self.chosen, self.seen = order, chosen, []

    def choose(self, *qkv: torch.Tensor) -> int:
        assert {(t.dtype, t.shape[1]) for t in qkv} == {(torch.float16, 1)}  # what every backend takes, be the call's what they may
        if self.chosen:
            self.order, self.chosen = self.chosen, []
        return self.order[0]

    def attend(self, *args: object, **kwargs: object) -> str:
        self.seen.append(list(self.order))
        return "out"


@pytest.mark.parametrize(
    ("order", "chosen", "while_attending"),
    [
        ([1, 2, 0, 3, 4], [3, 1, 2, 0, 4], [3, 1, 2, 0, 4]),  # torch's first call: it looks at the card, and keeps what it finds
        ([1, 2, 0, 3, 4], [], [3, 1, 2, 0, 4]),  # torch has forgotten it
        ([1, 3, 2], [], [1, 3, 2]),  # somebody's own order
    ],
)
def test_cudnn_is_tried_first_where_torch_prefers_it(monkeypatch, order, chosen, while_attending) -> None:
    card = _Card(order, chosen)
    for name, stand_in in (
        ("_backend_order", lambda: card.order), ("_set_backend_order", lambda new: setattr(card, "order", new)),
        ("_choose_backend", card.choose), ("attention", card.attend), ("_settled", False),
    ):  # fmt: skip
        monkeypatch.setattr(torch_internals, name, stand_in)
    after = chosen or order
    for _ in range(2):
        assert torch_internals.attention_by_cudnn(card, card, card, None, **OPTIONS) == "out" and card.order == after
    assert card.seen == [while_attending] * 2


def test_the_order_is_left_on_an_error(monkeypatch) -> None:
    card = _Card([1, 2, 0, 3, 4], [])
    monkeypatch.setattr(torch_internals, "_backend_order", lambda: card.order)
    monkeypatch.setattr(torch_internals, "_set_backend_order", lambda new: setattr(card, "order", new))
    monkeypatch.setattr(torch_internals, "_choose_backend", card.choose)
    monkeypatch.setattr(torch_internals, "_settled", False)
    with pytest.raises(TypeError):
        torch_internals.attention_by_cudnn(card, card, card, None, **OPTIONS)  # no tensors
    assert card.order == [1, 2, 0, 3, 4]


@pytest.mark.parametrize(("capability", "version", "prefers"), [((9, 0), 91501, True), ((9, 0), 91400, False), ((8, 9), 92000, False)])
def test_on_which_cards_torchprefers_cudnn(monkeypatch, capability, version, prefers) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch_internals, "_cudnn_version", lambda: version)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert torch_internals.prefers_cudnn.__wrapped__(0) is prefers
    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    assert torch_internals.prefers_cudnn.__wrapped__(0) is False


@pytest.mark.gpu
def test_comfyui_s_way_to_call_torch_does_not_slow_ours_down() -> None:
    """In a process whose first call has the order of backends set around it."""
    if not torch_internals.prefers_cudnn(0):
        pytest.skip("torch does not prefer cuDNN on this card")
    code = """
import torch, sageattention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
q = torch.randn(1, 4, 1024, 128, device="cuda", dtype=torch.bfloat16)
with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
    torch.nn.functional.scaled_dot_product_attention(q, q, q)
with profile(activities=[ProfilerActivity.CUDA]) as seen:
    sageattention.sageattn(q, q, q, variant="sdpa")
    torch.cuda.synchronize()
print([event.key for event in seen.key_averages()])
"""
    kernels = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert "cudnn" in kernels, kernels
