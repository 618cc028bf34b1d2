"""The kernel that zeroes fully masked rows beside torch's attention: compiled for the host and run lane by lane, and on a GPU."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from lane_compiler import COMPILER, compiled

from sageattention import sageattn
from sageattention.backends import sdpa
from sageattention.backends.cuda import driver, masked_rows
from sageattention.device import capability
from sageattention.device.capability import Capability
from sageattention.kernels.params import ZeroMaskedRowsParams
from sageattention.kernels.table import ZERO_MASKED_ROWS
from sageattention.planning.problem import Problem

B, H, NQ, NK = 2, 3, 45, 70
SHAPES = [(B, H, NQ, NK), (1, 1, NQ, NK), (B, 1, 1, NK), (1, H, NQ, 1), (1, 1, 1, NK)]
DTYPES = [torch.bool, torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("needs g++ on Linux")
    e = ZERO_MASKED_ROWS
    body = f"{{ run_grid(blocks, {e.threads}, [&] {{ {e.expression}(*p); }}); }}\n"
    function = f'extern "C" void {e.symbol}(const {e.params.__name__}* p, unsigned blocks) {body}'
    return compiled(90, tmp_path_factory.mktemp("rows"), ("kernel/zero_masked_rows.cuh",), function)


@pytest.fixture
def card(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A card on the host; a list that grows with every launch."""
    launched: list[int] = []

    def launch(device: int, stream: int, launches: tuple) -> None:
        for symbol, x, _, _, params, overlap in launches:
            assert len(params) == ctypes.sizeof(ZeroMaskedRowsParams) and not overlap
            launched.append(x)
            getattr(library, symbol)(ctypes.create_string_buffer(params, len(params)), ctypes.c_uint(x))

    monkeypatch.setattr(masked_rows, "_kernel", lambda index: ZERO_MASKED_ROWS.symbol)
    monkeypatch.setattr(masked_rows.torch_internals, "current_stream", lambda index: 0)
    monkeypatch.setattr(driver, "launch", launch)
    return launched


def masks(dtype: torch.dtype, shape: tuple[int, ...], device: str = "cpu") -> torch.Tensor:
    """Rows that see nothing, one key anywhere, only their own or the first, or many."""
    g = torch.Generator().manual_seed(sum(shape))
    keep = torch.rand(shape, generator=g) < torch.rand(*shape[:3], 1, generator=g).pow(4)
    if shape[2] > 30:
        keep[:, :, 3:9] = False
        keep[:, :, 5, -1 if shape[3] > 1 else 0] = True
        keep[:, :, 11] = False
        keep[:, :, 11, min(11, shape[3] - 1)] = True
        keep[:, :, 32:40] = False
    elif shape[0] > 1 or shape[3] > 1:
        keep[0] = False
    keep = keep.to(device)
    return keep if dtype == torch.bool else torch.randn(shape, device=device).to(dtype).masked_fill(~keep, -torch.inf)


def problem(causal: bool, head_dim: int = 40) -> Problem:
    return Problem(B, H, H, NQ, NK, head_dim, "float16", "cuda", 0, causal=causal, mask="bool")


