"""The kernels for dense masks beside torch's attention: compiled for the host and run lane by lane, and on a GPU."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from lane_compiler import COMPILER, compiled

from sageattention import sageattn
from sageattention.backends import sdpa
from sageattention.backends.cuda import driver, lone, sdpa_mask
from sageattention.device import capability
from sageattention.device.capability import Capability
from sageattention.kernels.table import NARROW_KEYS, NARROW_MASK, REPAIR_ROWS
from sageattention.numerics.constants import MASK_LIMIT
from sageattention.planning.problem import Problem

B, H, NQ, NK = 2, 3, 45, 70
SHAPES = [(B, H, NQ, NK), (1, 1, NQ, NK), (B, 1, 1, NK), (1, H, NQ, 1), (1, 1, 1, NK)]
DTYPES = [torch.bool, torch.float16, torch.bfloat16, torch.float32]
V = torch.full((B, H, NK, 64), torch.nan)  # where no value is read


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("needs g++ on Linux")
    functions = "".join(
        f'extern "C" void {e.symbol}(const {e.params.__name__}* p, unsigned blocks) '
        f"{{ run_grid(blocks, {e.threads}, [&] {{ {e.expression}(*p); }}); }}\n"
        for e in (NARROW_MASK, REPAIR_ROWS)
    )
    return compiled(90, tmp_path_factory.mktemp("mask"), ("kernel/sdpa_mask.cuh",), functions)


@pytest.fixture
def card(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A card on the host; a list that grows with every launch."""
    monkeypatch.setattr(sdpa.torch_internals, "prefers_cudnn", lambda index: False)  # torch has no such card
    launched: list[int] = []

    def launch(device: int, stream: int, launches: tuple) -> None:
        for symbol, x, _, _, params, overlap in launches:
            entry = next(e for e in (NARROW_MASK, REPAIR_ROWS) if e.symbol == symbol)
            assert len(params) == ctypes.sizeof(entry.params) and not overlap
            launched.append(x)
            getattr(library, symbol)(ctypes.create_string_buffer(params, len(params)), ctypes.c_uint(x))

    monkeypatch.setattr(lone, "kernel", lambda index, entry: entry.symbol)
    monkeypatch.setattr(lone.torch_internals, "current_stream", lambda index: 0)
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
        sdpa_mask.repair(out, mask, V, torch.inf, problem(causal, 37), {})
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
        sdpa_mask.repair(out, mask, V, torch.inf, problem(False, 64), {})
        assert torch.equal(out, expected)


def test_a_call_like_an_earlier_one_is_bound_once(card, monkeypatch):
    mask, bound, made = masks(torch.bool, (B, H, NQ, NK)), {}, []
    real = sdpa_mask._bind_repair
    monkeypatch.setattr(sdpa_mask, "_bind_repair", lambda *given: made.append(1) or real(*given))
    for _ in range(3):
        sdpa_mask.repair(torch.randn(B, H, NQ, 64).half(), mask, V, torch.inf, problem(False, 64), bound)
    out = torch.randn(B, NQ, H, 64).half().transpose(1, 2)  # torch's layouts vary
    sdpa_mask.repair(out, mask, V, torch.inf, problem(False, 64), bound)
    assert (len(made), len(card)) == (2, 4)


