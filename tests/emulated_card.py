"""A card on the host for tests of device code: csrc's kernels, emulated lane by lane (tests/lanes), under the package's own host side."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from lane_compiler import COMPILER, compiled

from sageattention.backends.cuda import driver, host, workspace
from sageattention.device.capability import Capability
from sageattention.kernels import binaries, store
from sageattention.kernels.architectures import ARCHITECTURES
from sageattention.kernels.table import CLASSIFY, IMAGES, KERNELS, PLACE_SEQUENCES
from sageattention.planning.problem import Problem
from sageattention.variants import VARIANTS

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++ on Linux")
CARDS = [(75, 128), (80, 256), (89, 128), (90, 64), (90, 128)]  # (architecture, compiled head_dim)
MMA = {k.name: (v.name, k) for v in VARIANTS.values() for k in v.kernels if not k.arch}
COMMON = (CLASSIFY.symbol, PLACE_SEQUENCES.symbol)  # to all head dimensions
each_variant = pytest.mark.parametrize("variant", [name for name, _ in MMA.values()], ids=MMA)


class Lanes:
    """A card that runs on the host: an architecture's quantisers, router and attention kernels of one head dimension.

    wgmma: with Hopper's own attention instead of that by mma.sync.
    """

    def __init__(self, arch: int, head_dim: int, folder: Path, wgmma: bool = False):
        self.capability, self.head_dim = Capability("cuda", arch, 2, "none", "host"), head_dim
        target, left_out = ARCHITECTURES[arch].target, {k.attend_image(head_dim) for k in KERNELS if bool(k.arch) != wgmma}
        chosen = [e for i in IMAGES if i.arch == target and i.name not in left_out for e in i.entries]
        self.entries = {entry.symbol: entry for entry in chosen if f"_d{head_dim}" in entry.symbol or entry.symbol in COMMON}
        functions = "".join(
            f'extern "C" void {e.symbol}(const {e.params.__name__}* p, unsigned blocks) '
            f"{{ run_grid(blocks, {e.threads}, [&] {{ {e.expression}(*p); }}); }}\n"
            for e in self.entries.values()
        )
        sources = dict.fromkeys(k.source for k in KERNELS if k.built_for(target) and bool(k.arch) == wgmma)
        self.library = compiled(arch, folder, ("kernel/quantize.cuh", "kernel/route_blocks.cuh", *sources), functions)

    def launch(self, device: int, stream: int, launches: tuple) -> None:
        for symbol, x, _, _, params, _ in launches:
            assert len(params) == ctypes.sizeof(self.entries[symbol].params)
            getattr(self.library, symbol)(ctypes.create_string_buffer(params, len(params)), ctypes.c_uint(x))


_compiled: dict[tuple[int, int, bool], Lanes] = {}


def lanes_of(arch: int, head_dim: int, folder: Path, wgmma: bool = False) -> Lanes:
    """The card, compiled in `folder` where no test needed it before."""
    key = arch, head_dim, wgmma
    if key not in _compiled:
        _compiled[key] = Lanes(*key[:2], folder, wgmma)
    return _compiled[key]


def install(monkeypatch: pytest.MonkeyPatch, lanes: Lanes) -> Lanes:
    """Put the card in the place of a real one."""
    monkeypatch.delenv(binaries.FORCE, raising=False)
    monkeypatch.setattr(store, "missing", lambda image: "")
    monkeypatch.setattr(workspace.capability, "of_device", lambda *_: lanes.capability)
    monkeypatch.setattr(driver, "kernel", lambda index, image, symbol, variant: symbol)

    def issue(device: int, chains: list, first: tuple = ()) -> None:
        for part in filter(None, (first, *chains)):
            lanes.launch(device, 0, part)

    monkeypatch.setattr(host, "issue", issue)
    return lanes


def on_card(tensors: dict[str, torch.Tensor], **options) -> Problem:
    return Problem.from_tensors(**tensors, return_lse=True, **options)._replace(device="cuda", device_index=0)
