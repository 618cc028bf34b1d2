"""Which variant runs a block-sparse call."""

from __future__ import annotations

from ..device.capability import Capability
from ..errors import KernelMissing, Unsupported
from ..variants import REFERENCE, VARIANTS, Variant
from .plan import refusal

NO_KERNEL = "this installation holds no block-sparse kernel; sageattn is dense, variant='reference' slow (plain PyTorch)"


def sparse_variant(capability: Capability, variant: str = "auto", arch: int = 0, ptx: bool = False) -> Variant:
    """The variant that a block-sparse call gets. `arch` and `ptx` as for `plan`.

    Raises:
        Unsupported: the variant is unknown, has no block-sparse form, or can't run on this device.
        KernelMissing: its kernel is not in this installation.
    """
    able = {name: v for name, v in VARIANTS.items() if v.backend in ("reference", "cuda")}
    if variant == "auto":
        if capability.device != "cuda":
            return REFERENCE
        raise KernelMissing("auto", NO_KERNEL)
    if variant not in able:
        raise Unsupported("variant", f"got {variant!r}, accepted of block-sparse calls are 'auto', {', '.join(map(repr, able))}")
    error = refusal(able[variant], capability, arch, ptx)
    if error is not None:
        raise error
    if able[variant].backend == "cuda":
        raise KernelMissing(variant, NO_KERNEL)
    return able[variant]
