"""The exchange itself, against whoever tries to bend it."""

import pytest

from cluster.access.proof import CHALLENGE_SECONDS, Examiner, Refusal, Subject, is_answer, prove

KEY = b"correct horse battery staple"
SUBJECT = Subject("GET", "/peer")


def exchange(examiner: Examiner, now: float = 0.0, key: bytes = KEY, subject: Subject = SUBJECT):
    proof = prove(examiner.challenge(now), subject, key)
    assert proof is not None
    return proof


def refusal(examiner: Examiner, authorization: str | None, subject: Subject = SUBJECT, now: float = 0.0) -> str:
    with pytest.raises(Refusal) as caught:
        examiner.examine(authorization, subject, [KEY], now)
    assert KEY.decode() not in caught.value.message
    return caught.value.reason


def test_a_right_proof_is_answered_by_one():
    examiner = Examiner()
    proof = exchange(examiner)
    answer = examiner.examine(proof.authorization, SUBJECT, [b"an older one, still accepted", KEY], 1.0)
    assert is_answer(answer, proof)
    assert not is_answer(answer, exchange(examiner)), "an answer belongs to one question"
    assert KEY.decode() not in proof.authorization + answer


def test_it_is_good_once_for_a_while_here_and_for_one_request():
    examiner = Examiner()
    proof = exchange(examiner).authorization
    for other in (Subject("POST", "/peer"), Subject("GET", "/router"), Subject("GET", "/peer", b"x")):
        assert refusal(examiner, proof, other) == "wrong_secret"
    assert refusal(Examiner(), proof) == "foreign_challenge"
    assert refusal(examiner, proof, now=CHALLENGE_SECONDS + 0.1) == "expired"
    examiner.examine(proof, SUBJECT, [KEY], 1.0)
    assert refusal(examiner, proof, now=2.0) == "replayed"


@pytest.mark.parametrize(
    "forged",
    [
        "",
        "Basic abc",
        "Baton",
        "Baton challenge=, nonce=, proof=",
        "Baton " + "a" * 9999,
        "Baton challenge=é, nonce=a, proof=b",
    ],
)
def test_what_is_no_proof_is_refused_by_its_form(forged):
    assert refusal(Examiner(), forged) == "malformed"


def test_nothing_is_kept_of_those_who_only_ask_and_of_others_only_while_it_matters():
    examiner = Examiner()
    for number in range(100):
        examiner.challenge(number)
        examiner.examine(exchange(examiner, number).authorization, SUBJECT, [KEY], number)
    assert len(examiner._used) == len(examiner._ends) <= CHALLENGE_SECONDS + 2


def test_another_servers_words_are_no_challenge():
    for header in ("", "Bearer", "Baton challenge=", 'Digest realm="x"'):
        assert prove(header, SUBJECT, KEY) is None
