"""pytest in a Python without torch: python tests/windows/run_tests.py ARGUMENTS

The root of the checkout is a package, ComfyUI's entry to the node pack, and pytest would import it, and with it torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class TheRootIsNoPackage:
    @staticmethod
    def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Dir | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[1:], plugins=[TheRootIsNoPackage()]))
