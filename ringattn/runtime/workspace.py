"""The memory of buffers: taken by name, allocated once, and grown when a call needs more."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


class Workspace:
    """Buffers by slot. One call uses them at a time.

    What a prepared call has made of them (views) is kept here too, so that it goes when the memory does.
    """

    def __init__(self, allocate: Callable[[int, torch.dtype, torch.device], Tensor]) -> None:
        self._allocate = allocate
        self._flat: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._views: WeakKeyDictionary[Hashable, object] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        """A copy has memory of its own, and none yet."""
        return Workspace(copy.deepcopy(self._allocate, memo))

    def reserve(self, slot: str, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Makes room for so many numbers; what was in the slot, and all views, may be lost."""
        key = slot, dtype, device
        flat = self._flat.get(key)
        if flat is None or flat.numel() < size:
            self._flat.pop(key, None)
            self._views.clear()
            self._flat[key] = self._allocate(size, dtype, device)

    def view(self, slot: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor in a slot that is large enough."""
        return self._flat[slot, dtype, device][: torch.Size(shape).numel()].view(*shape)

    def views(self, of: Hashable) -> object | None:
        """What was kept for ``of``, if the memory is still the same."""
        return self._views.get(of)

    def keep(self, of: Hashable, views: object) -> None:
        self._views[of] = views

    def clear(self) -> None:
        """Lets go of all buffers."""
        self._views.clear()
        self._flat.clear()

    def buffers(self) -> list[Tensor]:
        """All buffers held now."""
        return list(self._flat.values())

    def flat(self) -> dict[tuple[str, torch.dtype, torch.device], Tensor]:
        """The same by slot, dtype and device."""
        return dict(self._flat)
