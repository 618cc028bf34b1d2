"""Hopper's own kernels: they compile without spills or serialised wgmma, and their numerics keep the bounds."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from stub import CSRC, build, nvrtc  # noqa: E402

from sageattention import inputs, variants  # noqa: E402
from sageattention.reference import emulate, oracle  # noqa: E402

IMAGES = {i.name: i for i in variants.IMAGES if "wgmma" in i.name and not i.name.endswith("d64")}


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
def test_compiles_without_spills_or_serialised_wgmma(image):
    options = [*build.OPTIONS, *image.options, f"--include-path={CSRC}"]
    try:
        _, usage, warnings = nvrtc.compile_text(build.translation_unit(image), image.name, image.arch, options)
    except nvrtc.CompileError as error:
        if "not installed" in str(error):
            pytest.skip(str(error))
        raise
    assert not warnings and set(usage) == {e.symbol for e in image.entries}
    assert not any(u.stack or u.spills for u in usage.values())


@pytest.mark.parametrize("kind", ["normal", "channel_bias", "heavy_tailed", "sink"])
def test_scheme_keeps_the_bounds(kind):
    shape = inputs.Shape("small", 1, 1, 256, 2001, 128)
    q, k, v = inputs.make(kind, shape)
    error = inputs.relative_l2(emulate(q, k, v, variants.FP16_FP32_WGMMA)[0], oracle(q, k, v)[0])
    assert error <= inputs.KINDS[kind].bounds["fp16"]
