"""Frames that no process of ours would send: messages with wild values, and bytes that were messages. By a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from msgspec import inspect

from cluster.messages import Message

WILD_INTEGERS = (
    0,
    1,
    -1,
    2,
    15,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -(2**63),
)
WILD_FLOATS = (0.0, 1.0, -1.0, 0.5, 1e-308, 1e308, float("inf"), float("-inf"), float("nan"))
WILD_TEXTS = ("", "x", "decode-9", "http://127.0.0.1:1", "é\u0000\n", "../../etc/passwd", "%s%n", "a" * 300)


class FrameMaker:
    """`known` gives values for fields by name: so that frames come past the first check, and meet the second."""

    def __init__(self, seed: int, known: Mapping[str, Callable[[], Any]]) -> None:
        self._random = random.Random(seed)
        self._known = known

    def message(self, kind: type[Message]) -> bytes:
        """A frame of the right form, with values of the right types."""
        fields = {"type": kind.__name__, **self._fields(kind)}
        return msgspec.msgpack.encode(fields)

    def damaged(self, frame: bytes) -> bytes:
        """`frame` with bytes flipped, cut out, doubled or put in."""
        found = bytearray(frame)
        for _ in range(self._random.randint(1, 8)):
            place = self._random.randrange(len(found) + 1)
            length = self._random.randint(1, 4)
            match self._random.randrange(4):
                case 0 if found:
                    found[place % len(found)] ^= 1 << self._random.randrange(8)
                case 1:
                    del found[place : place + length]
                case 2:
                    found[place:place] = found[place : place + length]
                case _:
                    found[place:place] = self._random.randbytes(length)
        return bytes(found)

    def noise(self) -> bytes:
        return self._random.randbytes(self._random.choice((0, 1, 2, 16, 300, 5000)))

    def one_of(self, choices: tuple[Any, ...]) -> Any:
        return self._random.choice(choices)

    def _fields(self, kind: type[msgspec.Struct]) -> dict[str, Any]:
        return {
            field.encode_name: self._value(inspect.type_info(field.type), field.encode_name)
            for field in msgspec.structs.fields(kind)
            # A default is left in place as often as not.
            if field.required or self._random.random() < 0.5
        }

    def _value(self, kind: inspect.Type, name: str = "") -> Any:
        if name in self._known and self._random.random() < 0.8:
            return self._known[name]()
        match kind:
            case inspect.StructType():
                return self._fields(kind.cls)
            case inspect.UnionType():
                return self._value(self._random.choice(kind.types))
            case inspect.ListType():
                return [self._value(kind.item_type) for _ in range(self._random.choice((0, 1, 2, 40)))]
            case inspect.TupleType():
                return [self._value(item) for item in kind.item_types]
            case _:
                return self._plain(kind)

    def _plain(self, kind: inspect.Type) -> Any:
        match kind:
            case inspect.DictType():
                return {}
            case inspect.EnumType():
                return self._random.choice(list(kind.cls)).value
            case inspect.IntType():
                return self._random.choice(WILD_INTEGERS)
            case inspect.FloatType():
                return self._random.choice(WILD_FLOATS)
            case inspect.StrType():
                return self._random.choice(WILD_TEXTS)
            case inspect.BytesType():
                return self._random.randbytes(self._random.choice((0, 3, 200)))
            case inspect.BoolType():
                return self._random.random() < 0.5
            case _:
                return None
