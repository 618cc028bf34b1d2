"""What every variant must do on a GPU besides being right: streams, threads, graphs, devices, memory, odd numbers (marker gpu)."""

from __future__ import annotations

import threading

import extremes
import matrix
import pytest
import torch

from sageattention import attend, available_variants, quantize_kv, sageattn
from sageattention.cli import workloads
from sageattention.device import capability
from sageattention.numerics.reference import oracle
from sageattention.variants import VARIANTS

pytestmark = pytest.mark.gpu


def ready() -> list[str]:
    """The variants with kernels of their own that run here; without a GPU all of them, for the tests to be listed as skipped."""
    own = [name for name, variant in VARIANTS.items() if variant.has_kernels]
    if not torch.cuda.is_available():
        return own
    return [found.name for found in available_variants("cuda") if found.status == "ready" and found.name in own]


@pytest.fixture(params=ready())
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


def example(seed: int = 0, device: str = "cuda", **changes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    case = matrix.Case(**{"head_dim": 128, "len_q": 1000, "len_kv": 1500, **changes})
    t, _ = matrix.tensors(case, device, seed)
    return t["q"], t["k"], t["v"]


def test_every_ready_variant_computes_attention(variant: str) -> None:
    q, k, v = example()
    exact = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert workloads.relative_l2(sageattn(q, k, v, variant=variant), exact) <= 0.08


def test_graph_replays_on_new_data(variant: str) -> None:
    static, other = example(0), example(1)
    expected = sageattn(*other, variant=variant)
    sageattn(*static, variant=variant)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sageattn(*static, variant=variant)
    for old, new in zip(static, other):
        old.copy_(new)
    graph.replay()
    assert torch.equal(out, expected)


def test_streams_and_threads_give_the_same_bits(variant: str) -> None:
    calls = [example(seed) for seed in range(4)]
    expected = [sageattn(*call, variant=variant) for call in calls]
    torch.cuda.synchronize()
    results: dict[int, list[torch.Tensor]] = {}
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                results[index] = [sageattn(*calls[index], variant=variant) for _ in range(20)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert not errors
    for index, outs in results.items():
        assert all(torch.equal(out, expected[index]) for out in outs), index


@pytest.mark.parametrize("form", [{}, {"is_causal": True}], ids=["plain", "causal"])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_an_image_alone_is_as_in_a_batch(variant: str, head_dim: int, form: dict) -> None:
    """How work is shared out follows from the batch; what comes of a row should not."""
    q, k, v = (torch.randn(3, 24, 4347, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    together = sageattn(q, k, v, variant=variant, **form)
    for image in range(3):
        alone = sageattn(*(t[image : image + 1] for t in (q, k, v)), variant=variant, **form)
        assert workloads.relative_l2(together[image], alone[0]) <= 4e-3


def test_a_thousand_repeats_give_the_same_bits(variant: str) -> None:
    call = example(len_q=300, len_kv=700)
    expected = sageattn(*call, variant=variant)
    different = sum(not torch.equal(sageattn(*call, variant=variant), expected) for _ in range(1000))
    assert different == 0


def test_quantised_k_and_v_are_used_on_another_stream_than_they_were_made_on(variant: str) -> None:
    q, k, v = example(len_q=2000, len_kv=6000)
    expected = attend(q, quantize_kv(k, v, variant=variant))
    busy = torch.randn(6000, 6000, device="cuda")
    torch.cuda.synchronize()
    for _ in range(10):
        made_on, used_on = torch.cuda.Stream(), torch.cuda.Stream()
        with torch.cuda.stream(made_on):
            for _ in range(3):
                busy = (busy @ busy).clamp_(-1, 1)  # the quantising begins late
            kv = quantize_kv(k, v, variant=variant)
        with torch.cuda.stream(used_on):
            out = attend(q, kv)
        del kv  # its buffers must not be given away while they are read
        with torch.cuda.stream(made_on):
            spoiled = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(40)]
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
        del spoiled


def test_quantised_k_and_v_made_before_a_capture_are_used_in_it(variant: str) -> None:
    q, k, v = example()
    with torch.cuda.stream(torch.cuda.Stream()):
        kv = quantize_kv(k, v, variant=variant)
    expected = attend(q, kv)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, kv)
    graph.replay()
    assert torch.equal(out, expected)


def test_poisoned_memory_is_never_read(variant: str) -> None:
    """Workspace and output come from memory that holds NaN: every element used must have been written first."""
    for changes in ({}, {"head_dim": 40, "len_q": 77, "len_kv": 77}, {"head_dim": 160, "len_kv": 1}):
        call = example(**changes)
        expected = sageattn(*call, variant=variant)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        poison = [torch.full((64 << 20,), float("nan"), device="cuda") for _ in range(4)]
        poison += [torch.full((n,), float("nan"), device="cuda") for n in (64, 256, 4096, 1 << 16, 1 << 18) for _ in range(8)]
        torch.cuda.synchronize()
        del poison
        assert torch.equal(sageattn(*call, variant=variant), expected)


def test_second_gpu(variant: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here; run on a machine with two")
    near, far = example(device="cuda:0"), example(device="cuda:1")
    assert torch.cuda.current_device() == 0
    out = sageattn(*far, variant=variant)
    assert out.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(out.cpu(), sageattn(*near, variant=variant).cpu())
    with torch.cuda.device(1):
        assert torch.equal(sageattn(*near, variant=variant).cpu(), out.cpu())


def test_more_than_2_31_elements(variant: str) -> None:
    q, k, v = (torch.randn(1, 2, 2048, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    expected = sageattn(q, k, v, variant=variant)
    # 2³¹ elements lie between the first and the last head: an offset in 32 bits would wrap
    storage = torch.empty(2**31 + 2**20, dtype=torch.bfloat16, device="cuda")
    far = []
    for place, near in enumerate((q, k, v)):
        t = storage.as_strided((1, 2, 2048, 64), (2**31, 2**31, 64, 1), place * 2**18)
        far.append(t.copy_(near))
    assert torch.equal(sageattn(*far, variant=variant), expected)


@pytest.mark.parametrize("offset", [1, 3, 8])
def test_unaligned_strided_inputs(variant: str, offset: int) -> None:
    """Slices of a wider tensor: rows start at odd addresses and lie apart."""
    q, k, v = example(len_q=130, len_kv=200)
    wide = []
    for t in (q, k, v):
        w = torch.zeros(*t.shape[:2], t.shape[2] * 2, t.shape[3] + 24, dtype=t.dtype, device=t.device)
        view = w[:, :, ::2, offset : offset + t.shape[3]]
        wide.append(view.copy_(t))
    out, expected = sageattn(*wide, variant=variant), sageattn(q, k, v, variant=variant)
    if VARIANTS[variant].backend == "triton":  # which compiles another kernel for such rows, with its own order of sums
        assert workloads.relative_l2(out, expected) <= 2e-3
    elif any(kernels.arch == capability.of_device("cuda", 0).arch for kernels in VARIANTS[variant].resident_kernels):
        exact = oracle(q, k, v)[0]  # kernels that keep K and V in shared memory want aligned rows; the others round by themselves
        assert workloads.relative_l2(out, exact) <= 1.2 * workloads.relative_l2(expected, exact)
    else:
        assert torch.equal(out, expected)


@extremes.finite_outputs(examples=100, len_q=200, len_kv=300)
def test_finite_inputs_give_finite_outputs(variant: str, **call) -> None:
    extremes.check(variant, "cuda", **call)
