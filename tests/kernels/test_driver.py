"""Loader and launchers against a stub driver: which image, what the driver is asked for, and every kind of bad input."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path

import pytest
import stub
from stub import TABLE, DemoParams, by_path

from sageattention import CudaError, KernelMissing, Unsupported
from sageattention.backends.cuda import driver, launcher
from sageattention.cli import doctor
from sageattention.device import libcuda
from sageattention.kernels import binaries, store

ROOT = Path(__file__).resolve().parents[2]
NAME = "a_variant"


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return stub.build_stub(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    return stub.build_launcher(tmp_path_factory.mktemp("wheel"))


def forget() -> None:
    """Drop what a process learns once."""
    driver._devices.clear()
    for cached in (libcuda.library, libcuda.cuda_version, libcuda._nvml_version, launcher.compiled, launcher._calls, store._manifest):
        cached.cache_clear()
    sys.modules.pop(launcher.MODULE, None)


@pytest.fixture
def cuda(library, tmp_path, monkeypatch):
    """The stub driver in the real one's place, two cards of sm_90, and a kernels folder with the demo table."""
    library.reset()
    monkeypatch.setattr(libcuda, "LIBRARY", library.path)
    monkeypatch.setattr(libcuda, "NVML", library.path)
    monkeypatch.setattr(store, "KERNELS", tmp_path / "kernels")
    monkeypatch.setenv(launcher.CHOICE, "ctypes")
    monkeypatch.delenv(binaries.FORCE, raising=False)
    stub.install_images(tmp_path / "kernels")
    forget()
    yield library
    forget()


@pytest.fixture(params=["ctypes", "compiled"])
def either(request, cuda, monkeypatch):
    """`cuda`, with each of the launchers."""
    if request.param == "compiled":
        unpacked = cuda.unpacked = Path(store.KERNELS).parent / "wheel"
        zipfile.ZipFile(request.getfixturevalue("wheel")).extractall(unpacked)
        monkeypatch.syspath_prepend(str(unpacked))
        forget()
    monkeypatch.setenv(launcher.CHOICE, request.param)
    return cuda


def packed(n: int) -> bytes:
    return bytes(DemoParams((0x7F00_0000_0000 + n, -n), 2**63 + n, n, 0.5))


def kernel(path: str = "sm_90a/demo.cubin.xz", symbol: str = "demo_double", device: int = 0):
    return driver.kernel(device, by_path(path), symbol, NAME)


# --- which image a card runs ---

NATIVE = {
    75: "sm_75/demo.cubin.xz", 80: "sm_80/demo.cubin.xz", 86: "sm_86/demo.cubin.xz", 87: "sm_86/demo.cubin.xz",
    89: "sm_89/demo.cubin.xz", 90: "sm_90a/demo.cubin.xz", 100: "sm_100/demo.cubin.xz", 103: "sm_100/demo.cubin.xz",
    110: "compute_89/demo.ptx.xz", 120: "sm_120/demo.cubin.xz", 121: "sm_120/demo.cubin.xz", 130: "compute_89/demo.ptx.xz",
    88: "sm_86/demo.cubin.xz",
}  # fmt: skip


@pytest.mark.parametrize("arch", NATIVE)
def test_every_card_gets_the_closest_image(arch):
    assert binaries.select(TABLE, "demo", arch).path == NATIVE[arch]


@pytest.mark.parametrize(
    ("absent", "arch", "path"),
    [
        ("sm_86", 86, "sm_80/demo.cubin.xz"),  # the lower minor revision's machine code
        ("sm_90a", 90, "compute_89/demo.ptx.xz"),  # sm_89's machine code does not run on 9.0
        ("sm_120", 120, "compute_89/demo.ptx.xz"),
        ("sm_75", 75, "compute_75/demo.ptx.xz"),
    ],
)
def test_without_its_image_a_card_gets_the_next_best(absent, arch, path):
    assert binaries.select([i for i in TABLE if i.arch != absent], "demo", arch).path == path


def test_too_old_a_card_and_an_unknown_name_get_nothing():
    assert binaries.select(TABLE, "demo", 70) is None
    assert binaries.select(TABLE, "other", 90) is None
    assert list(binaries.describe(TABLE, "demo"))[:2] == ["sm_75", "sm_80"]


