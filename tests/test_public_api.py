"""What users rely on changes only on purpose, and what goes is announced."""

import functools
import importlib
import inspect
import re
import sys
import typing
import warnings

import pytest

from tests.public_api import FROZEN, MODULES, public_api
from tnmoe.deprecation import deprecated, renamed_parameter


def test_public_names_and_parameters_are_the_frozen_ones():
    """After a change on purpose: ``python -m tests.public_api > tests/public_api.txt``.

    What went or changed its name must go on working for a while: ``tnmoe.deprecation``.
    """
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
    hints = typing.get_type_hints(function)
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


@deprecated("0.2", use="tnmoe.new")
def old(a, b=1):
    """Sum of two."""
    return a + b


@renamed_parameter("rank", "max_bond", since="0.2")
def cut(size, max_bond=None):
    """Two sizes."""
    return size, max_bond


class Holder:
    @deprecated("0.2", use="Holder.new")
    def old(self, a):
        return a


def test_a_deprecated_function_works_and_says_what_to_use():
    with pytest.warns(DeprecationWarning, match=r"^old is deprecated since 0\.2: use tnmoe\.new$"):
        assert old(2, b=3) == 5
    assert old.__doc__ == "Deprecated since 0.2: use tnmoe.new.\n\nSum of two."
    assert old.__name__ == "old"


def test_a_deprecated_method_without_a_docstring_is_named_with_its_class():
    with pytest.warns(DeprecationWarning, match=r"^Holder\.old is deprecated"):
        assert Holder().old(7) == 7
    assert Holder.old.__doc__ == "Deprecated since 0.2: use Holder.new."


def test_a_parameter_is_taken_by_its_former_name():
    message = r"^cut: parameter 'rank' is deprecated since 0\.2: use 'max_bond'$"
    with pytest.warns(DeprecationWarning, match=message):
        assert cut(5, rank=3) == (5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cut(5, max_bond=3) == cut(5, 3) == (5, 3)
        assert cut(5) == (5, None)


def test_both_names_of_a_parameter_are_refused():
    with pytest.raises(TypeError, match="cut: got both 'rank' and 'max_bond'"):
        cut(5, rank=3, max_bond=4)
    with (
        pytest.raises(TypeError, match="multiple values for argument 'max_bond'"),
        pytest.warns(DeprecationWarning, match="rank"),
    ):
        cut(5, 4, rank=3)


@pytest.mark.parametrize("call", [lambda: old(1), lambda: cut(5, rank=3)])
def test_a_warning_points_at_the_caller(call):
    with pytest.warns(DeprecationWarning, match="deprecated since") as caught:
        call()
    assert caught[0].filename == __file__
    assert caught[0].lineno == call.__code__.co_firstlineno
