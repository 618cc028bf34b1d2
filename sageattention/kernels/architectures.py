"""The compute capabilities that kernels are built for, and what the rest of the project has to know of each."""

from __future__ import annotations

from dataclasses import dataclass

# What a driver must support: the CUDA version as cuDriverGetVersion tells it, and the driver branch that brought it (CUDA Compatibility
# guide). One CUDA 12.8 compiler builds everything: its cubins load on any CUDA 12 driver, its PTX where the driver's compiler is as new.
OLDEST_DRIVER, PTX_DRIVER = (12000, "525"), (12080, "570")


@dataclass(frozen=True)
class Architecture:
    """One row: a compute capability (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")."""

    target: str  # as the compiler names it
    cards: str  # as users name them
    shared: int  # KiB of shared memory of a multiprocessor
    warps: int  # resident on a multiprocessor
    driver: tuple[int, str] = OLDEST_DRIVER  # that loads its machine code: one that knows the card

    @property
    def shared_of_block(self) -> int:
        """Bytes of shared memory that a block may ask for; from 8.0 on the system keeps 1 KiB of each block's."""
        return (self.shared - (self.target != "sm_75")) * 1024


ARCHITECTURES: dict[int, Architecture] = {
    75: Architecture("sm_75", "RTX 20xx", 64, 32),
    80: Architecture("sm_80", "A100", 164, 64),
    86: Architecture("sm_86", "RTX 30xx", 100, 48),
    89: Architecture("sm_89", "RTX 40xx", 100, 48),
    90: Architecture("sm_90a", "H100, H200", 228, 64),
    100: Architecture("sm_100", "B200", 228, 64, (12080, "570")),
    120: Architecture("sm_120", "RTX 50xx", 100, 48, (12080, "570")),
}
# The last PTX is for cards after those above. The other PTX serves the tests, which run these architectures' kernels on a later card.
TEST_TARGETS = ("compute_75", "compute_80")
TARGETS = (*(row.target for row in ARCHITECTURES.values()), *TEST_TARGETS, "compute_89")