@pytest.mark.parametrize(
    ("text", "forced", "path"),
    [
        ("75", (75, False), "compute_75/demo.ptx.xz"),
        ("sm_80", (80, False), "compute_80/demo.ptx.xz"),
        ("8.9", (89, False), "compute_89/demo.ptx.xz"),
        ("sm_80 ", (80, False), "compute_80/demo.ptx.xz"),
        ("sm_90a", (90, False), "sm_90a/demo.cubin.xz"),
        ("compute_80", (80, True), "compute_80/demo.ptx.xz"),
        ("", (0, False), "sm_90a/demo.cubin.xz"),
    ],
)
def test_the_environment_forces_a_family(monkeypatch, text, forced, path):
    monkeypatch.setenv(binaries.FORCE, text)
    assert binaries.forced() == forced
    assert binaries.select(TABLE, "demo", 90, *forced).path == path


def test_a_family_the_card_cannot_run_is_not_replaced_by_another():
    assert binaries.select(TABLE, "demo", 80, 89) is None


@pytest.mark.parametrize("text", ["hopper", "9", "sm_", "80;90", "-1"])
def test_nonsense_in_the_environment_is_refused(monkeypatch, text):
    monkeypatch.setenv(binaries.FORCE, text)
    with pytest.raises(Unsupported, match=binaries.FORCE) as caught:
        binaries.forced()
    assert repr(text) in caught.value.reason


# --- loading ---


def test_a_kernel_is_loaded_once_per_device_in_its_primary_context(cuda):
    first = kernel()
    assert kernel() is first and kernel(symbol="demo_triple").handle != first.handle
    assert cuda.get("loaded") == 1 and cuda.get("load_context") == 0xC000
    assert cuda.image() == stub.fake_binary(by_path("sm_90a/demo.cubin.xz"))[:16]
    assert cuda.get("allowed") == 98304  # demo_triple's dynamic shared memory, opted into at load
    kernel(device=1)
    assert cuda.get("loaded") == 2 and cuda.get("load_context") == 0xC001
    assert cuda.get("pushed") == cuda.get("popped") == 3
    assert cuda.get("relaxed") == 2  # loading is allowed while a stream is being captured


def test_threads_that_want_one_kernel_load_it_once(cuda):
    gate, found = threading.Barrier(8), []

    def want():
        gate.wait()
        found.append(kernel())

    threads = [threading.Thread(target=want) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(found) == 8 and all(k is found[0] for k in found) and cuda.get("loaded") == 1


def test_what_is_loaded_is_the_image_with_ptx_closed_by_nul(cuda):
    ptx = by_path("compute_80/demo.ptx.xz")
    assert store.read(ptx) == stub.fake_binary(ptx) + b"\0"


# --- launching ---


def test_a_plan_of_launches_reaches_the_driver_as_given(either):
    double, triple = kernel(), kernel(symbol="demo_triple")
    driver.launch(
        0, 0xABCD, ((double, 3, 4, 5, packed(1), False), (triple, 70000, 1, 2, packed(2), True), (double, 1, 1, 1, packed(3), False))
    )
    got = either.launches()
    assert [l.function for l in got] == [double.handle, triple.handle, double.handle]
    assert [tuple(l.grid) for l in got] == [(3, 4, 5), (70000, 1, 2), (1, 1, 1)]
    assert [tuple(l.block) for l in got] == [(256, 1, 1), (128, 1, 1), (256, 1, 1)]
    assert [l.smem for l in got] == [1024, 98304, 1024]
    assert [l.overlap for l in got] == [0, 1, 0]
    assert [bytes(l.params[: len(packed(1))]) for l in got] == [packed(1), packed(2), packed(3)]
    assert {l.stream for l in got} == {0xABCD} and {l.context for l in got} == {0xC000}


def test_more_launches_than_the_launcher_keeps_on_its_stack(either):
    k = kernel()
    driver.launch(0, 1, tuple((k, n + 1, 1, 1, packed(n), False) for n in range(30)))
    assert [(l.grid[0], bytes(l.params[:32])) for l in either.launches()] == [(n + 1, packed(n)) for n in range(30)]


@pytest.mark.parametrize("version, overlap", [(12020, 0), (12030, 1)])
def test_drivers_that_cannot_capture_an_overlapping_launch_do_none(either, version, overlap):
    """A graph around a call would fail on them."""
    either.set(version=version)
    driver.launch(0, 1, ((kernel(), 1, 1, 1, packed(1), True),))
    assert [l.overlap for l in either.launches()] == [overlap]


def test_cards_before_hopper_launch_without_overlap(either):
    either.capability(0, 89)
    driver.launch(0, 1, ((kernel("sm_89/demo.cubin.xz"), 1, 1, 1, packed(1), True),))
    assert [l.overlap for l in either.launches()] == [0]


def test_the_context_is_switched_only_where_it_is_another_and_put_back(either):
    launch = ((kernel(device=1), 1, 1, 1, packed(1), False),)
    for current, pushes in ((0xC001, 0), (0xC000, 1), (0, 1)):
        either.enter(current)
        before = either.get("pushed")
        driver.launch(1, 1, launch)
        assert either.get("pushed") - before == pushes and either.get("pushed") == either.get("popped")
        assert either.current() == current
    assert {l.context for l in either.launches()} == {0xC001}


def test_threads_do_not_mix_their_parameters(either):
    k = kernel()

    def work(number: int) -> None:
        for _ in range(8):
            driver.launch(0, number, ((k, number, 1, 1, packed(number), False),))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 9)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    got = either.launches()
    assert len(got) == 64 and all(l.stream == l.grid[0] and bytes(l.params[:32]) == packed(l.grid[0]) for l in got)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failed_launch_names_call_error_and_launch(either, overlap):
    k = kernel()
    either.enter(0xC001)
    either.set(launch=700, fail_at=1)
    launches = ((k, 1, 1, 1, packed(1), False), (k, 7, 8, 9, packed(2), overlap), (k, 1, 1, 1, packed(3), False))
    with pytest.raises(CudaError) as caught:
        driver.launch(0, 0x51, launches)
    for part in ("cuLaunchKernelEx" if overlap else "cuLaunchKernel:", "CUDA_ERROR_ILLEGAL_ADDRESS (700)", "demo_double", "grid 7x8x9",
                 "block 256", "1024 bytes of dynamic", "launch 2 of 3", "stream 0x51", "device 0 (Stub A, sm_90)"):  # fmt: skip
        assert part in str(caught.value)
    assert either.get("launched") == 2  # what follows the failure is not issued
    assert either.get("pushed") == either.get("popped")


