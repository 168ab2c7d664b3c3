"""What users rely on changes only on purpose."""

import dataclasses
import functools
import importlib
import inspect
import re
import sys
import typing

import pytest

from tests.public_api import FROZEN, MODULES, public_api


def test_public_names_and_parameters_are_the_frozen_ones():
    """After a change on purpose: ``python -m tests.public_api > tests/public_api.txt``."""
    assert public_api().splitlines() == FROZEN.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("module", MODULES)
def test_dir_shows_the_public_names_and_no_others(module):
    code = importlib.import_module(module)
    assert {name for name in dir(code) if not name.startswith("__")} == set(code.__all__)


def documented_choices():
    """Parameters of public functions whose documentation says {"one", "of", "these"}."""
    for line in public_api().splitlines():
        path = line.split("(")[0].split(".")
        code = next(m for m in map(".".join, (path[:2], path[:1])) if m in MODULES)
        public = functools.reduce(getattr, path[code.count(".") + 1 :], sys.modules[code])
        for name, words in re.findall(
            r"^ *(\w+)(?:, \w+)* : \{(\"[^}]*)\}", inspect.getdoc(public) or "", re.M
        ):
            yield line.split("(")[0], public, name, set(re.findall(r"\w+", words))


@pytest.mark.parametrize(
    ("path", "public", "name", "words"),
    [pytest.param(*each, id=f"{each[0]}-{each[2]}") for each in documented_choices()],
)
def test_an_option_is_typed_as_the_words_that_its_documentation_names(path, public, name, words):
    function = public.__init__ if inspect.isclass(public) else public
    # The parameters of a dataclass are its fields, whose types its bases may have defined.
    hints = typing.get_type_hints(public if dataclasses.is_dataclass(public) else function)
    if name not in hints and inspect.isclass(public):
        hints = typing.get_type_hints(public)
    assert words <= set(flat_arguments(hints[name]))


def flat_arguments(hint):
    """The words of all Literals in a type."""
    for each in typing.get_args(hint):
        if isinstance(each, str):
            yield each
        else:
            yield from flat_arguments(each)
