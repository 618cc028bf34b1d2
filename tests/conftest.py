"""What every test run shares: which marked tests can run here, and a torch that is quick on few cores."""

from __future__ import annotations

import os

import pytest

collect_ignore = ["../__init__.py"]  # the node pack's entry is ComfyUI's to import, not pytest's


def pytest_configure() -> None:
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # small tensors: a second thread costs more in waiting than it computes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {
        "gpu": None if _has_gpu() else "no NVIDIA GPU here",
        "comfyui": None if os.environ.get("COMFYUI_PATH") else "COMFYUI_PATH is not set",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def environment_is_read_anew():
    from sageattention import settings

    settings.forget()
    yield
    settings.forget()


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
