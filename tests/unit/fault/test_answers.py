"""The judge of fault campaigns: what it lets pass would never be found."""

from copy import deepcopy

import pytest

from tests.fault.answers import Answer, ChoiceAnswer, Verdict, judge

EXPECTED = Answer([ChoiceAnswer("abcd", [1, 2, 2, 3], [-0.1, -0.2, -0.3, -0.4], "length")], (7, 4))


def test_the_right_answer_passes():
    assert judge(deepcopy(EXPECTED), EXPECTED) is None


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"tokens": [1, 2, 3]}, Verdict.LOST),
        ({"tokens": []}, Verdict.LOST),
        ({"tokens": [1, 1, 2, 2, 3]}, Verdict.DUPLICATED),
        ({"tokens": [1, 2, 2, 3, 2, 2, 3]}, Verdict.DUPLICATED),
        ({"tokens": [2, 1, 2, 3]}, Verdict.DIFFERENT),
        ({"text": "abc"}, Verdict.DIFFERENT),
        ({"finish": "stop"}, Verdict.DIFFERENT),
        ({"logprobs": [-0.1, -0.2, -0.3]}, Verdict.DIFFERENT),
        ({"logprobs": [-0.1, -0.2, -0.3, -0.5]}, Verdict.DIFFERENT),
    ],
)
def test_what_is_wrong_with_a_choice_is_found(changes, verdict):
    got = deepcopy(EXPECTED)
    vars(got.choices[0]).update(changes)
    found = judge(got, EXPECTED)
    assert found is not None and found[0] is verdict
    assert "choice 0" in found[1]


def test_usage_counts():
    got = deepcopy(EXPECTED)
    got.usage = (7, 5)
    assert judge(got, EXPECTED) == (Verdict.DIFFERENT, "usage is (7, 5) instead of (7, 4)")


def test_an_answer_is_put_together_from_chunks_of_either_endpoint():
    answer = Answer([ChoiceAnswer(), ChoiceAnswer()])
    old = {"token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0, "b": -0.5}]}
    new = {"content": [{"logprob": -2.0, "top_logprobs": [{"logprob": -1.5}]}]}
    chunks = [
        {"choices": [{"index": 0, "text": "a", "finish_reason": None, "token_ids": [5], "logprobs": old}]},
        {"choices": [{"index": 1, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        {
            "choices": [
                {"index": 1, "delta": {"content": "b"}, "finish_reason": "stop", "token_ids": [6, 7], "logprobs": new}
            ]
        },
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 3}},
    ]
    assert [answer.add(chunk) for chunk in chunks] == [[(0, 1)], [], [(1, 2)], []]
    first, second = answer.choices
    assert (first.text, first.tokens, first.logprobs, first.finish) == ("a", [5], [-1.0, -0.5, -1.0], None)
    assert (second.text, second.tokens, second.logprobs, second.finish) == ("b", [6, 7], [-2.0, -1.5], "stop")
    assert answer.usage == (3, 3)
