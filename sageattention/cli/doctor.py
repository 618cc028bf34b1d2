"""`doctor`: what this machine has, which copy of the package is loaded, which variants run and why the others don't.

Works with no torch and no GPU: the variants' table comes from `plan.refusal`, which needs neither. Always exits 0, for telling
what is missing is its job done.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from .._version import __version__
from ..device import capability, libcuda
from ..device.capability import Capability
from ..errors import CudaError, KernelMissing, Unsupported
from ..kernels import binaries, store
from ..kernels.architectures import ARCHITECTURES
from ..kernels.table import IMAGES
from ..planning import calibration, verdicts
from ..planning.calibration import Calibration
from ..planning.here import forced_kernels
from ..planning.plan import plan, refusal
from ..planning.problem import Problem
from ..planning.verdicts import Verdicts
from ..variants import CUDA_FP16, VARIANTS, Candidate
from .text import table
from .workloads import SHAPES, Shape

PACKAGE = Path(__file__).resolve().parents[1]
VARIABLES = (
    "SAGEATTENTION_VARIANT", "SAGEATTENTION_ARCH", "SAGEATTENTION_LAUNCHER", "SAGEATTENTION_CACHE", "SAGEATTENTION_VERIFY",
    "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
MULTIPROCESSOR_COUNT, COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 16, 75, 76  # CUdevice_attribute


def facts() -> dict[str, Any]:
    """Everything `doctor` tells, as plain data; `problems` lists what stands in the way, each with its remedy."""
    problems: list[str] = []
    driver, gpus = _gpus(problems)
    torch = _torch(bool(gpus), problems)
    machines = [_machine(gpu) for gpu in gpus] or [Capability("cpu", triton=capability.triton_mode(), name="CPU")]
    return {
        "sageattention": _package(problems),
        "system": {"os": platform.platform(), "machine": platform.machine()},
        "python": {"version": platform.python_version(), "executable": sys.executable, "prefix": sys.prefix},
        "torch": torch,
        "driver": driver,
        "gpus": gpus,
        "triton": _triton(any(refusal(CUDA_FP16, machine) for machine in machines) if gpus else False, problems),
        "launcher": _launcher(driver is not None, problems),
        "images": _images(problems),
        "environment": _environment(problems),
        "devices": [_device(machine, torch is not None and "error" not in torch, problems) for machine in machines],
        "cards": {} if gpus else _cards(),
        "problems": list(dict.fromkeys(problems)),
    }


def driver_version() -> str:
    """The NVIDIA driver's version, with the CUDA version it supports."""
    return libcuda.driver_version()


def _package(problems: list[str]) -> dict[str, Any]:
    installed = []
    for distribution in importlib.metadata.distributions(name="sageattention"):
        folder = Path(str(distribution.locate_file("sageattention"))).resolve()
        copy = {"version": distribution.version, "path": str(folder), "loaded": folder == PACKAGE}
        installed.append({**copy, "same": copy["loaded"] or _is_like_this(folder)})
    for other in installed:
        if not other["same"]:
            problems.append(
                f"another sageattention {other['version']} is installed in {other['path']}: `import sageattention` in other programs, and "
                "ComfyUI's --use-sage-attention, may get that one; uninstall it if you want this one"
            )
    spec = importlib.util.find_spec("sageattention")
    found = str(Path(spec.origin).parent) if spec and spec.origin else None
    return {
        "version": __version__,
        "path": str(PACKAGE),
        "module": __package__.rpartition(".")[0],
        "import_finds": found,
        "installed": installed,
    }


def _is_like_this(folder: Path) -> bool:
    """Whether a copy has the files that this one has: install.py puts one beside the pack's."""
    files = [path.relative_to(PACKAGE) for pattern in ("**/*.py", "kernels/manifest.json") for path in PACKAGE.glob(pattern)]
    try:
        return all((folder / file).read_bytes() == (PACKAGE / file).read_bytes() for file in files)
    except OSError:  # one is not there
        return False


def _torch(has_gpu: bool, problems: list[str]) -> dict[str, Any] | None:
    if importlib.util.find_spec("torch") is None:
        problems.append(f"torch is not installed in {sys.executable}: no attention runs without it")
        return None
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a DLL of torch can't be loaded
        problems.append(f"torch is installed but can't be imported ({error}): reinstall it in {sys.executable}")
        return {"error": str(error)}
    build = torch.version.cuda or (f"ROCm {torch.version.hip}" if torch.version.hip else "CPU")
    found = {"version": torch.__version__, "build": build, "path": str(Path(torch.__file__).parent), "sees_gpu": torch.cuda.is_available()}
    if has_gpu and torch.version.cuda is None:
        problems.append(f"the driver sees a GPU, but torch {torch.__version__} is a build without CUDA: install a CUDA build of torch")
    elif has_gpu and not found["sees_gpu"]:
        problems.append("the driver sees a GPU, but torch.cuda.is_available() is False: the driver may be too old for torch's CUDA")
    return found


