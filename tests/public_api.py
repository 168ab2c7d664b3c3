"""The list of public names and their parameters: ``python -m tests.public_api`` prints it."""

import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

MODULES = (
    "tnmoe", "tnmoe.backends", "tnmoe.hf", "tnmoe.interop", "tnmoe.nn", "tnmoe.nn.parallel",
    "tnmoe.plot",
)  # fmt: skip
FROZEN = Path(__file__).with_name("public_api.txt")


def public_api() -> str:
    """All that users may rely on: names, members, parameters with their kinds and defaults."""
    return "".join(f"{line}\n" for module in MODULES for line in _lines(module))


def _lines(module: str) -> Iterator[str]:
    code = importlib.import_module(module)
    for name in sorted(code.__all__):
        public = getattr(code, name)
        full = f"{module}.{name}"
        if not callable(public) or public.__module__.split(".")[0] != "tnmoe":
            yield full
            continue
        yield full + _parameters(public)
        if inspect.isclass(public):
            yield from _members(full, public)


def _members(full: str, public: type) -> Iterator[str]:
    for name in sorted(dir(public)):
        owner = next(base for base in public.__mro__ if name in vars(base))
        if name.startswith("_") or owner.__module__.split(".")[0] != "tnmoe":
            continue
        member = inspect.getattr_static(public, name)
        function = getattr(member, "__func__", member)
        parameters = _parameters(function) if inspect.isfunction(function) else ""
        yield f"{full}.{name}{parameters}"


def _parameters(function: Callable) -> str:
    try:
        signature = inspect.signature(function)
    except ValueError:  # an exception takes the arguments of its base
        return ""
    empty = inspect.Parameter.empty
    plain = [each.replace(annotation=empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


if __name__ == "__main__":
    print(public_api(), end="")
