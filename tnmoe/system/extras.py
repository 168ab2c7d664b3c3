"""Optional dependencies: which extra brings them, and a check before they are imported."""

from __future__ import annotations

import re
from importlib.util import find_spec

from tnmoe.errors import MissingExtraError

# Packages that each extra brings, and their oldest supported versions, as in pyproject.toml.
_HF = {"torch": "2.6", "transformers": "5.0"}
_PLOT = {"matplotlib": "3.8"}
EXTRAS: dict[str, dict[str, str]] = {
    "torch": {"torch": "2.6"},
    "jax": {"jax": "0.8"},
    "hf": _HF,
    "plot": _PLOT,
    "peft": _HF | {"peft": "0.21"},
    "demo": _HF | _PLOT,
}
# How to install what no extra can bring. A wheel of CuPy fits one version of CUDA only.
_BY_HAND = {
    "cupy": "pip install cupy-cuda13x, cupy-cuda12x or another package that fits your CUDA "
    "(https://docs.cupy.dev/en/stable/install.html)"
}


def require_extra(feature: str, extra: str, *packages: str) -> None:
    """Raise a MissingExtraError if packages that a feature needs are missing or too old.

    The message names all of them and the extra that brings them. Nothing is imported: a package
    that is installed but broken fails later, with its own error.

    Parameters
    ----------
    feature : str
        What needs the packages, for the message.
    extra : str
        The extra that brings them, or a package that users install themselves.
    packages : str
        The packages, for an extra that is not in ``EXTRAS``.
    """
    oldest = EXTRAS.get(extra, dict.fromkeys(packages, "0"))
    missing = [package for package in oldest if not _is_installed(package)]
    old = {
        f"{package}>={least}": found
        for package, least in oldest.items()
        if package not in missing and (found := _older(package, least))
    }
    if missing or old:
        raise MissingExtraError(feature, extra, missing, old, _BY_HAND.get(extra))


def has_extra(extra: str) -> bool:
    """Return whether all packages of an extra are installed, and new enough."""
    return all(
        _is_installed(package) and not _older(package, least)
        for package, least in EXTRAS[extra].items()
    )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # hidden by a finder, or by None in sys.modules
        return False


def _older(package: str, least: str) -> str | None:
    """Return the version of a package if it is older than ``least``, else None."""
    from importlib.metadata import PackageNotFoundError, version  # slow, and rarely needed

    try:
        found = version(package)
    except PackageNotFoundError:  # a source tree, say
        return None
    return found if _numbers(found) < _numbers(least) else None


def _numbers(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))
