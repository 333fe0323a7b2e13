"""What a client may say about the place in its stream where it wants to go on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidRequest
from router.api.cursor import Cursor


@given(st.lists(st.tuples(st.integers(0, 99), st.booleans()) | st.none(), min_size=1, max_size=9))
def test_what_was_told_is_read_back(marks):
    cursor = Cursor(len(marks))
    for choice, mark in enumerate(marks):
        if mark is not None:
            cursor.tell(choice, mark[0], finished=mark[1])
    cursor.usage_told = all(mark is not None and mark[1] for mark in marks)
    again = Cursor.parse(str(cursor), [99] * len(marks))
    assert (again.marks, again.usage_told) == (cursor.marks, cursor.usage_told)


def test_the_forms_are_those_of_the_documentation():
    cursor = Cursor(1)
    cursor.tell(0, 12, finished=False)
    assert str(cursor) == "12"
    cursor = Cursor(3)
    cursor.tell(0, 12, finished=False)
    cursor.tell(1, 0, finished=False)
    assert str(cursor) == "12.0.-"


@pytest.mark.parametrize(
    ("text", "choices", "problem"),
    [
        ("", 1, "expected the id of the last event"),
        ("abc", 1, "such as 12 or 12f; found 'abc'"),
        ("-1", 1, "found '-1'"),
        ("1.5", 1, "with 1 marks for as many choices; found 2"),
        ("1", 2, "with 2 marks for as many choices; found 1"),
        ("9", 1, "it names token 9 of a choice that has 8 at most"),
        ("4+", 1, "comes after the last choice's finish reason"),
        ("4f.-+", 2, "comes after the last choice's finish reason"),
        ("٣", 1, "found"),
        ("1" * 99, 1, "found"),
    ],
)
def test_anything_else_is_refused_and_says_what_is_expected(text, choices, problem):
    with pytest.raises(InvalidRequest, match="Last-Event-ID") as refused:
        Cursor.parse(text, [8] * choices)
    assert problem in refused.value.message and refused.value.param == "Last-Event-ID"
