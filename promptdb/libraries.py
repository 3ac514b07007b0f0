"""What is a library, known by its name and version, and what is the user's own, of which that says nothing."""

from __future__ import annotations

import dis
import importlib.metadata
import importlib.util
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from promptdb.code_identity import LIBRARIES
from promptdb.errors import IdentityError

_SITES = ("site-packages", "dist-packages")


def check_library(where: str, module: str) -> None:
    """Raise IdentityError for a module of the user's own: what it holds may change under its name."""
    if not is_library(module):
        raise IdentityError(
            f"{where} is the module {module}, which cannot be identified",
            "import its functions by name, so that they are identified",
        )


def library_version(module: str) -> str:
    """Return the versions of what is installed as a module's top-level one."""
    return _distribution_versions(module.split(".")[0])


def imported(where: str, code: types.CodeType) -> set[str]:
    """Return the modules that a function imports when it runs.

    Raises
    ------
    IdentityError
        A relative import: of what, depends on where the function's module stands.
    """
    found = set()
    before: list[dis.Instruction] = []
    for each in instructions(code):
        if each.opname == "IMPORT_NAME":
            if before[-2].argval != 0:
                raise IdentityError(f"{where} imports {each.argval} relatively", "import it at the top")
            found.add(each.argval)
        before.append(each)
    return found


def instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Yield what a function and those inside of it do, each in order."""
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from instructions(constant)


def is_library(module: str) -> bool:
    """Whether a module is one of Python's or was installed; one of the user's own may have the name of such."""
    top = module.split(".")[0]
    path = _file_of(module) or _file_of(top)
    return top in LIBRARIES or (is_library_file(path) if path else top in sys.stdlib_module_names)


@cache
def is_library_file(path: str) -> bool:
    """Whether a file is one of Python's or was installed: known by name and version."""
    if path.startswith("<frozen "):
        return True
    parts = Path(path).parts
    if any(site in parts for site in _SITES):
        return True
    own = Path(__file__).parent
    return Path(path).is_relative_to(sysconfig.get_path("stdlib")) or Path(path).is_relative_to(own)


@cache
def _file_of(module: str) -> str:
    """Return the file of a module, or nothing where it has none."""
    loaded = sys.modules.get(module)
    path = getattr(loaded, "__file__", None)
    if path is None:
        try:
            spec = importlib.util.find_spec(module) if loaded is None else None
        except (ImportError, ValueError):
            spec = None
        path = None if spec is None else spec.origin
    return path or ""


def version_of_file(path: str) -> str:
    """Return the version of the library that a file is part of."""
    parts = Path(path).parts
    for site in _SITES:
        if site in parts:
            return _distribution_versions(parts[parts.index(site) + 1].removesuffix(".py"))
    return ""


@cache
def _distribution_versions(top: str) -> str:
    """Return the versions of what is installed as a top-level module."""
    found = _distributions().get(top, [])
    if not found:
        return str(getattr(sys.modules.get(top), "__version__", ""))
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(found)))


@cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()