@pytest.mark.parametrize("params", [b"", packed(1)[:-1], packed(1) + b"\0"])
def test_parameters_of_another_size_never_reach_the_driver(either, params):
    k = kernel()
    with pytest.raises(ValueError, match=f"demo_double takes 32 bytes of parameters, got {len(params)}"):
        driver.launch(0, 0, ((k, 1, 1, 1, params, False),))
    assert either.get("launched") == 0 and either.get("pushed") == either.get("popped")


# --- bad input: what is wrong, which file, which version, what to do; and nothing is left half loaded ---


def refused(path: str = "sm_90a/demo.cubin.xz", symbol: str = "demo_double") -> str:
    """The message of a kernel that can't be had; another image then still can."""
    with pytest.raises(KernelMissing) as caught:
        kernel(path, symbol)
    assert caught.value.variant == NAME
    with pytest.raises(KernelMissing):  # and again, the same
        kernel(path, symbol)
    assert not driver._devices or path not in driver._devices[0].modules
    return str(caught.value)


def damage(change) -> Path:
    path = store.KERNELS / "sm_90a/demo.cubin.xz"
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b[: len(b) // 2], "truncated or corrupt"),
        (lambda b: b"", "truncated or corrupt"),
        (lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:], "truncated or corrupt"),
        (lambda b: b"not an xz file at all", "truncated or corrupt"),
        (lambda b: stub.build.pack(b"whole, but another file"), "is not the file of the manifest"),
    ],
)
def test_a_damaged_image(cuda, change, said):
    path = damage(change)
    message = refused()
    assert said in message and str(path) in message and "reinstall sageattention 3." in message
    assert cuda.get("loaded") == 0
    assert kernel("compute_89/demo.ptx.xz").symbol == "demo_double"  # the next one can be tried


def test_a_missing_image(cuda):
    path = store.KERNELS / "sm_90a/demo.cubin.xz"
    path.unlink()
    assert f"{path} is missing" in refused()
    assert kernel("compute_89/demo.ptx.xz")


BROKEN = ("null", "[]", "{}", '{"sha256": 5, "kernels": {}}', '{"sha256": "00", "kernels": []}', '{"sha256": "00", "kernels": {"k": {}}}')


