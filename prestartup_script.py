"""Runs before ComfyUI imports anything: lets `import sageattention` find the bundled package when none is installed.

So --use-sage-attention works right after a clone. An installed sageattention always wins; when install.py found it broken, and
it is still the same one, a line in the log says so. Stdlib only and well below a millisecond; it never turns the flag on.
"""

import importlib.util
import json
import logging
import os
import sys

PACK = os.path.dirname(os.path.abspath(__file__))
BUNDLED = os.path.join(PACK, "sageattention")


class BundledSageAttention:
    """Last in `sys.meta_path`, so that an installed package wins. It knows this one name, and puts no folder on `sys.path`."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "sageattention":
            return None
        return importlib.util.spec_from_file_location(name, os.path.join(BUNDLED, "__init__.py"), submodule_search_locations=[BUNDLED])


def warn_of_a_broken_one():
    """Repeat what install.py found out about the installed package, unless that has changed since."""
    folder_paths = sys.modules.get("folder_paths")  # ComfyUI's, imported by now
    if folder_paths is None:
        return
    try:
        with open(os.path.join(folder_paths.get_user_directory(), "__sageattention", "install.json"), encoding="utf-8") as file:
            found = json.load(file)
        installed = found["installed"]
        known = installed and not installed["healthy"] and found["python"] == sys.executable
        if not known or os.stat(installed["path"]).st_mtime_ns != installed["stamp"]:
            return
    except (OSError, ValueError, KeyError, TypeError):  # install.py has not run here, or what it found is gone
        return
    logging.warning(
        'sageattention in %s is broken, so --use-sage-attention and packs that import it fail: %s. "%s" "%s" --replace puts '
        "the one that works in its place.",
        installed["path"], installed["cause"], sys.executable, os.path.join(PACK, "install.py"),
    )  # fmt: skip


sys.meta_path.append(BundledSageAttention)
warn_of_a_broken_one()
