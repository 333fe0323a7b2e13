"""Proof that both sides know the cluster's secret, without saying it. Pure: time is an argument.

    client                                   server
      | GET /peer                              |
      |--------------------------------------->|
      |<-- 401, WWW-Authenticate: Baton challenge
      | GET /peer, Authorization: Baton challenge, nonce, HMAC(secret, "client", challenge, nonce, request)
      |--------------------------------------->|  the challenge is our own, young, and not used yet
      |<-- 101, Authentication-Info: Baton HMAC(secret, "server", challenge, nonce, request)
      | the answer is of somebody who knows the secret, too

A challenge holds the time at which it ends and is signed by a key that its process keeps to itself: nothing has to be
remembered of those who never answer, no clocks of different hosts are compared, and what was heard on the wire is of no
use at another process, or a second time. The exchange proves who is there at its beginning; to keep a connection from
being taken over afterwards, and from being read, is TLS's part.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from cluster.errors import Unauthorized

SCHEME = "Baton"
CHALLENGE_SECONDS = 10.0
"""How long the other side may take to answer."""

_RANDOM_BYTES = 16
_AUTHORIZATION = re.compile(
    r"Baton challenge=([A-Za-z0-9_-]{1,200}), nonce=([A-Za-z0-9_-]{1,64}), proof=([A-Za-z0-9_-]{1,64})"
)
_CHALLENGE = re.compile(r"Baton challenge=([A-Za-z0-9_-]{1,200})")
_ANSWER = re.compile(r"Baton proof=([A-Za-z0-9_-]{1,64})")


class Subject(NamedTuple):
    """The request that a proof is good for, and for no other."""

    method: str
    path: str
    body: bytes = b""


class Refusal(Unauthorized):
    """`reason` is one of few, for a metric."""

    def __init__(self, reason: str) -> None:
        super().__init__("the proof of the cluster's secret is missing or wrong")
        self.reason = reason


class Proof(NamedTuple):
    """What a client sends, and what it expects of a server that knows the secret."""

    authorization: str
    answer: str


class Examiner:
    """The server's side, one for each process. Remembers used challenges until they end, and nothing else: as only who
    knows the secret can use one up, nobody else can make it grow."""

    def __init__(self, own_key: bytes | None = None) -> None:
        """`own_key` is for tests."""
        self._own_key = own_key or secrets.token_bytes(32)
        self._used: set[str] = set()
        self._ends: deque[tuple[float, str]] = deque()

    def challenge(self, now: float) -> str:
        """The value of a WWW-Authenticate header."""
        content = f"{int((now + CHALLENGE_SECONDS) * 1000):x}-{secrets.token_hex(_RANDOM_BYTES)}"
        return f"{SCHEME} challenge={content}-{self._sign(content)}"

    def examine(self, authorization: str | None, subject: Subject, keys: Sequence[bytes], now: float) -> str:
        """The value of an Authentication-Info header. Raises `Refusal`."""
        if authorization is None:
            raise Refusal("no_proof")
        found = _AUTHORIZATION.fullmatch(authorization)
        if found is None:
            raise Refusal("malformed")
        challenge, nonce, proof = found.groups()
        end = self._end_of(challenge)
        key = _matching(keys, proof, challenge, nonce, subject)
        if key is None:
            raise Refusal("wrong_secret")
        if now > end:
            raise Refusal("expired")
        self._use(challenge, end, now)
        return f"{SCHEME} proof={_sum(key, 'server', challenge, nonce, subject)}"

    def _end_of(self, challenge: str) -> float:
        """Raises `Refusal` for a challenge that is not ours."""
        content, _, signature = challenge.rpartition("-")
        if not hmac.compare_digest(signature, self._sign(content)):
            raise Refusal("foreign_challenge")
        return int(content.partition("-")[0], 16) / 1000

    def _use(self, challenge: str, end: float, now: float) -> None:
        while self._ends and self._ends[0][0] < now:
            self._used.discard(self._ends.popleft()[1])
        if challenge in self._used:
            raise Refusal("replayed")
        self._used.add(challenge)
        self._ends.append((end, challenge))

    def _sign(self, content: str) -> str:
        return hmac.new(self._own_key, content.encode(), hashlib.sha256).hexdigest()[:32]


def prove(challenge_header: str, subject: Subject, key: bytes) -> Proof | None:
    """The client's side; None if the header is no challenge of ours."""
    found = _CHALLENGE.fullmatch(challenge_header)
    if found is None:
        return None
    challenge, nonce = found[1], secrets.token_hex(_RANDOM_BYTES)
    proof = _sum(key, "client", challenge, nonce, subject)
    return Proof(
        f"{SCHEME} challenge={challenge}, nonce={nonce}, proof={proof}",
        _sum(key, "server", challenge, nonce, subject),
    )


def is_answer(header: str, proof: Proof) -> bool:
    """Whether an Authentication-Info header is of a server that knows the secret."""
    found = _ANSWER.fullmatch(header)
    return found is not None and hmac.compare_digest(found[1], proof.answer)


def _matching(keys: Sequence[bytes], proof: str, challenge: str, nonce: str, subject: Subject) -> bytes | None:
    match = None
    for key in keys:
        if hmac.compare_digest(proof, _sum(key, "client", challenge, nonce, subject)):
            match = key
    return match


def _sum(key: bytes, side: str, challenge: str, nonce: str, subject: Subject) -> str:
    """43 characters. Every part is of a form that has no line break, so that no two requests read alike."""
    body = hashlib.sha256(subject.body).hexdigest()
    content = "\n".join([side, challenge, nonce, subject.method, subject.path.encode().hex(), body])
    digest = hmac.new(key, content.encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
