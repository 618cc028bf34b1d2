"""The CUDA variants' device code without a GPU: csrc's headers compiled for the host, with the PTX primitives emulated lane
by lane (tests/lanes), driven by the package's own host side. Each architecture with its own tiles and copies; of Hopper's own kernels
the quantisers alone (test_hopper_lanes.py has their attention).
"""

from __future__ import annotations

import ctypes

import matrix
import pytest
import torch
from emulated_card import CARDS, MMA, Lanes, each_variant, install, lanes_of, needs_compiler, on_card
from lane_compiler import compiled

from sageattention import dispatch
from sageattention.backends.call import PreparedCall
from sageattention.backends.cuda import host, workspace
from sageattention.kernels.architectures import ARCHITECTURES
from sageattention.kernels.family import KernelFamily, find_tile
from sageattention.kernels.mma import MMA_FP16
from sageattention.kernels.table import KERNELS
from sageattention.numerics.constants import K_SCALE_SHIFT, MOST_LIVE_KEYS, k_mean_stride
from sageattention.numerics.reference import emulate, oracle, quantize_k, quantize_v
from sageattention.planning.plan import CudaPlan, Target, fit_cuda, plan
from sageattention.variants import CUDA_FP16, VARIANTS

pytestmark = needs_compiler
QUANTISED = [k for k in KERNELS if not k.resident]  # by launches of their own
each_quantised = pytest.mark.parametrize("kernels", QUANTISED, ids=[k.name for k in QUANTISED])


@pytest.fixture(scope="module", params=CARDS, ids=lambda p: f"sm{p[0]}-d{p[1]}")
def lanes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lanes:
    return lanes_of(*request.param, tmp_path_factory.mktemp("lanes"))


@pytest.fixture
def card(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> Lanes:
    return install(monkeypatch, lanes)


def run(card: Lanes, tensors: dict[str, torch.Tensor], mask: torch.Tensor | None, variant: str, accum: str, **options) -> tuple:
    """The call by mma.sync."""
    problem = on_card(tensors, attn_mask=mask, **options)
    if card.capability.arch < VARIANTS[variant].min_arch:
        pytest.skip(f"{variant} is not for sm_{card.capability.arch}")
    chosen = plan(problem, card.capability, variant, accum, arch=card.capability.arch)
    out, lse = host.run(PreparedCall(*tensors.values(), dispatch._four_dims(mask), problem, chosen, {}))
    return out, lse, chosen.scheme


@pytest.mark.parametrize(
    "variant, accum",
    [(name, accum) for name, k in MMA.values() for accum in dict(reversed([(s, a) for a, s in k.schemes.items()])).values()],
)
@pytest.mark.parametrize(
    "mask, dtype, layout, heads, lengths",
    [
        ("none", "bfloat16", "HND", (2, 1), (33, 129)),
        ("causal", "float16", "NHD", (1, 1), (150, 150)),
        ("causal+bool", "float32", "HND", (2, 2), (40, 70)),
        ("additive", "bfloat16", "NHD", (1, 1), (20, 200)),
        ("row", "float16", "HND", (2, 1), (1, 65)),
        ("row", "float16", "HND", (2, 1), (20, 65)),
    ],
)
def test_kernels_agree_with_the_emulation(
    card: Lanes, mask: str, dtype: str, layout: str, heads: tuple, lengths: tuple, variant: str, accum: str
) -> None:
    head_dim = card.head_dim - 24  # padded inside the kernels
    t, given_mask = matrix.tensors(matrix.Case(head_dim, dtype, layout, mask, *heads, *lengths))
    given = t if layout == "HND" else {name: x.transpose(1, 2).contiguous() for name, x in t.items()}
    causal = "causal" in mask
    out, lse, scheme = run(card, given, given_mask, variant, accum, tensor_layout=layout, is_causal=causal)
    out = out if layout == "HND" else out.transpose(1, 2)
    expected, expected_lse = emulate(**t, scheme=scheme, is_causal=causal, attn_mask=given_mask)
    exact, exact_lse = oracle(**t, is_causal=causal, attn_mask=given_mask)
    assert out.isfinite().all()
    assert matrix.workloads.relative_l2(out, expected) <= matrix.EMULATION_BOUND[scheme.pv] + matrix.OUTPUT_STEP[dtype]
    assert matrix.workloads.relative_l2(out, exact) <= 0.08
    masked = exact_lse == -torch.inf
    assert (out[masked] == 0).all() and (lse[masked] == -torch.inf).all()
    assert (lse - expected_lse)[~masked].abs().mean() <= 2e-3


@each_variant
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e4, 1e30, 3.38e38])
def test_any_finite_input_gives_finite_output(card: Lanes, size: float, variant: str) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (((torch.rand(1, 1, n, card.head_dim, generator=g) * 2 - 1) * size).bfloat16() for n in (20, 70, 70))
    k[0, 0, 3, 5] = v[0, 0, 9, 1] = 3.38e38
    v[0, 0, :, 7], v[0, 0, 8, 7] = 3.38e38, -3.38e38
    out, lse, _ = run(card, {"q": q, "k": k, "v": v}, None, variant, "")
    assert out.isfinite().all() and lse.isfinite().all()


