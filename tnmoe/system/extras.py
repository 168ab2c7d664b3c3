"""What the package's extras bring, and whether it is here before anything of it is imported."""

from __future__ import annotations

import re
from importlib.util import find_spec

from tnmoe.errors import MissingExtraError

# What an extra's features import, and the oldest versions that do; as in pyproject.toml.
_HF = {"torch": "2.4", "transformers": "5.0"}
_PLOT = {"matplotlib": "3.8"}
EXTRAS: dict[str, dict[str, str]] = {
    "torch": {"torch": "2.4"},
    "hf": _HF,
    "plot": _PLOT,
    "demo": _HF | _PLOT,
}


def require_extra(feature: str, extra: str, *packages: str) -> None:
    """Raise a MissingExtraError that names all that a feature lacks, and the one extra with it.

    Nothing is imported, so what is installed but broken fails later with an error of its own.

    Parameters
    ----------
    feature : str
        What needs them.
    extra : str
        Brings all of them.
    packages : str
        What is needed of an extra that is not in ``EXTRAS``.
    """
    oldest = EXTRAS.get(extra, dict.fromkeys(packages, "0"))
    missing = [package for package in oldest if not _is_installed(package)]
    old = {
        f"{package}>={least}": found
        for package, least in oldest.items()
        if package not in missing and (found := _older(package, least))
    }
    if missing or old:
        raise MissingExtraError(feature, extra, missing, old)


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # hidden by a finder, or by None in sys.modules
        return False


def _older(package: str, least: str) -> str | None:
    """The version of a package, if it is older than ``least``."""
    from importlib.metadata import PackageNotFoundError, version  # slow, and rarely needed

    try:
        found = version(package)
    except PackageNotFoundError:  # a source tree, say
        return None
    return found if _numbers(found) < _numbers(least) else None


def _numbers(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))
