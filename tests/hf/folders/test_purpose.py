"""Two purposes that differ are told apart by the first entry in which they do."""

import pytest

from tnmoe.hf.folders.purpose import difference, purpose_line

CONTENT = {"settings": {"seed": 0, "to": "moe"}, "files": [["a", 1]], "shard_bytes": 5}


def test_a_purpose_is_one_line_and_does_not_depend_on_the_order_of_entries():
    line = purpose_line({"name": "two\nlines", **CONTENT})
    assert "\n" not in line
    assert line == purpose_line({**dict(reversed(CONTENT.items())), "name": "two\nlines"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, ""),
        ({"shard_bytes": 6}, "shard_bytes is 5 there and 6 here"),
        ({"settings": {"seed": 1, "to": "dense"}}, "settings.seed is 0 there and 1 here"),
        ({"settings": {"seed": 0}}, "settings.to is 'moe' there and None here"),
        ({"files": [["a", 2]]}, "files differs"),
        ({"settings": None}, "settings differs"),
    ],
)
def test_the_first_difference_is_named_with_both_values(change, told):
    assert difference(purpose_line(CONTENT), purpose_line(CONTENT | change)) == told


@pytest.mark.parametrize("line", ["", "0f3a", "[1]", "7", "[" * 100_000])
def test_a_line_of_another_kind_is_only_another(line):
    assert difference(line, purpose_line(CONTENT)) == ""
