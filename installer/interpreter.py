"""The Python that runs this: its wheel tags, its command line, its package installer, and children of it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from . import PACK, PACKAGE, Problem


def supported_tags() -> list[str]:
    """Wheel tags that this interpreter takes, best first."""
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    abi = python + ("t" if sysconfig.get_config_var("Py_GIL_DISABLED") else "")
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    platforms = [platform]
    if platform.startswith("linux_"):
        try:
            name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        except (AttributeError, ValueError, OSError):  # not glibc: no manylinux
            name, version = "", ""
        newest = int(version.split(".")[1]) if name == "glibc" else 0
        platforms = [f"manylinux_2_{minor}_{platform[6:]}" for minor in range(newest, 16, -1)]
    compiled = sys.implementation.name == "cpython" and sys.maxsize > 2**32
    return [f"{python}-{abi}-{p}" for p in platforms if compiled] + ["py3-none-any"]


def python_command() -> list[str]:
    """This interpreter; without the user's site-packages where it was started so, and always for the embedded one of Windows."""
    embedded = "python_embeded" in sys.executable or any(Path(sys.executable).parent.glob("python*._pth"))
    return [sys.executable, *(["-s"] if embedded or sys.flags.no_user_site else [])]


def package_installer() -> list[str]:
    """`pip install` of this interpreter, else uv's."""
    if importlib.util.find_spec("pip"):
        return [*python_command(), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    uv = shutil.which("uv")
    for command in ([*python_command(), "-m", "uv"] if importlib.util.find_spec("uv") else None, [uv] if uv else None):
        if command:
            return [*command, "pip", "install", "--python", sys.executable]
    raise Problem(f"{sys.executable} has neither pip nor uv: run its `-m ensurepip`, then this file again.")


def leads_into_pack(entry: Path) -> bool:
    """Whether that entry of `sys.path` would let Python import the pack, or the package in it, as `sageattention`.

    However it is spelled: through a link, `sys.path` has the link's target. The pack's own name is `sageattention` where it comes
    from the registry, so that `custom_nodes` is such an entry, too.
    """
    return same(entry, PACK) or same(entry / PACKAGE, PACK)


def same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def run(command: list[str], timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """A child with an empty working folder, so that Python finds there neither this pack nor anything else."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    if "PYTHONPATH" in environment:
        entries = environment["PYTHONPATH"].split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(entry for entry in entries if not leads_into_pack(Path(entry)))
    with tempfile.TemporaryDirectory() as empty:
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout)


class Import:
    """What importing a module in a child came to. Attributes: file (None where it failed), cause, fatal (no `except` helps: it hangs or
    ends Python)."""

    def __init__(self, module: str, attribute: str):
        self.file: str | None = None
        self.cause, self.fatal = "", False
        # The file's name in ASCII: it may hold what no encoding of this machine can print.
        code = f"import json, {module} as m; m.{attribute}; print('\\n@' + json.dumps(m.__file__))"
        try:
            child = run([*python_command(), "-c", code], timeout=180)
        except subprocess.TimeoutExpired:
            self.cause, self.fatal = "the import does not return", True
            return
        file = next((line[1:] for line in child.stdout.splitlines() if line.startswith("@")), None)  # the import may print, too
        if child.returncode == 0 and file:
            self.file = json.loads(file)
        elif child.returncode == 1 and child.stderr.strip():
            self.cause = child.stderr.strip().splitlines()[-1]
        else:
            self.cause, self.fatal = f"the import ends Python with code {child.returncode}", True
