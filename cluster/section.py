"""What the sections of a topology are made of: their base, and the kinds of values in them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Text = Annotated[str, Meta(min_length=1)]
Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]
Delay = Annotated[float, Meta(ge=0)]
"""In seconds; 0: none."""
Amount = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Fraction = Annotated[float, Meta(gt=0, le=1)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Cores = list[list[NonNegative]]
"""For each replica, the cores it is pinned to; also its number of compute threads. When a pool has been scaled beyond
them, its workers share them in turn. The ranks of a replica divide its cores."""
Gpus = list[list[NonNegative]]
"""For each replica, the GPUs of its ranks, by their numbers among those that `baton up` sees: the machine's, or those
of its CUDA_VISIBLE_DEVICES. When a pool has been scaled beyond them, its workers share them in turn. With `launch:
local` only; by default each worker gets those that the fewest others have."""


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: unknown keys are refused."""
