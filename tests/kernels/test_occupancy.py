"""As many blocks of an attention kernel as its registers are budgeted for fit the shared memory of a multiprocessor."""

from __future__ import annotations

import pytest

from sageattention.kernels import store
from sageattention.kernels.architectures import ARCHITECTURES
from sageattention.kernels.table import IMAGES

RESERVED = 1 << 10  # bytes of each block that the driver takes, from 8.0 on
OF_TARGET = {a.target: a for a in ARCHITECTURES.values()}
ATTENTION = [image for image in IMAGES if image.name.startswith("attend_") and image.arch in OF_TARGET and image.path.endswith(".cubin.xz")]


@pytest.mark.parametrize("image", ATTENTION, ids=lambda image: image.path)
def test_blocks_fit_shared_memory(image) -> None:
    room = OF_TARGET[image.arch].shared << 10
    for entry in image.entries:
        symbol, kernel = entry.symbol, store.record(image, entry)
        block = kernel["smem_dynamic"] + kernel["smem_static"] + (0 if image.arch == "sm_75" else RESERVED)
        assert kernel["min_blocks"] * block <= room, symbol
