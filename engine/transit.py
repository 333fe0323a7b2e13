"""Between the host's memory and the device's, without either waiting for the other.

A copy out of or into ordinary memory holds up the host until the device has done all that it was given before. One out
of or into pinned memory takes its place among the device's work, and torch keeps that memory until the copy has ended.
On a CPU there is one memory only, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def staged(values: Tensor, device: torch.device) -> Tensor:
    """`values`, of the host, where a copy to the device (`non_blocking`) finds them by itself."""
    return values.pin_memory() if device.type == "cuda" else values


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values`, of the host, in the device's memory by the time the device comes to what is asked of it next."""
    return staged(values, device).to(device, non_blocking=True)


class Mark:
    """A point in a device's work that the host may wait for. On a CPU it is always reached."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def set(self) -> None:
        """Behind all that the device has been given so far."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Until the device is there; at once if it was never set."""
        if self._event is not None:
            self._event.synchronize()


class ToHost:
    """Tensors on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Of `device`, whose work so far `read` waits for even if there is none of them."""
        self._tensors = [_to_pinned(tensor) if device.type == "cuda" else tensor for tensor in tensors]
        self._arrived = Mark(device)
        self._arrived.set()

    def read(self) -> list[Tensor]:
        self._arrived.wait()
        return self._tensors


def _to_pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
