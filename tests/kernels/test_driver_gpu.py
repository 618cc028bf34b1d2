"""Loader and launchers on a real driver, with the demo kernels: streams, threads, devices, capture, and the driver's own errors."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import threading
import time

import pytest
from stub import DEMO_KERNELS, TABLE, DemoParams, by_path

torch = pytest.importorskip("torch")

from sageattention import CudaError, KernelMissing  # noqa: E402
from sageattention.backends.cuda import driver, launcher  # noqa: E402
from sageattention.kernels import binaries, store  # noqa: E402

pytestmark = pytest.mark.gpu
N = 1000


@pytest.fixture(params=["ctypes", "compiled"])
def gpu(request, monkeypatch):
    """The index of a card with the demo kernels, for each launcher."""
    if request.param == "compiled" and importlib.util.find_spec(launcher.MODULE) is None:
        pytest.skip("sageattention-launcher is not installed")
    monkeypatch.setattr(store, "KERNELS", DEMO_KERNELS)
    monkeypatch.setenv(launcher.CHOICE, request.param)
    driver._devices.clear()
    yield torch.cuda.current_device()
    driver._devices.clear()


def load(index: int, path: str = "", symbol: str = "demo_double") -> launcher.Kernel:
    major, minor = torch.cuda.get_device_capability(index)
    image = by_path(path) if path else binaries.select(TABLE, "demo", 10 * major + minor)
    return driver.kernel(index, image, symbol, "demo")


def launches(kernel, x, y, factor=0.5, overlap=False):
    params = bytes(DemoParams((x.data_ptr(), x.stride(0)), y.data_ptr(), y.numel(), factor))
    return ((kernel, -(-y.numel() // kernel.threads), 1, 1, params, overlap),)


def stream_of(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


def test_a_kernel_computes(gpu):
    x, y = torch.randn(2 * N, device="cuda")[::2], torch.empty(N, device="cuda")
    driver.launch(gpu, stream_of(gpu), launches(load(gpu, symbol="demo_triple"), x, y))
    assert torch.equal(y, x * 0.5 * 3)


@pytest.mark.parametrize("path", ["compute_75/demo.ptx.xz", "compute_80/demo.ptx.xz", "compute_89/demo.ptx.xz"])
def test_ptx_of_older_cards_is_compiled_by_the_driver(gpu, path):
    if not by_path(path).runs_on(driver.device(gpu).arch):
        pytest.skip(f"{path} is for later cards")
    x, y = torch.randn(N, device="cuda"), torch.empty(N, device="cuda")
    driver.launch(gpu, stream_of(gpu), launches(load(gpu, path), x, y))
    assert torch.equal(y, x)


def test_machine_code_of_another_card_is_refused_and_the_right_one_still_loads(gpu):
    foreign = "sm_120/demo.cubin.xz" if driver.device(gpu).arch < 100 else "sm_80/demo.cubin.xz"
    with pytest.raises(KernelMissing, match=r"CUDA_ERROR_NO_BINARY_FOR_GPU \(209\)") as caught:
        load(gpu, foreign)
    assert foreign in str(caught.value) and torch.cuda.get_device_name(gpu) in str(caught.value)
    assert load(gpu)
    torch.cuda.synchronize()  # no error stays behind


def test_a_corrupt_image_that_passes_the_hash_is_refused_by_the_driver(gpu, tmp_path, monkeypatch):
    image = binaries.select(TABLE, "demo", driver.device(gpu).arch)
    monkeypatch.setattr(store, "read", lambda image: b"\x7fELF" + bytes(4096))
    with pytest.raises(KernelMissing, match=r"CUDA_ERROR_\w+ \(\d+\)"):
        driver.kernel(gpu, image, "demo_double", "demo")
    monkeypatch.undo()


def test_a_failing_launch_is_told_and_leaves_the_card_usable(gpu):
    x, y, kernel = torch.randn(N, device="cuda"), torch.empty(N, device="cuda"), load(gpu)
    (good,) = launches(kernel, x, y)
    with pytest.raises(CudaError, match=r"cuLaunchKernel: CUDA_ERROR_INVALID_VALUE \(1\).*demo_double \(grid 0x1x1, block 256"):
        driver.launch(gpu, stream_of(gpu), ((kernel, 0, *good[2:]),))
    driver.launch(gpu, stream_of(gpu), (good,))
    assert torch.equal(y, x)


def test_launches_that_overlap_see_the_results_before_them(gpu):
    x, kernel = torch.randn(1 << 22, device="cuda"), load(gpu)
    chain = [x, *(torch.empty_like(x) for _ in range(8))]
    plan = tuple(launches(kernel, a, b, factor=1.0, overlap=True)[0] for a, b in itertools.pairwise(chain))
    for _ in range(20):
        for t in chain[1:]:
            t.fill_(torch.nan)
        driver.launch(gpu, stream_of(gpu), plan)
        assert torch.equal(chain[-1], x * 2**8)


def test_a_new_thread_without_a_context_launches(gpu):
    x, y, kernel, failed = torch.randn(N, device="cuda"), torch.empty(N, device="cuda"), load(gpu), []
    plan, stream = launches(kernel, x, y), stream_of(gpu)

    def work():
        try:
            driver.launch(gpu, stream, plan)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed and torch.equal(y, x)


def test_threads_on_their_own_streams_do_not_mix(gpu):
    kernel, done = load(gpu), []

    def work(number):
        torch.cuda.set_device(gpu)
        with torch.cuda.stream(torch.cuda.Stream(gpu)):
            x = torch.full((N,), float(number), device="cuda")
            ys = [torch.empty_like(x) for _ in range(200)]
            for y in ys:
                driver.launch(gpu, stream_of(gpu), launches(kernel, x, y))
            torch.cuda.current_stream().synchronize()
            done.append(all(bool((y == number).all()) for y in ys))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert done == [True] * 4


def test_a_launch_is_captured_into_a_graph_even_where_it_loads_the_image(gpu):
    x, y = torch.randn(N, device="cuda"), torch.zeros(N, device="cuda")
    driver.device(gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        driver.launch(gpu, stream_of(gpu), launches(load(gpu), x, y))
    assert not y.any()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, x)
    x.mul_(3)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, x)


def test_a_second_card_runs_its_own(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    other = 1 - gpu if gpu < 2 else 0
    for index in (other, gpu, other):  # the current device stays the first
        x, y = torch.randn(N, device=f"cuda:{index}"), torch.empty(N, device=f"cuda:{index}")
        driver.launch(index, stream_of(index), launches(load(index), x, y))
        assert torch.equal(y, x)
    assert torch.cuda.current_device() == gpu


def test_host_time_of_a_launch(gpu, record_property):
    """Told, not judged: three launches in one call, on a queue that is never full."""
    x, y, kernel = torch.randn(N, device="cuda"), torch.empty(N, device="cuda"), load(gpu)
    one, stream = launches(kernel, x, y), stream_of(gpu)
    for plan in (one, one * 3):
        times = []
        for _ in range(25):
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            for _ in range(100):
                driver.launch(gpu, stream, plan)
            times.append((time.perf_counter_ns() - start) / 100e3)
        told = f"{driver.device(gpu).launcher}: {len(plan)} launches {statistics.median(times):.2f} µs"
        record_property("host", told)
        print(told)
