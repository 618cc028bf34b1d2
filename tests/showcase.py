"""The demonstration behind `python dev.py demo`: one small model, sampled with PyTorch's attention and with every variant.

Each sample is held against the same one by the fp64 oracle. A variant passes when it computed every attention call itself (by its
override's own count), changed the result by more than nothing, and by less than the error its kind of P and V may have.
With COMFYUI_PATH set, the model is ComfyUI's WAN, tiny and random, patched by the node; otherwise it is `miniature.py`.
Writes a table to the terminal, and demo.png and demo.html to the folder given.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

if TYPE_CHECKING:
    import torch

OWN = "PyTorch attention"
ORACLE = "fp64 oracle"
NOTHING = 1e-5  # a quantised attention that differs less than this from the oracle has not quantised anything


@dataclass
class Run:
    """One sample and what is known of it. `error` is the relative L2 distance from the oracle's sample."""

    name: str
    latent: torch.Tensor  # [C, H, W]
    seconds: float
    error: float
    bound: float | None = None
    expected_calls: int = 0
    ran: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)

    @property
    def kernels(self) -> str:
        """Which attention ran, and how often."""
        parts = [f"{name} × {count}" for name, count in self.ran.items()]
        parts += [f"the model's own × {sum(counts.values())}" for counts in (self.kept, self.fallbacks) if counts]
        return ", ".join(parts) or f"the model's own × {self.expected_calls}"

    @property
    def verdict(self) -> str:
        """ "ok", or what is wrong; the model's own attention and "auto" are only shown."""
        if not bool(self.latent.isfinite().all()):
            return "not finite"
        if self.bound is None:
            return "ok"
        if self.ran != {self.name: self.expected_calls}:
            return f"ran {self.kernels}, expected {self.name} × {self.expected_calls}"
        if self.error <= NOTHING:
            return f"nothing was quantised: the error is under {NOTHING}"
        return "ok" if self.error < self.bound else f"the error is above its bound, {self.bound}"


@dataclass
class Model:
    """A model to sample: `sample(override)` gives a latent [C, H, W]; `install(variant)` an override and how to sample with it."""

    title: str
    device: torch.device
    calls: int
    sample: Callable[[Any], torch.Tensor]
    override: Callable[[str], Any]
    pack: Any


def choose_triton_mode() -> None:
    """Without a GPU, have Triton interpret its kernels. Comes before torch is imported, for torch imports Triton."""
    package = ROOT / "sageattention" / "__init__.py"
    spec = importlib.util.spec_from_file_location("sageattention_probe", package)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    libcuda = importlib.import_module(f"{spec.name}.device.libcuda")
    try:
        libcuda.library()
    except libcuda.NoDriver:
        os.environ.setdefault("TRITON_INTERPRET", "1")


def part(pack: Any, name: str) -> Any:
    """A module of the pack's own copy of the package."""
    return importlib.import_module(f"{pack.__name__}.sageattention.{name}")


def miniature_model() -> Model:
    """Our own miniature on the GPU or the CPU, hooked by the node's own override class."""
    import torch
    from comfy_standin import NewCore
    from miniature import Config, Miniature, sample
    from pack import load_pack

    pack = load_pack()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Config()
    model = Miniature(config, NewCore().attention, seed=3).to(device)
    title = f"miniature diffusion transformer, {config.steps} steps, {config.tokens} tokens, {config.heads} heads of {config.head_dim}"

    def draw(override: Any) -> torch.Tensor:
        return sample(model, override, seed=3, on_step=lambda step: print(f"  step {step} of {config.steps}", flush=True)).cpu()

    return Model(title, device, config.calls, draw, pack.nodes.adapter.SageOverride, pack)


