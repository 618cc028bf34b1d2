"""The planner on machines that are not here: every architecture by a made-up `Capability`, no tensors, no CUDA."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

from sageattention import KernelMissing, Unsupported
from sageattention.device import capability
from sageattention.device.capability import Capability
from sageattention.kernels import store
from sageattention.kernels.architectures import ARCHITECTURES, TARGETS
from sageattention.kernels.family import MASKS, find_tile
from sageattention.kernels.table import KERNELS
from sageattention.numerics.constants import HEAD_DIMS, pad_head_dim
from sageattention.planning import rules
from sageattention.planning.plan import KernelPlan, plan, refusal
from sageattention.planning.problem import Problem
from sageattention.variants import TRITON_FP16, VARIANTS, Candidate

ARCHS = (*ARCHITECTURES, 103, 121)
TRITON = "sageattn_qk_int8_pv_fp16_triton"
CUDA = [name for name, variant in VARIANTS.items() if variant.backend == "cuda"]
CPU, MPS, ROCM = Capability("cpu", name="cpu"), Capability("mps", name="mps"), Capability("rocm", name="MI300")


def gpu(arch, triton="native"):
    return Capability("cuda", arch, 100, triton, f"sm_{arch}")


def problem(**changes):
    good = {"batch": 1, "heads_q": 8, "heads_kv": 8, "len_q": 4096, "len_kv": 4096, "head_dim": 128, "dtype": "bfloat16"}
    return Problem(**{**good, "device": "cuda", "device_index": 0, **changes})


# --- auto (tests/package/test_auto.py has its table)


@pytest.mark.parametrize("arch", [61, *ARCHS, 130])
@pytest.mark.parametrize("triton", ["native", "none"])
def test_auto_always_finds_something(arch, triton):
    chosen = plan(problem(), gpu(arch, triton))
    assert refusal(chosen.variant, gpu(arch, triton)) is None
    assert chosen.reason
    choice = rules.choose(problem(), gpu(arch, triton), arch)
    order = (*choice.candidates, Candidate("sdpa"))
    tried = [name for name, _ in chosen.rejected[len(choice.rejected) :]]
    assert tried == list(order[: len(tried)])  # best first, none skipped silently
    assert order[len(tried)] == Candidate(chosen.variant.name, chosen.accum)
    assert all(reason for _, reason in chosen.rejected)


def test_auto_without_triton_says_so(monkeypatch):
    monkeypatch.setattr(store, "missing", lambda image: "no such image")
    chosen = plan(problem(), gpu(89, "none"))
    assert chosen.variant.name == "sdpa" and "nothing is left" in chosen.reason
    assert "Triton is not installed" in dict(chosen.rejected)[Candidate(TRITON)]


@pytest.mark.parametrize("machine", [CPU, MPS, ROCM], ids=lambda m: m.device)
def test_auto_off_nvidia_is_sdpa(machine):
    chosen = plan(problem(device=machine.device), machine)
    assert chosen.variant.name == "sdpa" and machine.device in chosen.reason


def test_auto_leaves_training_to_sdpa():
    chosen = plan(problem(needs_grad=True), gpu(89))
    assert chosen.variant.name == "sdpa" and "gradient" in chosen.reason


# --- by name


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if v.has_kernels])
@pytest.mark.parametrize("machine", [CPU, MPS, ROCM], ids=lambda m: m.device)
def test_gpu_variants_are_unsupported_elsewhere(name, machine):
    with pytest.raises(Unsupported, match=f"^q: .*NVIDIA GPU.*, not on {machine.device}") as caught:
        plan(problem(device=machine.device), machine._replace(triton="native"), name)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", CUDA)
@pytest.mark.parametrize("arch", [61, 70, *ARCHS, 130])
def test_each_cuda_variant_runs_as_itself_where_its_table_says_so(name, arch):
    """Every card from the first one on has its images, a later one PTX; others are told why not: never another variant in its place."""
    variant = VARIANTS[name]
    if arch < variant.min_arch or (variant.archs and arch not in variant.archs):
        with pytest.raises(Unsupported) as caught:
            plan(problem(), gpu(arch), name)
        assert caught.value.parameter == "q" and f"sm_{arch}" in caught.value.reason and name in caught.value.reason
        return
    chosen = plan(problem(), gpu(arch), name)
    assert chosen.variant is variant and chosen.kernels in variant.kernels
    assert chosen.scheme in chosen.kernels.schemes.values() and chosen.scheme.kv_tile == chosen.tile.block_n
    assert all(store.missing(image) == "" for image in chosen.images)


@pytest.mark.parametrize("name", CUDA)
def test_a_future_arch_runs_ptx_or_nothing(name, monkeypatch):
    """sm_130 is not served by cubins of sm_120, which do not run on a newer major version, but by PTX where there is some."""
    monkeypatch.setattr(store, "missing", lambda image: "")
    if VARIANTS[name].kernels and not VARIANTS[name].archs:
        assert plan(problem(), gpu(130), name).variant.name == name
        return
    with pytest.raises((KernelMissing, Unsupported)):
        plan(problem(), gpu(130), name)


def test_hopper_only_variant():
    for arch in (80, 89, 100, 120):
        with pytest.raises(Unsupported, match="sm_90"):
            plan(problem(), gpu(arch), "sageattn_qk_int8_pv_fp8_cuda_sm90")


@pytest.mark.parametrize(
    ("arch", "variant", "nearest"),
    [
        (86, "sageattn_qk_int8_pv_fp8_cuda", "sageattn_qk_int8_pv_int8_cuda"),
        (89, "sageattn_qk_int8_pv_fp8_cuda_sm90", "sageattn_qk_int8_pv_fp8_cuda"),
        (75, "sageattn_qk_int8_pv_fp8_cuda_sm90", "sageattn_qk_int8_pv_int8_cuda"),
        (61, TRITON, "sdpa"),
        (61, "sageattn_qk_int8_pv_int8_cuda", "sdpa"),
    ],
)
def test_a_card_that_is_too_old_is_told_what_it_can_run(arch, variant, nearest):
    with pytest.raises(Unsupported, match=f"the nearest that runs there is {nearest}$"):
        plan(problem(), gpu(arch), variant)


def test_triton_by_name():
    for arch in ARCHS:
        chosen = plan(problem(), gpu(arch), TRITON)
        assert chosen.variant.name == TRITON and chosen.arch == arch and chosen.scheme.kv_tile == chosen.tile.block_n
    with pytest.raises(Unsupported, match=r"sm_75 or newer, not sm_61"):
        plan(problem(), gpu(61), TRITON)
    with pytest.raises(KernelMissing, match="triton-windows"):
        plan(problem(), gpu(90, "none"), TRITON)
    assert plan(problem(device="cpu"), CPU._replace(triton="interpret"), TRITON).variant.name == TRITON


@pytest.mark.parametrize("machine", [CPU, MPS, ROCM, gpu(61), gpu(90)], ids=lambda m: m.name)
def test_reference_and_sdpa_run_anywhere(machine):
    for name in ("reference", "sdpa"):
        assert plan(problem(device=machine.device), machine, name).variant.name == name


def test_no_quantised_variant_pretends_to_have_a_gradient():
    with pytest.raises(Unsupported, match=r"reference.*no backward.*no_grad"):
        plan(problem(needs_grad=True), CPU, "reference")
    assert plan(problem(needs_grad=True), CPU, "sdpa").variant.name == "sdpa"


def test_unknown_variant_lists_the_known():
    with pytest.raises(Unsupported) as caught:
        plan(problem(), gpu(90), "sageattn_fp4")
    assert caught.value.parameter == "variant" and "'sageattn_fp4'" in caught.value.reason
    assert all(name in caught.value.reason for name in (*VARIANTS, "auto"))


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if v.backend == "cuda"])
def test_unknown_accumulator_lists_the_known(name):
    """A wrong argument is wrong on every machine: it is named before the missing kernel is."""
    for machine in (CPU, gpu(90)):
        with pytest.raises(Unsupported) as caught:
            plan(problem(), machine, name, "fp64")
        assert caught.value.parameter == "pv_accum_dtype" and "'fp64'" in caught.value.reason
        assert all(repr(accum) in caught.value.reason for accum in VARIANTS[name].accum)


def test_accumulators_that_upstream_names_are_accepted():
    assert set(VARIANTS["sageattn_qk_int8_pv_fp16_cuda"].accum) >= {"fp32", "fp16+fp32", "fp16"}
    assert set(VARIANTS["sageattn_qk_int8_pv_fp8_cuda"].accum) >= {"fp32", "fp32+fp32", "fp32+fp16"}
    assert "fp32+fp32" in VARIANTS["sageattn_qk_int8_pv_fp8_cuda_sm90"].accum
    assert "int32+fp32" in VARIANTS["sageattn_qk_int8_pv_int8_cuda"].accum


# --- forced architecture


def test_forced_arch_replaces_the_device_s_own():
    assert plan(problem(), gpu(90), TRITON, arch=75).tile == plan(problem(), gpu(75), TRITON).tile
    assert plan(problem(), gpu(90), TRITON, arch=75).arch == 75
    with pytest.raises(Unsupported, match="sm_80"):
        plan(problem(), gpu(90), "sageattn_qk_int8_pv_fp8_cuda", arch=80)
    assert plan(problem(), gpu(90), arch=89).variant.name == plan(problem(), gpu(89)).variant.name


def test_a_family_forced_as_ptx_is_refused_where_only_its_cubin_is_here(monkeypatch):
    monkeypatch.setattr(store, "missing", lambda image: f"{image.path} is absent" if image.is_ptx else "")
    variant = VARIANTS["sageattn_qk_int8_pv_fp16_cuda"]
    assert refusal(variant, gpu(80), 80) is None
    assert "compute_80/quantize_mma.ptx.xz is absent" in refusal(variant, gpu(80), 80, ptx=True).reason


# --- what a plan holds


def test_plans_are_cached():
    assert plan(problem(), gpu(89), TRITON) is plan(problem(), gpu(89), TRITON)


@pytest.mark.parametrize("head_dim", [1, 40, 64, 65, 128, 129, 256])
def test_padded_head_dim(head_dim):
    padded = pad_head_dim(head_dim)
    assert padded in HEAD_DIMS and head_dim <= padded and not any(head_dim <= d < padded for d in HEAD_DIMS)
    assert plan(problem(head_dim=head_dim), gpu(89), TRITON).head_dim == padded


@pytest.mark.parametrize("len_kv, heads", [(4096, 8), (32760, 40), (32760, 37), (200_000, 7), (3_000_000, 2)])
@pytest.mark.parametrize("name", [TRITON, "sageattn_qk_int8_pv_fp16_cuda"])
def test_groups_cover_every_head_within_the_workspace(len_kv, heads, name, monkeypatch):
    monkeypatch.setattr(store, "missing", lambda image: "")
    chosen = plan(problem(heads_q=heads, heads_kv=heads, len_kv=len_kv), gpu(89), name)
    per_head = len_kv * (128 + 256)
    assert 1 <= chosen.heads_per_group <= heads
    groups = -(-heads // chosen.heads_per_group)
    alive = min(chosen.GROUPS_ALIVE, groups) * chosen.heads_per_group
    assert chosen.heads_per_group == 1 or alive * per_head <= chosen.WORKSPACE_LIMIT
    assert groups * chosen.heads_per_group - heads < groups  # even groups, none of them empty


@pytest.mark.parametrize("tiles", [TRITON_FP16.tiles, *(k.tiles for k in KERNELS)], ids=["triton", *(k.name for k in KERNELS)])
def test_every_arch_and_head_dim_has_a_tile(tiles):
    for arch in ARCHS:
        for head_dim in {key[1] for key in tiles}:
            for mask in MASKS:
                tile = find_tile(tiles, arch, head_dim, mask)
                assert tile.block_m % 16 == 0 and tile.block_n % 32 == 0 and tile.warps in (2, 4, 8, 12, 16)


@pytest.mark.parametrize("name", CUDA)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_what_a_plan_names_is_in_its_images(name, arch, head_dim, monkeypatch):
    monkeypatch.setattr(store, "missing", lambda image: "")
    refused = arch < VARIANTS[name].min_arch or arch not in (VARIANTS[name].archs or (arch,))
    for accum in ("", *VARIANTS[name].accum):
        for mask in ("none", "bool"):
            for forced in (0, arch):
                try:
                    chosen = plan(problem(head_dim=head_dim, mask=mask), gpu(arch), name, accum, forced)
                except (KernelMissing, Unsupported):
                    assert refused
                    continue
                assert not refused
                quantizer, attention = chosen.images
                assert attention.entry(chosen.attend).threads == 32 * chosen.tile.warps
                assert quantizer.entry(chosen.kernels.quantize_k_symbol(head_dim)) and quantizer.entry(
                    chosen.kernels.quantize_v_symbol(head_dim)
                )
                assert not (forced and chosen.kernels.arch)


def test_hopper_runs_its_own_kernels_unless_an_architecture_is_forced(monkeypatch):
    monkeypatch.setattr(store, "missing", lambda image: "")
    name = "sageattn_qk_int8_pv_fp16_cuda"
    assert plan(problem(), gpu(90), name).kernels.name == "wgmma_fp16"
    assert plan(problem(), gpu(90), name, "fp32").scheme.kv_tile == 96
    assert plan(problem(), gpu(90), name, "fp16").kernels.name == "mma_fp16"
    wide = plan(problem(head_dim=160), gpu(90), name)
    assert wide.kernels.name == "wgmma_fp16_wide" and wide.head_dim == 256 and wide.scheme.kv_tile == 64
    assert plan(problem(head_dim=160), gpu(90), "sageattn_qk_int8_pv_fp8_cuda_sm90").kernels.name == "wgmma_fp8_wide"
    assert plan(problem(head_dim=160), gpu(90), name, "fp16").kernels.name == "mma_fp16"
    assert plan(problem(), gpu(100), name).kernels.name == "mma_fp16"
    forced = plan(problem(), gpu(90), name, arch=90)
    assert forced.kernels.name == "mma_fp16" and forced.images[1].arch == "sm_90a" and forced.scheme.kv_tile == 64
    assert plan(problem(), gpu(90), name, arch=80).images[1].arch == "compute_80"
    assert plan(problem(), gpu(90), name, arch=89, ptx=True).images[1].arch == "compute_89"


def test_kernels_of_one_kind_of_device_are_built_for_it_alone():
    for kernels in KERNELS:
        admitted = [t for t in TARGETS if int(t.split("_")[1].rstrip("a")) >= kernels.min_arch]
        assert [t for t in TARGETS if kernels.built_for(t)] == ([f"sm_{kernels.arch}a"] if kernels.arch else admitted)


def test_importing_the_planner_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import sageattention.planning.plan, sageattention.cli.doctor"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_variant_without_images_says_where_they_were_looked_for(monkeypatch):
    monkeypatch.setattr(store, "missing", lambda image: f"nobody has {image.path}; rebuild")
    with pytest.raises(KernelMissing, match=r"sm_90a/quantize_wgmma.*rebuild"):
        plan(problem(), gpu(90), "sageattn_qk_int8_pv_fp16_cuda")


# --- Triton that is there and does not work


@pytest.mark.parametrize("changes", [{"len_kv": 0}, {"len_q": 0}, {"heads_q": 0, "heads_kv": 0}, {"batch": 0}])
def test_an_empty_call_has_a_plan(changes):
    assert plan(problem(**changes), gpu(86), TRITON).variant.name == TRITON


def test_a_triton_that_cannot_be_imported_is_missing_and_auto_passes_it_by(monkeypatch):
    monkeypatch.setattr(store, "missing", lambda image: "no such image")
    broken = gpu(86, "broken")
    with pytest.raises(KernelMissing, match="can't be imported"):
        plan(problem(), broken, TRITON)
    chosen = plan(problem(), broken)
    assert chosen.variant.name == "sdpa" and "can't be imported" in dict(chosen.rejected)[Candidate(TRITON)]


def run_with_triton(folder: Path, text: str, code: str) -> str:
    """The output of `code` in a child whose `triton` is a module of that text."""
    (folder / "triton.py").write_text(text)
    code = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(Path(__file__).parents[2])!r}]; {code}"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_triton_mode(tmp_path):
    code = "from sageattention.device.capability import triton_mode, triton_error; print(triton_mode(), triton_error())"
    text = "raise ImportError('DLL load failed while importing libtriton')"
    assert run_with_triton(tmp_path, text, code) == "broken ImportError: DLL load failed while importing libtriton"
    stub = "import types; sys.modules['triton'] = types.ModuleType('triton'); "  # as some packs leave it: no __spec__
    assert run_with_triton(tmp_path, "", stub + code) == "none"


# --- a call in two halves


@pytest.mark.parametrize(
    ("variant", "changes", "saves"),
    [
        (TRITON, {}, True),  # one group: the whole call keeps as much, and the output
        (TRITON, {"heads_q": 40, "heads_kv": 40, "len_q": 32760, "len_kv": 32760}, True),  # 480 MiB quantised, for 240 and an output of 320
        (TRITON, {"heads_q": 40, "heads_kv": 40, "len_q": 1024, "len_kv": 32760}, False),  # the output is small
        ("sageattn_qk_int8_pv_fp16_cuda", {}, True),
        ("sageattn_qk_int8_pv_fp16_cuda", {"heads_q": 40, "heads_kv": 40, "len_q": 32760, "len_kv": 32760}, False),  # for 126 and 320
        ("sdpa", {}, False),
        ("reference", {}, False),
    ],
)
def test_halves_are_taken_where_they_save_memory(variant, changes, saves, monkeypatch):
    monkeypatch.setattr(store, "missing", lambda image: "")
    p = problem(**changes)
    chosen, output = plan(p, gpu(89), variant), p.batch * p.heads_q * p.len_q * p.head_dim * 2
    assert (isinstance(chosen, KernelPlan) and chosen.halves_take(p) < output) == saves


def test_an_amd_card_behind_zluda_runs_torchs_attention(monkeypatch):
    """Its name is the only sign: it says that it is an NVIDIA card of compute capability 8.8."""
    properties = types.SimpleNamespace(name="AMD Radeon RX 7900 XTX [ZLUDA]", major=8, minor=8, multi_processor_count=48)
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    card = capability.of_device("cuda", 0)
    assert (card.device, card.arch, card.name) == ("zluda", 0, properties.name)
    problem = Problem(1, 24, 24, 8192, 8192, 128, "float16", "cuda", 0)
    assert plan(problem, card).variant.name == "sdpa"
    for name in VARIANTS.keys() - {"sdpa", "reference"}:
        with pytest.raises((Unsupported, KernelMissing), match=r"zluda|Triton"):
            plan(problem, card, name)


# --- few keys: K and V of a head in shared memory


@pytest.mark.parametrize(
    "changes, resident",
    [
        ({"heads_q": 40, "heads_kv": 40, "len_q": 32760, "len_kv": 512}, True),
        ({"heads_q": 40, "heads_kv": 40, "len_q": 32760, "len_kv": 513}, False),  # no room
        ({"heads_q": 40, "heads_kv": 40, "len_q": 32760, "len_kv": 960, "head_dim": 64}, True),
        ({"heads_q": 20, "heads_kv": 20, "len_q": 4096, "len_kv": 77, "head_dim": 64}, True),
        ({"heads_q": 24, "heads_kv": 24, "len_q": 1024, "len_kv": 512}, True),
        ({"heads_q": 24, "heads_kv": 24, "len_q": 512, "len_kv": 512}, False),  # quantised too often for so little work
        ({"heads_q": 40, "heads_kv": 40, "len_q": 1024, "len_kv": 960, "head_dim": 64}, False),
        ({"heads_q": 4, "heads_kv": 4, "len_q": 300, "len_kv": 77}, True),
        ({"heads_q": 40, "heads_kv": 40, "len_q": 32760, "len_kv": 512, "dtype": "float16"}, True),
        ({"heads_q": 40, "heads_kv": 40, "len_q": 32760, "len_kv": 512, "dtype": "float32"}, False),
        ({"heads_q": 40, "heads_kv": 40, "len_q": 32760, "len_kv": 512, "head_dim": 100}, False),  # rows that are no whole pieces
        ({"heads_q": 40, "heads_kv": 40, "len_q": 32760, "len_kv": 512, "head_dim": 200}, False),
        ({"heads_q": 40, "heads_kv": 40, "len_q": 32760, "len_kv": 512, "causal": True}, False),
        ({"batch": 4096, "heads_q": 20, "heads_kv": 20, "len_q": 300, "len_kv": 300, "varlen": True}, True),
        ({"batch": 4096, "heads_q": 20, "heads_kv": 20, "len_q": 300, "len_kv": 300, "varlen": True, "causal": True}, False),
        ({"batch": 4, "heads_q": 20, "heads_kv": 20, "len_q": 300, "len_kv": 300, "varlen": True}, False),
    ],
)
def test_few_keys_stay_in_shared_memory_where_that_pays(monkeypatch, changes, resident):
    monkeypatch.setattr(store, "missing", lambda image: "")
    chosen = plan.__wrapped__(problem(**changes), gpu(90), "sageattn_qk_int8_pv_fp16_cuda")
    assert chosen.kernels.resident == resident and (chosen.halves is not None) == resident
    if resident:
        assert not chosen.halves.kernels.resident and chosen.halves.attend in {e.symbol for e in chosen.halves.images[1].entries}
        assert chosen.attend in {e.symbol for e in chosen.images[1].entries} and chosen.scheme.kv_tile == chosen.tile.block_n
        assert chosen.kernels.dtype == changes.get("dtype", "bfloat16")


def test_few_keys_without_their_kernel_are_quantised_first(monkeypatch):
    monkeypatch.setattr(store, "missing", lambda image: "no such image" if "resident" in image.name else "")
    shape = problem(heads_q=40, heads_kv=40, len_q=32760, len_kv=512)
    for changes in ({"arch": 90}, {"capability": gpu(120)}, {}):  # forced, another card, no image
        how = {"capability": gpu(90), **changes}
        assert not plan.__wrapped__(shape, variant="sageattn_qk_int8_pv_fp16_cuda", **how).kernels.resident