@pytest.mark.parametrize(
    "content",
    [None, "", "{", "[" * 100_000, '{"format": 0, "images": {}}', "[]", '{"format": 1}']
    + [f'{{"format": 1, "images": {{"sm_90a/demo.cubin.xz": {image}}}}}' for image in BROKEN],
    ids=lambda content: "none" if content is None else content[:80],
)
def test_a_missing_or_broken_manifest(cuda, content):
    path = store.KERNELS / store.MANIFEST
    path.unlink() if content is None else path.write_text(content)
    forget()
    message = refused()
    assert str(path) in message and "reinstall sageattention 3." in message


@pytest.mark.parametrize(("key", "value"), [("params", 40), ("threads", 64)])
def test_an_image_of_another_version(cuda, key, value):
    path = store.KERNELS / store.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["images"]["sm_90a/demo.cubin.xz"]["kernels"]["demo_double"][key] = value
    path.write_text(json.dumps(manifest))
    forget()
    message = refused()
    assert "another version" in message and f"the {key} of demo_double is {value}" in message


def test_an_image_or_kernel_that_the_manifest_does_not_list(cuda):
    path = store.KERNELS / store.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["images"]["sm_80/demo.cubin.xz"]
    del manifest["images"]["sm_90a/demo.cubin.xz"]["kernels"]["demo_triple"]
    path.write_text(json.dumps(manifest))
    forget()
    assert "does not list sm_80/demo.cubin.xz" in refused("sm_80/demo.cubin.xz")
    assert "has no kernel demo_triple" in refused(symbol="demo_triple")
    with pytest.raises(KeyError, match="nonesuch"):
        kernel(symbol="nonesuch")


def test_no_driver(cuda, monkeypatch):
    monkeypatch.setattr(libcuda, "LIBRARY", "libnone.so.1")
    message = refused()
    assert "libnone.so.1 can't be opened" in message and "install a driver >= 525" in message


def test_ctypes_own_advice_is_left_out(cuda, monkeypatch):
    """On Windows it tells whoever calls ctypes.CDLL what to try."""

    def refuse(name):
        said = f"Could not find module '{name}' (or one of its dependencies)."
        raise FileNotFoundError(f"{said} Try using the full path with constructor syntax.")

    monkeypatch.setattr(libcuda.ctypes, "CDLL", refuse)
    forget()
    assert "(or one of its dependencies)); install a driver" in refused()


@pytest.mark.parametrize(("code", "said"), [(100, "sees no GPU"), (34, "stub")])
def test_a_driver_that_is_none(cuda, code, said):
    cuda.set(init=code)
    assert said in refused()


def test_a_driver_that_fails_to_start(cuda):
    cuda.set(init=803)
    assert "cuInit: CUDA_ERROR_STUB (803)" in refused()


@pytest.mark.parametrize(
    ("path", "arch", "version", "needs"),
    [
        ("sm_90a/demo.cubin.xz", 90, 11080, ">= 525 (CUDA 12.0)"),
        ("sm_100/demo.cubin.xz", 100, 12040, ">= 570 (CUDA 12.8)"),
        ("sm_120/demo.cubin.xz", 120, 12070, ">= 570 (CUDA 12.8)"),
        ("compute_80/demo.ptx.xz", 90, 12060, ">= 570 (CUDA 12.8)"),
    ],
)
def test_a_driver_too_old_for_the_image(cuda, path, arch, version, needs):
    cuda.set(version=version)
    cuda.capability(0, arch)
    message = refused(path)
    assert needs in message and f"571.23, CUDA {version // 1000}.{version % 1000 // 10}" in message and str(Path(path)) in message
    assert cuda.get("loaded") == 0


def test_the_oldest_driver_that_will_do(cuda):
    cuda.set(version=12000)
    assert kernel()


@pytest.mark.parametrize("code", sorted(libcuda.IMAGE_REFUSED))
def test_an_image_the_driver_refuses(cuda, code):
    cuda.set(load=code)
    message = refused()
    assert f"({code})" in message and "stub: no" in message and str(Path("sm_90a/demo.cubin.xz")) in message and "571.23" in message
    cuda.set(load=0)
    assert kernel("compute_89/demo.ptx.xz")


def test_a_driver_that_fails_while_it_loads_has_no_such_kernel_this_time(cuda):
    """Nothing has run: another variant, or the model's own attention, may."""
    cuda.set(load=2)
    assert "cuModuleLoadDataEx(sm_90a/demo.cubin.xz): CUDA_ERROR_STUB (2)" in refused()
    assert cuda.get("pushed") == cuda.get("popped")
    cuda.set(load=0)
    assert kernel()  # memory may be free by now


