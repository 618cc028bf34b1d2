"""Quantising K and V ahead of the attention: refusals, streams, when K and V are let go."""

from __future__ import annotations

import contextlib

import pytest

torch = pytest.importorskip("torch")

from api_calls import QUANTISED, qkv  # noqa: E402

import sageattention  # noqa: E402
from sageattention import Unsupported  # noqa: E402


@pytest.mark.parametrize("given", [None, (torch.zeros(1, 2, 3, 64),) * 2], ids=["None", "a tuple"])
def test_what_was_not_quantised_is_not_attended(given):
    with pytest.raises(Unsupported, match=r"^kv: got .*quantize_kv"):
        sageattention.attend(qkv()[0], given)


@pytest.mark.parametrize("capturing", [(), ("own",), ("own", "other")], ids=str)
def test_quantised_k_and_v_wait_for_the_stream_that_makes_them(capturing, monkeypatch):
    """By a stand-in for torch.cuda's streams; on a GPU test_gpu_behaviour has it."""
    from dataclasses import dataclass

    from sageattention.backends.call import QuantizedKV

    told, active = [], ["own"]

    @dataclass(frozen=True)
    class Stream:
        name: str

        def wait_stream(self, other):
            told.append((self.name, "waits for", other.name))

    class Buffer(torch.Tensor):
        def record_stream(self, stream):
            told.append(("a buffer is kept for", stream.name))

    @contextlib.contextmanager
    def inside(stream):
        active.append(stream.name)
        yield
        active.pop()

    @dataclass(frozen=True)
    class Kept(QuantizedKV):
        buffer: torch.Tensor
        slots: int

    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: active[-1] in capturing)
    kv = Kept(None, None, torch.zeros(3).as_subclass(Buffer), 3, made_on=Stream("other"))
    kv.join(Stream("other"))
    assert told == []
    kv.join(Stream("own"))
    waits = [("own", "waits for", "other")] if capturing != ("own",) else []  # work of before a capture is done by then
    assert told == [*waits, ("a buffer is kept for", "own")]
    Kept(None, None, torch.zeros(3), 3).join(Stream("own"))


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"k": torch.zeros(1, 2, 40)}, r"^k: got 3 dimensions"),
        ({"k": torch.zeros(1, 2, 40, 64, dtype=torch.float64)}, r"^k: its dtype is torch.float64"),
        ({"v": torch.zeros(1, 2, 40, 64, dtype=torch.float16)}, r"^v: its dtype is torch.float16, k's is torch.float32"),
        ({"v": torch.zeros(1, 2, 41, 64)}, r"^v: its shape is"),
        ({"k": torch.zeros(1, 2, 40, 300), "v": torch.zeros(1, 2, 40, 300)}, r"^k: its head_dim is 300"),
        ({"variant": "sageattn_qk_int8_pv_fp16_cuda"}, r"^k: sageattn_qk_int8_pv_fp16_cuda needs .* not on cpu"),
        ({"tensor_layout": "BHND"}, r"^tensor_layout: got 'BHND'"),
        ({"key_mask": [True] * 40}, r"^key_mask: got list"),
        ({"key_mask": torch.ones(1, 40)}, r"^key_mask: got torch.float32 of shape \(1, 40\), accepted is bool"),
        ({"key_mask": torch.ones(40, dtype=torch.bool)}, r"^key_mask: got torch.bool of shape \(40,\)"),
        ({"key_mask": torch.ones(2, 40, dtype=torch.bool)}, r"^key_mask: got torch.bool of shape \(2, 40\), .* = \[1, 40\]"),
        ({"key_mask": torch.ones(1, 41, dtype=torch.bool)}, r"^key_mask: got torch.bool of shape \(1, 41\)"),
        ({"key_mask": torch.ones(1, 40, dtype=torch.bool, device="meta")}, r"^key_mask: is on meta, k is on cpu"),
    ],
)
def test_quantising_k_and_v_names_what_is_at_fault(changes, fault):
    x = torch.zeros(1, 2, 40, 64)
    given = {"k": x, "v": x, "variant": "sageattn_qk_int8_pv_fp16_triton", **changes}
    with pytest.raises(Unsupported, match=fault):
        sageattention.quantize_kv(given.pop("k"), given.pop("v"), **given)


def test_a_call_that_no_kernel_computes_takes_nothing_over():
    q, k, v = qkv()
    released = []
    call = sageattention.prepare(q, k, v, variant=QUANTISED)
    call.run(release=lambda: released.append(True))
    assert released == [True] and call.k is k