@each_variant
def test_equal_weights_give_the_mean_of_v(card: Lanes, variant: str) -> None:
    """Of V as it was rounded too, where the scheme makes up for that."""
    t, _ = matrix.tensors(matrix.Case(card.head_dim, "float32", len_q=3, len_kv=333))
    t["q"].zero_()
    out, _, scheme = run(card, t, None, variant, "")
    error = matrix.workloads.relative_l2(out, t["v"].double().mean(2, keepdim=True).expand_as(out))
    assert error <= (1e-3 if scheme.v_rounded or scheme.pv == "fp16" else 0.05)


@pytest.mark.parametrize("shape", [(2, 1, 0), (2, 0, 5), (0, 1, 5)], ids=str)
def test_where_there_is_nothing_to_quantise(card: Lanes, shape: tuple[int, int, int]) -> None:
    k = torch.zeros(*shape, card.head_dim)
    problem = on_card({"q": k, "k": k, "v": k})
    kv = host.quantize(k, k, problem, plan(problem, card.capability, CUDA_FP16.name, arch=card.capability.arch), None)
    assert kv.buffer.numel() == 0


@pytest.mark.parametrize("causal", [False, True])
def test_groups_of_heads_and_halves_give_the_same_bits(card: Lanes, monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    len_q = 70 if causal else 20  # causal: as many as keys, for a whole call leaves out keys that no query reaches
    t, _ = matrix.tensors(matrix.Case(card.head_dim, heads_q=4, heads_kv=2, len_q=len_q, len_kv=70))
    whole = run(card, t, None, CUDA_FP16.name, "fp32", is_causal=causal)
    monkeypatch.setattr(CudaPlan, "WORKSPACE_LIMIT", 2 * 2 * MMA_FP16.tile_bytes(card.head_dim))  # of the four pairs, one a group
    plan.cache_clear()
    parts = run(card, t, None, CUDA_FP16.name, "fp32", is_causal=causal)
    assert torch.equal(parts[0], whole[0]) and torch.equal(parts[1], whole[1])
    problem = on_card(t, is_causal=causal)
    chosen = plan(problem, card.capability, CUDA_FP16.name, arch=card.capability.arch)
    assert workspace.launch_plan_of(problem, chosen).groups == ((0, 1), (1, 1), (2, 1), (3, 1))
    kv = host.quantize(t["k"], t["v"], problem, chosen, None)
    halves = host.attend(t["q"], kv, problem, None)
    assert torch.equal(halves[0], whole[0]) and torch.equal(halves[1], whole[1])


@pytest.mark.parametrize("heads, tokens", [(400, 40_000), (1, 1_500_000)])
def test_the_live_keys_of_a_cta_are_no_more_than_it_holds(card: Lanes, heads: int, tokens: int) -> None:
    one = torch.empty(1, 1, 1, card.head_dim, dtype=torch.bfloat16)
    t = {"q": one.expand(1, heads, 1, -1), "k": one.expand(1, heads, tokens, -1), "v": one.expand(1, heads, tokens, -1)}
    problem = on_card(t, attn_mask=torch.ones(1, 1, 1, tokens, dtype=torch.bool))
    r = workspace.launch_plan_of(problem, plan(problem, card.capability, CUDA_FP16.name, arch=card.capability.arch), True)
    *_, v_chunks, v_chunk_tokens = r.quantize_k_tail
    scale_block = r.plan.kernels.scale_block_keys(r.plan.head_dim)
    scale_blocks = r.tiles * r.plan.tile.block_n // scale_block
    assert -(-scale_blocks // r.k_ctas_per_head) * scale_block <= MOST_LIVE_KEYS
    assert v_chunk_tokens <= MOST_LIVE_KEYS and v_chunks * v_chunk_tokens >= tokens


# --- the quantisers, by the bytes that they write -----------------------------------------------------------------------------------


def codes_of_k(kernels: KernelFamily, tile: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one tile: (K's codes [keys, D], scales [keys])."""
    keys = find_tile(kernels.tiles, 0, head_dim).block_n
    codes, n = tile[: keys * head_dim].view(torch.int8), torch.arange(keys)
    if kernels.arch:  # 16-byte chunk 4·c2 + t, key
        lanes = codes.view(head_dim // 64, 4, keys, 16).permute(2, 0, 1, 3)
        scales = tile[keys * head_dim :][:64].view(torch.float32).view(4, 4)[:, :2]
        scale = scales[n % 8 // 2, n // (keys // 2)]
    else:  # block 8·c2 + j, lane 4g + t
        lanes = codes.view(head_dim // 64, 8, 8, 4, 16).permute(1, 2, 0, 3, 4).reshape(keys, head_dim // 64, 4, 16)
        scale = tile[-16:].view(torch.float32)[n % 8 // 2]
    n = torch.arange(head_dim)  # channels; a code's place is {b7, b1, b6, b5, b2, b0} (at 64 {b1, b5, b2, b0}), its lane t {b4, b3}
    b = [n >> bit & 1 for bit in range(8)]
    place = b[0] + 2 * b[2] + 4 * b[5] + (8 * b[1] if head_dim == 64 else 8 * b[6] + 16 * b[1] + 32 * b[7])
    return lanes[:, place // 16, b[3] + 2 * b[4], place % 16].float(), scale


def values_of(kernels: KernelFamily, tile: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of one tile: V's numbers [keys, D], its columns of ones [keys, 8] where it has them."""
    keys = find_tile(kernels.tiles, 0, head_dim).block_n
    size = 2 if kernels.pv == "fp16" else 1
    kind = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}[kernels.pv]
    run = 16 // size  # keys of a column in 16 bytes
    if kernels.arch:
        chunks = tile[keys * head_dim + 128 :].view(kind).float().view(keys // run, -1, run)
        columns = chunks.permute(0, 2, 1).reshape(keys, -1)
    else:  # block, lane 4g + t, {n-tile 2p: b0, b1; n-tile 2p + 1: b0, b1}
        blocks = tile[keys * head_dim : -16].view(kind).float().view(-1, head_dim // 16, 8, 4, 2, 2, 4 // size)
        # c, p, g, t, tile, b, e → (c, b, t, e), (p, tile, g)
        columns = blocks.permute(0, 5, 3, 6, 1, 4, 2).reshape(keys, head_dim)
    if size == 1 or not kernels.arch:  # from a lane's order of keys to their own
        p = torch.arange(keys)
        if size == 2:  # of sixteen: b, t, e
            key = p // 16 * 16 + 8 * (p % 16 // 8) + p % 8
        else:  # of sixteen: t, i
            key = p // 16 * 16 + 8 * (p % 4 // 2) + 2 * (p % 16 // 4) + p % 2
        columns = torch.empty_like(columns).index_copy_(0, key, columns)
    columns, ones = columns[:, :head_dim], columns[:, head_dim:] if kernels.v_ones else None
    n = torch.arange(head_dim)
    channel = n // 32 * 32 + 8 * (n % 8 // 2) + 2 * (n // 8 % 4) + n % 2
    return torch.empty_like(columns).index_copy_(1, channel, columns), ones


@each_quantised
@pytest.mark.parametrize("dtype, tokens, missing", [("bfloat16", 97, 0), ("float16", 200, 8), ("float32", 33, 3)])
def test_quantisers_write_what_the_emulation_rounds_to(card: Lanes, kernels: KernelFamily, dtype: str, tokens: int, missing: int) -> None:
    d, arch = card.head_dim, card.capability.arch
    if d not in kernels.head_dims or not kernels.built_for(ARCHITECTURES[arch].target):
        pytest.skip(f"{kernels.name} is not for sm_{arch} or head_dim {d}")
    t, _ = matrix.tensors(matrix.Case(d - missing, dtype, heads_q=2, heads_kv=2, len_q=1, len_kv=tokens))
    t["v"][:, 0] += 3  # a mean worth taking out
    variant = next(v for v in VARIANTS.values() if kernels in (*v.kernels, *v.sparse_kernels))
    sparse = kernels not in variant.kernels  # whose quantisers always look at which keys are live: all
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool) if sparse else None
    problem = on_card(t, attn_mask=mask)
    chosen = fit_cuda(problem, Target(card.capability, 0 if kernels.arch else arch), variant, next(iter(kernels.schemes)), "", sparse)
    chosen = chosen.halves or chosen  # what quantises K and V first
    assert chosen.kernels is kernels
    kv = host.quantize(t["k"], t["v"], problem, chosen, mask)
    launch_plan = workspace.launch_plan_of(problem, chosen, True)
    w, size = launch_plan.workspace, kernels.tile_bytes(d)

    def buffer(at: int, kind: torch.dtype, *shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel() * kind.itemsize
        return kv.buffer[at : at + count].view(kind).view(shape)

    tiles = buffer(w.kv, torch.uint8, 4, launch_plan.tiles, size)
    for pair in range(4):
        k8, k_scale, _ = quantize_k(t["k"].flatten(0, 1)[pair], chosen.scheme)
        v8, v_scale, v_mean = quantize_v(t["v"].flatten(0, 1)[pair], chosen.scheme)
        found = [codes_of_k(kernels, tile.contiguous(), d) for tile in tiles[pair]]
        codes, scales = torch.cat([c for c, _ in found])[:tokens], torch.cat([s for _, s in found])[:tokens]
        assert (codes - k8).abs().max() <= 1 and (codes != k8).float().mean() <= 1e-2
        assert torch.allclose(scales, k_scale[:, 0] / K_SCALE_SHIFT, rtol=1e-5)
        assert buffer(w.k_scale_max, torch.float32, 4)[pair] == scales.max()
        values = torch.cat([values_of(kernels, tile.contiguous(), d)[0] for tile in tiles[pair]])[:tokens]
        assert (values - v8).abs().max() <= 2e-3 * v8.abs().max() + (chosen.scheme.pv != "fp16") * 32
        assert (values != v8).float().mean() <= 2e-2
        amax, mean = (buffer(at, torch.float32, 4, d)[pair] for at in (w.v_amax, w.v_mean))
        assert torch.allclose(amax / chosen.scheme.v_max, v_scale, rtol=1e-5)
        if chosen.scheme.v_rounded:  # the attention kernel's share of it: codes that the two round differently may not count here
            summed, off = buffer(w.v_quant_sum, torch.int32, 4, d)[pair], 0.0
            if kernels.pv == "fp8":  # two keys at a time in fp16; what a thread has, to 64ths
                summed, off = summed / 64, 2.0**-11 * values.abs().sum(0) + tokens / 1024
            assert ((summed - values.sum(0)).abs() <= off).all()
            v_mean = v_mean + v_scale * (v8 / tokens).sum(0)
        assert torch.allclose(mean, v_mean, atol=1e-6)
        k_mean = t["k"].flatten(0, 1)[pair, :: k_mean_stride(tokens)].float().mean(0)
        assert torch.allclose(buffer(w.k_mean, torch.float32, 4, d)[pair, : d - missing], k_mean, rtol=1e-4, atol=1e-5)


@each_quantised
@pytest.mark.parametrize("hidden", ["none", "some"])
def test_absent_keys_are_zeros(card: Lanes, kernels: KernelFamily, hidden: str) -> None:
    """Keys that a key mask hides, whatever they hold, and those beyond the end; the columns of ones too."""
    d, arch, tokens = card.head_dim, card.capability.arch, 203
    if d not in kernels.head_dims or not kernels.built_for(ARCHITECTURES[arch].target) or kernels.masks == ("list",):
        pytest.skip(f"{kernels.name} is not for sm_{arch} or head_dim {d}, or not for masks")
    t, _ = matrix.tensors(matrix.Case(d, len_q=1, len_kv=tokens))
    there = torch.ones(tokens, dtype=torch.bool)
    if hidden == "some":
        there[::3], there[100:140] = False, False
    t["k"][:, :, ~there] = t["v"][:, :, ~there] = torch.nan
    variant = next(v for v in VARIANTS.values() if kernels in v.kernels)
    mask = None if hidden == "none" else there.view(1, 1, 1, -1)
    problem = on_card(t, attn_mask=mask)
    chosen = fit_cuda(problem, Target(card.capability, 0 if kernels.arch else arch), variant, next(iter(kernels.schemes)), "", False)
    chosen = chosen.halves or chosen  # what quantises K and V first
    kv = host.quantize(t["k"], t["v"], problem, chosen, mask)
    launch_plan, size = workspace.launch_plan_of(problem, chosen, True), kernels.tile_bytes(d)
    tiles = kv.buffer[launch_plan.workspace.kv :][: launch_plan.tiles * size].view(launch_plan.tiles, size)
    codes = torch.cat([codes_of_k(kernels, tile.contiguous(), d)[0] for tile in tiles])
    values, ones = zip(*(values_of(kernels, tile.contiguous(), d) for tile in tiles))
    there = torch.nn.functional.pad(there, (0, len(codes) - tokens))
    for x in (codes, torch.cat(values)):
        assert (x[~there] == 0).all() and (x[there] != 0).any(1).all()
    if kernels.v_ones:
        assert torch.equal(torch.cat(ones), there[:, None].float().expand(-1, 8))


# --- eight rows of Q by MMAs, as Hopper's own kernels have them -------------------------------------------------

EIGHT = """
extern "C" void eight_{d}_{dtype}(const u16* rows, float sign, u8* out, float* scales) {{
  run_grid(1, 32, [&] {{
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    Raw8<{dtype}> raw[1][{d} / 32];
    load_raw<{d}, 1, {dtype}, true>((const u8*)rows, [](int row) {{ return row; }}, {d}, g, 8, t, {d}, raw);
    u32 codes[2][{d} / 32];
    scales[lane] = quantize_rows8(raw[0], Rotation<{d}, {dtype}>(lane), lane, 127.0f, sign, codes);
    for (int j = 0; j < 2; ++j)
      for (int chunk = g; chunk < {d} / 16 || chunk == g; chunk += 8)
        memcpy(out + (2 * t + j) * {d} + ({d} == 64 ? chunk % 4 * 16 + chunk / 4 * 8 : chunk * 16), &codes[j][chunk / 8 * 4],
               {d} == 64 ? 8 : 16);
  }});
}}
extern "C" void each_{d}_{dtype}(const u16* rows, float sign, u8* out, float* scales) {{
  run_grid(1, 32, [&] {{
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    float x[1][2][{d} / 4];
    load_rows<{d}, 1, {dtype}, true>((const u8*)rows, [](int row) {{ return row; }}, {d}, g, 8, t, {d}, x);
    u32 a[{d} / 32][4];
    scales[lane] = quantize_row<{d}>(x[0][0], t, 127.0f, sign, a, 0);
    for (int i = 0; i < {d} / 16; ++i) memcpy(out + g * {d} + (i / 4 * 4 + t) * 16 + i % 4 * 4, &a[i / 4 * 2 + i % 4 / 2][i % 2 * 2], 4);
  }});
}}
"""


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    functions = "".join(EIGHT.format(d=d, dtype=dtype) for d in (64, 128, 256) for dtype in ("kBfloat16", "kFloat16"))
    return compiled(90, tmp_path_factory.mktemp("eight"), ("block/query.cuh",), functions)


@pytest.mark.parametrize("size", [0.0, 1.0, 6e4, 3.38e38])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_eight_rows_at_once_are_the_same_as_each(eight: ctypes.CDLL, head_dim: int, dtype: str, sign: float, size: float) -> None:
    kind, g = getattr(torch, dtype), torch.Generator().manual_seed(0)
    rows = ((torch.rand(8, head_dim, generator=g) * 2 - 1) * min(size, torch.finfo(kind).max)).to(kind)
    codes, scales = torch.full((2, 8, head_dim), -128, dtype=torch.int8), torch.zeros(2, 32)
    for i, name in enumerate(("eight", "each")):
        function = getattr(eight, f"{name}_{head_dim}_k{dtype.capitalize()}")
        given, found, scale = (ctypes.c_void_p(x.data_ptr()) for x in (rows, codes[i], scales[i]))
        function(given, ctypes.c_float(sign), found, scale)
    assert (codes[0].int() - codes[1]).abs().max() <= 1 and (codes[0] != codes[1]).float().mean() <= 1e-2
    assert torch.allclose(scales[0], scales[1], rtol=1e-6)