def test_too_little_shared_memory(cuda):
    cuda.set(shared=65536)
    message = refused(symbol="demo_triple")
    for part in ("demo_triple", "needs 98560 bytes", "device 0 (Stub A, sm_90) has 65536"):
        assert part in message
    assert cuda.get("loaded") == 0
    assert kernel()  # its neighbour needs less


def test_too_little_shared_memory_for_ptx_is_seen_after_the_driver_compiled_it(cuda):
    cuda.set(shared=99000, static=1024)
    with pytest.raises(KernelMissing, match="needs 99328 bytes"):
        kernel("compute_80/demo.ptx.xz", "demo_triple")


# --- choosing a launcher ---


def fake_module(**members) -> types.ModuleType:
    module = types.ModuleType(launcher.MODULE)
    vars(module).update(members)
    return module


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"__version__": "2.9.1", "__file__": "/x/launcher.so"}, "/x/launcher.so is version 2.9.1, sageattention is 3."),
        ({}, "is version unknown"),
    ],
)
def test_a_launcher_of_another_version_is_told_once_and_ctypes_used(cuda, monkeypatch, caplog, members, said):
    monkeypatch.setitem(sys.modules, launcher.MODULE, fake_module(**members))
    monkeypatch.setenv(launcher.CHOICE, "auto")
    with caplog.at_level(logging.WARNING):
        driver.launch(0, 1, ((kernel(), 1, 1, 1, packed(1), False),))
        kernel(device=1)
    assert driver._devices[0].launcher == driver._devices[1].launcher == "ctypes" and cuda.get("launched") == 1
    assert len(caplog.messages) == 1 and said in caplog.messages[0] and "pip install sageattention-launcher==3." in caplog.messages[0]


def test_a_launcher_that_is_no_module_is_told_and_ctypes_used(cuda, monkeypatch, caplog, tmp_path):
    (tmp_path / f"{launcher.MODULE}.py").write_text("raise ImportError('DLL load failed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert launcher.compiled() is None
    assert "DLL load failed" in caplog.text


def test_without_the_compiled_launcher_nothing_is_said(cuda, monkeypatch, caplog):
    monkeypatch.setattr(launcher, "MODULE", "no_such_launcher")
    monkeypatch.delenv(launcher.CHOICE)
    assert launcher.choose() == ("ctypes", launcher.launch_ctypes)
    assert not caplog.messages


@pytest.mark.parametrize("asked", ["compiled", "fast"])
def test_a_launcher_that_cannot_be_had_is_not_replaced_silently(cuda, monkeypatch, asked):
    monkeypatch.setattr(launcher, "MODULE", "no_such_launcher")
    monkeypatch.setenv(launcher.CHOICE, asked)
    with pytest.raises(Unsupported, match=launcher.CHOICE):
        launcher.choose()


def test_the_compiled_launcher_is_of_the_packages_version(either):
    if launcher.choose()[0] == "compiled":
        import sageattention_launcher

        import sageattention

        assert sageattention_launcher.__version__ == sageattention.__version__
        assert "can't be opened" in sageattention_launcher.open("libnone.so.1")
        k = kernel()
        driver.launch(0, 1, ((k, 1, 1, 1, packed(1), False),))  # a failed open leaves the driver in place
        for wrong in ((k, 1, 1, 1, packed(1)), (k, -1, 1, 1, packed(1), False), (k, 2**32, 1, 1, packed(1), False), (1, 2), 5):
            with pytest.raises((TypeError, ValueError, OverflowError)):
                driver.launch(0, 1, (wrong,))
        assert either.get("launched") == 1


def test_importing_opens_no_driver():
    code = """if True:
        import sys, sageattention.backends.cuda.driver as d
        assert "torch" not in sys.modules and not d.libcuda.library.cache_info().currsize"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_doctor_asks_the_driver_itself(cuda):
    cuda.capability(1, 89)
    problems = []
    version, cards = doctor._gpus(problems)
    assert problems == [] and version.startswith("571.23")
    assert [(card["name"], card["arch"], card["multiprocessors"], card["memory_mib"]) for card in cards] == [
        ("Stub A", 90, 132, 24576), ("Stub B", 89, 132, 24576)]  # fmt: skip