def _gpus(problems: list[str]) -> tuple[str | None, list[dict[str, Any]]]:
    """The driver's version and the cards it sees, through the driver itself: no torch needed."""
    try:
        cuda = libcuda.library()
        count = ctypes.c_int()
        libcuda.check(cuda.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
        return driver_version(), [_gpu(cuda, index) for index in range(count.value)]
    except libcuda.NoDriver as error:
        problems.append(f"no NVIDIA GPU: {error}")
    except CudaError as error:
        problems.append(f"the NVIDIA driver fails: {error}")
    return None, []


def _gpu(cuda: ctypes.CDLL, index: int) -> dict[str, Any]:
    major, minor, multiprocessors = (
        libcuda.device_attribute(index, a) for a in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR, MULTIPROCESSOR_COUNT)
    )
    handle, size = ctypes.c_int(), ctypes.c_size_t()
    libcuda.check(cuda.cuDeviceGet(ctypes.byref(handle), index), f"cuDeviceGet({index})")
    libcuda.check(cuda.cuDeviceTotalMem_v2(ctypes.byref(size), handle), f"cuDeviceTotalMem({index})")
    return {
        "index": index,
        "name": libcuda.device_name(index),
        "arch": 10 * major + minor,
        "multiprocessors": multiprocessors,
        "memory_mib": size.value >> 20,
    }


def _machine(gpu: dict[str, Any]) -> Capability:
    return Capability("cuda", gpu["arch"], gpu["multiprocessors"], capability.triton_mode(), gpu["name"])


