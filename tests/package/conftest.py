"""Fixtures of several test files of the package."""

from __future__ import annotations

import pytest


@pytest.fixture
def hopper_without_kernels(monkeypatch):
    """CPU tensors that the planner takes for a GPU's, in an installation that holds no kernel."""
    from sageattention.device import capability
    from sageattention.device.capability import Capability

    monkeypatch.setattr(capability, "of_device", lambda device, index: Capability("cuda", 90, 132, "none", "H200"))