def comfyui_model(path: str) -> Model:
    """The tiny random WAN of a real ComfyUI, patched through the node."""
    import comfy_models

    # 144 tokens of a 24 × 24 latent: something to look at, and still seconds in Triton's interpreter
    comfy_models.WORKLOADS["wan"] = work = replace(comfy_models.WORKLOADS["wan"], latent=(1, 16, 1, 24, 24))
    comfy_models.start(path)
    import comfy.model_management

    pack, patch = comfy_models.pack_node()
    model = comfy_models.load("wan")
    slot = pack.nodes.slot

    def sample(override: Any) -> torch.Tensor:
        patched = model.clone()
        if override is not None:
            patched.model_options["transformer_options"][slot.KEY] = override
        return comfy_models.sample("wan", patched)[0][0, :, 0]

    def override(variant: str) -> Any:
        return slot.owner(patch(model, variant))

    title = f"tiny WAN in ComfyUI ({path}), {comfy_models.STEPS} steps, cfg {work.cfg}"
    return Model(title, comfy.model_management.get_torch_device(), work.calls, sample, override, pack)


def oracle_override(pack: Any) -> Callable[..., torch.Tensor]:
    """An override that computes every call in fp64."""
    oracle = part(pack, "numerics.reference").oracle

    def override(func, q, k, v, heads, *args, skip_reshape=False, skip_output_reshape=False, **others):
        if not skip_reshape:
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = oracle(q, k, v)[0].to(q.dtype)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    return override


def run_all(model: Model) -> tuple[torch.Tensor, list[Run]]:
    """The oracle's sample, and one `Run` for PyTorch's attention, `auto` and every ready variant."""
    print(f"sampling with the {ORACLE} …", flush=True)
    exact = model.sample(oracle_override(model.pack))
    variants = part(model.pack, "variants").VARIANTS
    ready = [a.name for a in model.pack.sageattention.available_variants(model.device) if a.status == "ready" and a.name != "sdpa"]
    runs = []
    for name in (OWN, "auto", *ready):
        print(f"sampling with {name} …", flush=True)
        override = None if name == OWN else model.override(name)
        if model.device.type == "cuda":
            model.sample(override)  # kernels are compiled and loaded in the first run
            if override is not None:
                override.record.reset()
        begun = time.perf_counter()
        latent = model.sample(override)
        seconds = time.perf_counter() - begun
        counts = override.record.as_dict() if override is not None else {}
        bound = part(model.pack, "cli.workloads").KINDS["normal"].bounds[variants[name].scheme.pv] if name in ready else None
        error = float((latent - exact).norm() / exact.norm())
        runs.append(Run(name, latent, seconds, error, bound, model.calls, **counts))
    return exact, runs


def main() -> int:
    parser = argparse.ArgumentParser(description="Sample a small model with every attention variant and compare")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder for demo.png and demo.html")
    args = parser.parse_args()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    choose_triton_mode()
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
    comfyui = os.environ.get("COMFYUI_PATH")
    model = comfyui_model(comfyui) if comfyui else miniature_model()
    print(f"{model.title}, on {model.device}", flush=True)
    exact, runs = run_all(model)

    import picture

    table = part(model.pack, "cli.text").table
    rows = [(r.name, r.kernels, f"{r.seconds:.2f}", f"{r.error:.2e}", "" if r.bound is None else f"{r.bound:.2e}", r.verdict) for r in runs]
    print("\n" + table(picture.HEAD, rows, numeric=(2, 3, 4)) + "\n")
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("On a CPU only the numbers count: the emulation and Triton's interpreter are slow by nature, a GPU is what is fast.")
    not_ready = [a for a in model.pack.sageattention.available_variants(model.device) if a.status != "ready"]
    for availability in not_ready:
        print(f"not here: {availability.name} – {availability.reason}")
    args.out.mkdir(parents=True, exist_ok=True)
    sheet = picture.sheet(model.title, ORACLE, exact, runs)
    sheet.save(args.out / "demo.png")
    page = picture.page(model.title, sheet, rows, [(a.name, a.reason) for a in not_ready])
    (args.out / "demo.html").write_text(page, encoding="utf-8")
    print(f"\nwrote {args.out / 'demo.png'} and {args.out / 'demo.html'}")
    wrong = [r for r in runs if r.verdict != "ok"]
    for run in wrong:
        print(f"FAILED {run.name}: {run.verdict}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
