"""Runs before ComfyUI imports anything: lets `import sageattention` find the bundled package when none is installed."""

import importlib.util
import os
import sys

BUNDLED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sageattention")


class BundledSageAttention:
    """Last in `sys.meta_path`, so that an installed package wins. It knows this one name, and puts no folder on `sys.path`."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "sageattention":
            return None
        return importlib.util.spec_from_file_location(name, os.path.join(BUNDLED, "__init__.py"), submodule_search_locations=[BUNDLED])


sys.meta_path.append(BundledSageAttention)