def hidden(mask: torch.Tensor, causal: bool) -> torch.Tensor:
    """[B, H, Nq]: whether a row sees no key."""
    keep = mask if mask.dtype == torch.bool else mask != -torch.inf
    keep = keep.expand(B, H, NQ, NK)
    return ~(keep.cpu() & torch.ones(NQ, NK).tril().bool() if causal else keep.cpu()).any(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_that_see_nothing_become_zero_and_no_other_byte_changes(dtype, shape, card):
    mask, seen_hidden = masks(dtype, shape), 0
    for causal, out_dtype, nhd in itertools.product((False, True), (torch.float16, torch.float32), (False, True)):
        room = torch.randn(B, H + 1, NQ + 1, 48).to(out_dtype)
        before = room.clone()
        out = (room.transpose(1, 2).contiguous().transpose(1, 2) if nhd else room)[:, :H, :NQ, :37]
        assert masked_rows.zero(out, mask, problem(causal, 37), {})
        rows = hidden(mask, causal)
        expected = before[:, :H, :NQ, :37].masked_fill(rows[..., None], 0)
        assert torch.equal(out, expected)
        if not nhd:
            room[:, :H, :NQ, :37] = before[:, :H, :NQ, :37]
            assert torch.equal(room, before)
        seen_hidden += int(rows.sum())
    assert seen_hidden or shape == (1, H, NQ, 1)


def test_strided_masks(card):
    wide = masks(torch.bfloat16, (B, H, NQ, NK)).repeat(1, 1, 2, 3)
    for mask in (wide[:, :, ::2, 1 : 3 * NK : 3], wide[:, :1, :NQ, :NK].expand(B, H, NQ, NK), wide[:, :, :NQ, 0:1]):
        out = torch.randn(B, H, NQ, 64).half()
        expected = out.masked_fill(hidden(mask, False)[..., None], 0)
        assert masked_rows.zero(out, mask, problem(False, 64), {}) and torch.equal(out, expected)


def test_a_call_like_an_earlier_one_is_bound_once(card, monkeypatch):
    mask, bound, made = masks(torch.bool, (B, H, NQ, NK)), {}, []
    real = masked_rows._bind
    monkeypatch.setattr(masked_rows, "_bind", lambda *given: made.append(1) or real(*given))
    for _ in range(3):
        masked_rows.zero(torch.randn(B, H, NQ, 64).half(), mask, problem(False, 64), bound)
    masked_rows.zero(torch.randn(B, NQ, H, 64).half().transpose(1, 2), mask, problem(False, 64), bound)  # torch's layouts vary
    assert (len(made), len(card)) == (2, 4)


@pytest.mark.parametrize("why", ["no kernel", "channels apart", "fp64"])
def test_where_the_kernel_cannot_do_it_nothing_is_done(why, card, monkeypatch):
    mask, out = masks(torch.bool, (B, H, NQ, NK)), torch.randn(B, H, NQ, 64)
    if why == "no kernel":
        monkeypatch.setattr(masked_rows, "_kernel", lambda index: None)
    elif why == "channels apart":
        out = out.mT.contiguous().mT
    else:
        mask = torch.zeros(NQ, NK, dtype=torch.float64)[None, None]
    before = out.clone()
    assert not masked_rows.zero(out, mask, problem(False, 64), {}) and torch.equal(out, before) and not card


def test_only_a_card_that_is_nvidias_has_the_kernel(monkeypatch):
    monkeypatch.setattr(driver, "kernel", lambda index, image, symbol, variant: image.path)
    found = {}
    for card in (Capability("cuda", 75), Capability("cuda", 87), Capability("cuda", 90), Capability("cuda", 121), Capability("cuda", 130),
                 Capability("cuda", 70), Capability("rocm"), Capability("zluda")):  # fmt: skip
        monkeypatch.setattr(capability, "of_device", lambda device, index: card)  # noqa: B023
        masked_rows._kernel.cache_clear()
        found[card.arch or card.device] = masked_rows._kernel(0)
    masked_rows._kernel.cache_clear()
    assert {name: path and path.split("/")[0] for name, path in found.items()} == {
        75: "sm_75", 87: "sm_86", 90: "sm_90a", 121: "sm_120", 130: "compute_89", 70: None, "rocm": None, "zluda": None,
    }  # fmt: skip


def test_sdpa_takes_the_kernel_where_it_can_and_torchs_operators_else(card, monkeypatch):
    """A call on a CPU that says it is on a card; whatever torch's attention left in the rows becomes 0."""
    q, mask = torch.randn(B, H, NQ, 64), masks(torch.bool, (B, H, NQ, NQ))
    call = sdpa.PreparedCall(q, q, q, mask, problem(True, 64)._replace(len_kv=NQ), None, {})
    spoiled = torch.randn(B, H, NQ, 64)
    monkeypatch.setattr(sdpa.torch_internals, "attention", lambda *given, **options: spoiled.clone())
    rows = ~(mask & torch.ones(NQ, NQ).tril().bool()).any(-1)
    for kernel in (True, False):
        if not kernel:
            call.problem = call.problem._replace(device="cpu")
        out, _ = sdpa.run(call)
        assert torch.equal(out, spoiled.masked_fill(rows[..., None], 0))
    assert len(card) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_masked_rows_are_zero_on_every_backend_of_torchs(dtype, shape, layout):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mask = masks(dtype, shape, "cuda")
    assert masked_rows._kernel(0) is not None
    for backends in ([SDPBackend.CUDNN_ATTENTION], [SDPBackend.EFFICIENT_ATTENTION], [SDPBackend.MATH], None):
        for causal in (False, True):
            q, k, v = (torch.randn(B, H, n, 64, device="cuda", dtype=torch.float16) for n in (NQ, NK, NK))
            given = (q, k, v) if layout == "HND" else [t.transpose(1, 2).contiguous() for t in (q, k, v)]
            if backends:
                with sdpa_kernel(backends):
                    try:
                        out = sageattn(*given, layout, causal, attn_mask=mask, variant="sdpa")
                    except RuntimeError as error:  # this backend does not take such a call
                        assert "No available kernel" in str(error), error
                        continue
            else:
                out = sageattn(*given, layout, causal, attn_mask=mask, variant="sdpa")
            out = out if layout == "HND" else out.transpose(1, 2)
            rows = hidden(mask, causal).cuda()
            assert out.isfinite().all() and not out[rows].any() and (out[~rows].abs().sum(-1) > 0).all()