BIASES = [0.0, -0.0, 1.5, -3.25, 1e-40, 65504.0, -65504.0, 7e4, -7e4, 1e38, -1e38, 3e38, -3e38, -torch.inf, torch.nan, 0.1, -1000.3]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("target", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 3, NARROW_KEYS + 5), (2, 3, 5, 17), (2, 1, 1, 40)], ids=str)
def test_a_narrowed_mask_is_what_torchs_operators_make_of_it(dtype, target, shape, card):
    room = torch.tensor(BIASES).repeat(2 * 3 * 5 * (NARROW_KEYS + 5) // len(BIASES) + 1)[: 2 * 3 * 5 * (NARROW_KEYS + 5)]
    room = room.view(2, 3, 5, -1).to(dtype)
    limit = min(torch.finfo(dtype).max, torch.finfo(target).max, MASK_LIMIT)
    mask = room[: shape[0], : shape[1], : shape[2], : shape[3]]
    for given in (mask, mask.contiguous(), mask[..., ::3], mask[:, :, :1].expand(-1, -1, 4, -1)):
        expected = torch.where(given == -torch.inf, given, given.float().clamp(-limit, limit)).to(target)
        found = sdpa_mask.narrow(given, target, limit, problem(False), {})
        assert found.is_contiguous() and (found == -torch.inf).equal(given == -torch.inf)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("out_dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("mask_dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("kv_heads", [1, H])
def test_rows_beyond_the_reach_of_torchs_backends_are_means_of_v(mask_dtype, out_dtype, kv_heads, card):
    """Rows: 1 low throughout, 2 low where not hidden, 3 low but for one plain key, 4 with two high keys and a NaN for it, 5 high but
    taken right by torch, 6 of NaN that is the inputs'."""
    torch.manual_seed(0)
    v = torch.randn(B, NK + 1, kv_heads, 64).to(out_dtype).transpose(1, 2)[:, :, :NK, :37]
    mask = torch.randn(B, 1, NQ, NK).to(mask_dtype)
    mask[:, :, 1:4] = torch.finfo(mask_dtype).min
    mask[:, :, 1, 3] = -2e38
    mask[:, :, 2, 1::2] = -torch.inf
    mask[:, :, 3, 20] = 4.0
    mask[:, :, 4:6, 1] = mask[:, :, 4:6, 9] = 3e38
    out = torch.randn(B, H, NQ, 37).to(out_dtype)
    out[:, :, 4] = out[:, :, 6] = torch.nan
    expected = out.clone()
    per_head = v.float().repeat_interleave(H // kv_heads, 1)
    expected[:, :, 1], expected[:, :, 2] = per_head.mean(2).to(out_dtype), per_head[:, :, ::2].mean(2).to(out_dtype)
    expected[:, :, 4] = per_head[:, :, 1:10:8].mean(2).to(out_dtype)
    sdpa_mask.repair(out, mask, v, MASK_LIMIT, problem(False, 37)._replace(heads_kv=kv_heads), {})
    torch.testing.assert_close(out, expected, rtol=1e-2 if out_dtype != torch.float32 else 1e-5, atol=1e-5, equal_nan=True)
    untouched = [0, 3, 5, *range(7, NQ)]
    assert torch.equal(out[:, :, untouched], expected[:, :, untouched]) and len(card) == 1


def test_a_mean_of_the_largest_numbers_is_finite(card):
    v = torch.full((B, H, NK, 40), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    mask, out = torch.full((1, 1, 1, NK), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16), torch.zeros(B, H, NQ, 40).bfloat16()
    sdpa_mask.repair(out, mask, v, MASK_LIMIT, problem(False), {})
    torch.testing.assert_close(out, v[:, :, :1].expand_as(out))


@pytest.mark.parametrize("why", ["no kernel", "channels apart", "fp64"])
def test_where_the_kernels_cannot_do_it_torchs_operators_do(why, card, monkeypatch):
    mask, v = masks(torch.bool, (B, H, NQ, NK)), torch.randn(B, H, NK, 64)
    assert sdpa_mask.repairs(mask, v, problem(False))
    if why == "no kernel":
        monkeypatch.setattr(lone, "kernel", lambda index, entry: None)
    elif why == "channels apart":
        v = v.mT.contiguous().mT
    else:
        mask = torch.zeros(NQ, NK, dtype=torch.float64)[None, None]
    assert not sdpa_mask.repairs(mask, v, problem(False))
    if why == "fp64":
        assert sdpa_mask.narrow(mask, torch.float64, 1e38, problem(False), {}) is None


def test_only_a_card_that_is_nvidias_has_the_kernel(monkeypatch):
    monkeypatch.setattr(driver, "kernel", lambda index, image, symbol, variant: image.path)
    found = {}
    for card in (Capability("cuda", 75), Capability("cuda", 87), Capability("cuda", 90), Capability("cuda", 121), Capability("cuda", 130),
                 Capability("cuda", 70), Capability("rocm"), Capability("zluda")):  # fmt: skip
        monkeypatch.setattr(capability, "of_device", lambda device, index: card)  # noqa: B023
        lone.kernel.cache_clear()
        found[card.arch or card.device] = lone.kernel(0, REPAIR_ROWS)
    lone.kernel.cache_clear()
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


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("mask_dtype", DTYPES[1:], ids=str)
def test_a_mask_in_the_querys_dtype_goes_to_torch_as_it_is(dtype, mask_dtype, card, monkeypatch):
    q, mask, taken = torch.randn(B, H, NQ, 64).to(dtype), masks(mask_dtype, (1, 1, NQ, NQ)), []
    call = sdpa.PreparedCall(q, q, q, mask, problem(False, 64)._replace(len_kv=NQ, mask="additive"), None, {})
    monkeypatch.setattr(sdpa.torch_internals, "attention", lambda q, k, v, mask, **options: taken.append(mask) or q.clone())
    sdpa.run(call)
    assert taken[0].dtype == dtype and (taken[0] is mask) == (mask_dtype == dtype) and len(card) == 2 - (mask_dtype == dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_masked_rows_are_zero_on_every_backend_of_torchs(dtype, shape, layout):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mask = masks(dtype, shape, "cuda")
    assert lone.kernel(0, REPAIR_ROWS) is not None
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


@pytest.mark.gpu
@pytest.mark.parametrize("mask_dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rows_of_the_smallest_and_of_the_largest_bias_on_every_backend_of_torchs(dtype, mask_dtype):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (torch.randn(B, H, n, 64, device="cuda", dtype=dtype) for n in (NQ, NK, NK))
    mask = torch.zeros(1, 1, NQ, NK, device="cuda", dtype=mask_dtype)
    mask[:, :, 7] = torch.finfo(mask_dtype).min
    mask[:, :, 9, 4] = torch.finfo(mask_dtype).max
    drowned = min(-torch.finfo(mask_dtype).min, torch.finfo(dtype).max) > 1e6  # in fp16 the scores are not lost beside it
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel([backend]):
            try:
                out = sageattn(q, k, v, attn_mask=mask, variant="sdpa")
            except RuntimeError as error:
                assert "No available kernel" in str(error), error
                continue
        assert out.isfinite().all()
        if drowned:
            torch.testing.assert_close(out[:, :, 7].float(), v.float().mean(2), atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(out[:, :, 9].float(), v[:, :, 4].float(), atol=2e-2, rtol=2e-2)
        rest = ~torch.isin(torch.arange(NQ, device="cuda"), torch.tensor([7, 9], device="cuda"))
        exact = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
        torch.testing.assert_close(out[:, :, rest].float(), exact[:, :, rest], atol=2e-2, rtol=2e-2)
