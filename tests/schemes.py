"""Every scheme of the variants as a parameter of a test."""

from __future__ import annotations

import pytest

from sageattention import variants

SCHEMES = {
    f"{variant.name.removeprefix('sageattn_qk_int8_')}-{accum}": scheme
    for variant in variants.VARIANTS.values()
    for accum, scheme in variant.schemes.items()
}
NAMES = {scheme: name for name, scheme in reversed(SCHEMES.items())}
each_scheme = pytest.mark.parametrize("scheme", dict(zip(SCHEMES.values(), SCHEMES)), ids=lambda s: NAMES[s])
