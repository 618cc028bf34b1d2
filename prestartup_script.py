"""Runs before ComfyUI imports anything: makes `import sageattention` work whatever is installed.

ComfyUI imports `sageattention` at every start, flag or not, and forgives an ImportError at most. The finder below goes first: an
installed copy that can be imported is imported as if the finder were not there; where none is installed, or importing it raises,
the package that lies beside this file runs. Stdlib only and well below a millisecond; it never turns the flag on.
"""

import importlib
import importlib.util
import json
import logging
import os
import re
import sys

NAME = "sageattention"
PACK = os.path.dirname(os.path.abspath(__file__))
BUNDLED = os.path.join(PACK, NAME)


def same(one, other):
    """Whether two paths are the same folder, also through links and in another spelling."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


class OrBundled:
    """The loader of an installed copy; where executing that raises, the bundled package is imported in its place."""

    def __init__(self, loader, finder):
        self.loader, self.finder = loader, finder

    def __getattr__(self, name):
        if name in ("loader", "finder"):  # a copy that is still empty
            raise AttributeError(name)
        return getattr(self.loader, name)

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        spec = module.__spec__
        spec.loader = module.__loader__ = self.loader
        try:
            self.loader.exec_module(module)
            getattr(sys.modules.get(NAME, module), "sageattn")  # noqa: B009 - raises where something else has this name
        except (Exception, SystemExit) as error:
            self.finder.replace(spec, f"{type(error).__name__}: {error}")


class SageAttentionFinder:
    """First in `sys.meta_path`. It knows this one name, and puts no folder on `sys.path`."""

    is_bundled_sageattention = True  # so that the finders of two copies of this pack don't ask each other

    def __init__(self):
        self.replaced = False  # an installed copy could not be imported

    def find_spec(self, name, path=None, target=None):
        if name != NAME:
            return None
        installed = None if self.replaced else self.installed()
        if installed is None:
            file = os.path.join(BUNDLED, "__init__.py")
            whole = os.path.isfile(file)  # else ComfyUI had to live with an OSError from within the import
            return importlib.util.spec_from_file_location(name, file, submodule_search_locations=[BUNDLED]) if whole else None
        if hasattr(installed.loader, "exec_module"):
            installed.loader = OrBundled(installed.loader, self)
            cause = known_as_fatal(installed.origin)
            if cause:
                self.log(installed, cause)
                self.replaced = True
                return self.find_spec(name)
        return installed

    def installed(self):
        """The spec of the copy that Python would import without this pack; None where there is none."""
        for finder in sys.meta_path:
            if hasattr(finder, "is_bundled_sageattention") or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(NAME, None)
            if spec and spec.origin and same(os.path.dirname(spec.origin), PACK):  # a pack folder of that name, custom_nodes on sys.path
                spec = finder.find_spec(NAME, [entry for entry in sys.path if not same(os.path.join(entry, NAME), PACK)])
            if spec and spec.origin and spec.loader:  # not an empty folder of that name
                return None if same(os.path.dirname(spec.origin), BUNDLED) else spec
        return None

    def replace(self, spec, cause):
        """Import the bundled package where the import of `spec` has failed."""
        for name in [name for name in sys.modules if name == NAME or name.startswith(NAME + ".")]:
            del sys.modules[name]
        self.log(spec, cause)
        self.replaced = True
        try:
            importlib.import_module(NAME)
        except Exception as error:
            raise ImportError(f"{NAME} can't be imported, neither from {spec.origin} nor from {BUNDLED}: {error}", name=NAME) from error

    @staticmethod
    def log(spec, cause):
        logging.warning(
            'sageattention: the copy in %s can\'t be imported (%.300s); the one of this node pack runs in its place. "%s" "%s" --replace '
            "installs it there.",
            os.path.dirname(spec.origin), " ".join(cause.split()), sys.executable, os.path.join(PACK, "install.py"),
        )  # fmt: skip

    def find_distributions(self, context=None):
        """Metadata of the bundled package, for programs that ask for its version, where it is the one that runs."""
        if getattr(context, "name", None) not in (None, NAME) or "path" in vars(context or self):
            return []
        loaded = sys.modules.get(NAME)
        runs = same(os.path.dirname(loaded.__file__), BUNDLED) if loaded else self.replaced or self.installed() is None
        return [bundled_distribution()] if runs else []


def bundled_distribution():
    """An importlib.metadata.Distribution of the bundled package: name and version, no files."""
    import importlib.metadata  # heavy, and whoever asks for a distribution has it already

    class Bundled(importlib.metadata.Distribution):
        def read_text(self, filename):
            if filename not in ("METADATA", "PKG-INFO"):
                return None
            with open(os.path.join(PACK, "pyproject.toml"), encoding="utf-8") as file:
                version = re.search(r'^version = "([^"]+)"', file.read(), re.MULTILINE)[1]
            return f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {version}\n"

        def locate_file(self, path):
            return os.path.join(PACK, path)

    return Bundled()


def known_as_fatal(origin):
    """What install.py found out about a copy whose import ends or hangs the process, which no `except` sees; "" for every other one."""
    folder_paths = sys.modules.get("folder_paths")  # ComfyUI's, imported by now
    if folder_paths is None:
        return ""
    try:
        with open(os.path.join(folder_paths.get_user_directory(), "__sageattention", "install.json"), encoding="utf-8") as file:
            found = json.load(file)
        installed = found["installed"]
        if not installed or not installed["fatal"] or found["python"] != sys.executable:
            return ""
        if not same(installed["path"], os.path.dirname(origin)) or os.stat(installed["path"]).st_mtime_ns != installed["stamp"]:
            return ""
        import importlib.metadata

        return installed["cause"] if importlib.metadata.version("torch") == found["torch"] else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):  # install.py has not run here, or all has changed since
        return ""


class SpargeFinder:
    """Last in `sys.meta_path`: `import spas_sage_attn` finds this package's functions of SpargeAttn's names where nothing else has it."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "spas_sage_attn":
            return None
        return importlib.import_module(NAME + ".sparge").Finder().find_spec(name)


sys.meta_path.insert(0, SageAttentionFinder())
if os.environ.get("SAGEATTENTION_SPARGE") == "1":
    sys.meta_path.append(SpargeFinder())
