"""What install.py last reported: it leaves a result in ComfyUI's user directory, and the node's description shows it."""

from __future__ import annotations

import json
import os
import sys


def report() -> str:
    """The last result in plain words; says so where install.py has not run here, or ran in another Python."""
    folder_paths = sys.modules.get("folder_paths")  # ComfyUI's
    if folder_paths is None:
        return ""
    path = os.path.join(folder_paths.get_user_directory(), "__sageattention", "install.json")
    try:
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
        python, message = str(result["python"]), str(result["message"])
    except FileNotFoundError:
        return "install.py has not run in this ComfyUI; the node works without it."
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"install.py's result, {path}, can't be read: {error}"
    elsewhere = "" if python == sys.executable else f"It ran in another Python, {python}; this is {sys.executable}.\n"
    return f"install.py, {result.get('time', 'some time ago')}:\n{elsewhere}{message}"