def _triton(needed: bool, problems: list[str]) -> dict[str, Any]:
    """What there is of Triton. Its absence is a problem only where it is `needed`: no CUDA variant can run."""
    mode = capability.triton_mode()
    versions = {}
    for name in ("triton", "triton-windows", "pytorch-triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {"mode": mode, "distributions": versions}
    if mode == "none":
        if needed:
            pip = f"`{sys.executable} -m pip install triton` makes"
            remedy = "`install.py --with-triton` in the pack's folder makes" if os.name == "nt" else pip
            problems.append(f"no CUDA variant can run here, and Triton is not installed: {remedy} the Triton variant available")
        return found
    if mode != "broken":
        found["version"] = importlib.import_module("triton").__version__
    else:
        found["error"] = capability.triton_error()
        problems.append(f"Triton is installed but can't be imported ({found['error']}): reinstall it")
    return found


def _launcher(has_driver: bool, problems: list[str]) -> dict[str, Any]:
    from ..backends.cuda import launcher

    try:
        version = importlib.metadata.version(launcher.DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        version = None
    found: dict[str, Any] = {"distribution": version}
    if not has_driver:
        return found | {"uses": None}
    try:
        return found | {"uses": launcher.choose()[0]}
    except Unsupported as error:
        problems.append(str(error))
        return found | {"uses": None, "error": str(error)}


def _environment(problems: list[str]) -> dict[str, str]:
    named = os.environ.get("SAGEATTENTION_VARIANT")
    if named and named != "auto" and named not in VARIANTS:
        known = ", ".join(VARIANTS)
        problems.append(f"SAGEATTENTION_VARIANT holds {named!r}, which is no variant, so 'auto' chooses; known are {known}")
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def _images(problems: list[str]) -> dict[str, Any]:
    """Which of the package's kernel images are in this installation, read and verified."""
    present, unusable = [], []
    for image in (i for i in IMAGES if i.released):
        try:
            store.read(image)
            present.append(image.path)
        except store.Unusable as error:
            unusable.append(image.path)
            problems.append(str(error))
    return {"folder": str(store.KERNELS), "present": present, "unusable": unusable}


def _device(machine: Capability, has_torch: bool, problems: list[str]) -> dict[str, Any]:
    """The variants' table of one device and what `auto` would run there."""
    try:
        forced = binaries.forced()
    except Unsupported as malformed:
        problems.append(str(malformed))
        forced = 0, False
    rows = []
    for variant in VARIANTS.values():
        error = refusal(variant, machine, *forced)
        status = "missing" if isinstance(error, KernelMissing) else "unsupported" if error else "ready" if has_torch else "needs torch"
        rows.append({"name": variant.name, "status": status, "summary": variant.summary, "reason": error.reason if error else ""})
    remembers = has_torch and machine.device == "cuda"  # calibrations and verdicts hold for one torch
    kernels = forced_kernels(*forced)
    known = calibration.of_card(machine) if remembers else None
    seen = verdicts.of_card(machine, kernels) if remembers and verdicts.needed(forced[0] or machine.arch) else None
    auto = {name: auto_choice(shape, machine, forced, known, seen) for name, shape in SHAPES.items()}
    found = {"name": machine.name, "device": machine.device, "arch": machine.arch, "variants": rows, "auto": auto}
    if not remembers:
        return found
    return found | {"calibration": calibration.state(machine), "verified": verdicts.lines(machine, forced[0] or machine.arch, kernels)}


def auto_choice(
    shape: Shape, machine: Capability, forced: tuple[int, bool] = (0, False), known: Calibration | None = None, seen: Verdicts | None = None
) -> dict[str, str]:
    """What `auto` chooses for a bf16 call of `shape` on a machine: {"variant", "accum", "basis", "reason"}."""
    problem = Problem(
        shape.batch, shape.heads, shape.kv_heads, shape.len_q, shape.len_kv, shape.head_dim, "bfloat16", machine.device, 0,
        sm_scale=shape.head_dim**-0.5,
    )  # fmt: skip
    chosen = plan(problem, machine, "auto", "", forced[0], known, forced[1], verdicts=seen)
    return {"variant": chosen.variant.name, "accum": chosen.accum, "basis": chosen.basis, "reason": chosen.reason}


def _cards() -> dict[str, dict[str, str]]:
    """For a machine without a GPU: what this installation would run on one, for an image and a video model's attention."""
    found = {}
    for arch, row in ARCHITECTURES.items():
        machine = Capability("cuda", arch, 0, capability.triton_mode(), row.cards)
        found[f"sm_{arch}"] = {"cards": row.cards} | {
            name: auto_choice(SHAPES[name], machine)["variant"] for name in ("flux_1024", "wan_480p")
        }
    return found


def main(args: argparse.Namespace) -> int:
    """The command; always 0."""
    found = facts()
    print(json.dumps(found, indent=2) if args.json else report(found))
    return 0


def report(found: dict[str, Any]) -> str:
    """`facts()` as text for a person."""
    package, torch, triton, launcher, images = (found[k] for k in ("sageattention", "torch", "triton", "launcher", "images"))
    lines = [f"sageattention {package['version']} from {package['path']} (as module {package['module']})"]
    if package["import_finds"] != package["path"]:
        lines.append(f"  `import sageattention` finds {package['import_finds'] or 'none'}")
    lines += [
        f"system     {found['system']['os']}",
        f"python     {found['python']['version']}, {found['python']['executable']}",
        f"torch      {_torch_line(torch)}",
        f"driver     {found['driver'] or 'none'}",
        *(f"gpu {g['index']}      {g['name']}, sm_{g['arch']}, {g['memory_mib']} MiB" for g in found["gpus"]),
        f"triton     {_triton_line(triton)}",
        f"launcher   {launcher['uses'] or 'not needed without a GPU'}"
        + (f" (sageattention-launcher {launcher['distribution']})" if launcher["distribution"] else ""),
        f"kernels    {len(images['present'])} images in {images['folder']}"
        if images["present"]
        else "kernels    no CUDA images in this installation",
    ]
    if found["environment"]:
        lines.append("set        " + ", ".join(f"{k}={v}" for k, v in found["environment"].items()))
    for device in found["devices"]:
        arch = f" (sm_{device['arch']})" if device["arch"] else ""
        lines += ["", f"Variants on {device['name']}{arch}"]
        lines.append(table(("variant", "status", ""), [(v["name"], v["status"], v["reason"] or v["summary"]) for v in device["variants"]]))
        lines += ["", f"What `auto` {'runs' if torch and 'error' not in torch else 'would run'} here", _auto_text(device["auto"])]
        if "calibration" in device:
            lines.append(f"calibration: {device['calibration']}")
            lines += [f"verified: {line}" for line in device["verified"]]
    if found["cards"]:
        rows = [(arch, c["cards"], c["flux_1024"], c["wan_480p"]) for arch, c in found["cards"].items()]
        lines += ["", "What `auto` of this installation would run on a card", table(("", "", "flux_1024", "wan_480p"), rows)]
    if found["problems"]:
        lines += ["", "What stands in the way"]
        lines += [f"- {problem}" for problem in found["problems"]]
    return "\n".join(lines)


def _auto_text(auto: dict[str, dict[str, str]]) -> str:
    def chosen(a: dict[str, str]) -> str:
        return str(Candidate(a["variant"], a["accum"]))

    answers = {(chosen(a), a["reason"]) for a in auto.values()}
    if len(answers) == 1:
        variant, reason = answers.pop()
        return f"{variant} for every shape: {reason}"
    return table(("shape", "variant", "because"), [(str(SHAPES[n]), chosen(a), a["reason"]) for n, a in auto.items()])


def _torch_line(torch: dict[str, Any] | None) -> str:
    if torch is None:
        return "not installed"
    if "error" in torch:
        return f"can't be imported: {torch['error']}"
    return f"{torch['version']} ({torch['build']}), {torch['path']}"


def _triton_line(triton: dict[str, Any]) -> str:
    if triton["mode"] == "none":
        return "not installed"
    if "error" in triton:
        return f"can't be imported: {triton['error']}"
    return f"{triton['version']}, {'interpreted on the CPU (TRITON_INTERPRET=1)' if triton['mode'] == 'interpret' else 'native'}"
