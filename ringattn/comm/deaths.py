"""Whether other processes of this machine have ended, which their kernel knows at once and needs no message for."""

from __future__ import annotations

import os
import select
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ringattn.comm.shared_memory import machine


class Deaths:
    """Watches processes, by rank. Where the system cannot (before Linux 5.3), nobody ever ends."""

    def __init__(self, processes: Mapping[int, int]) -> None:
        self._poll, self._ranks = select.poll(), dict[int, int]()
        self._ended: list[int] = []
        for rank, process in processes.items():
            try:
                handle = os.pidfd_open(process)
            except ProcessLookupError:
                self._ended.append(rank)
            except (AttributeError, OSError):
                continue
            else:
                self._ranks[handle] = rank
                self._poll.register(handle, select.POLLIN)

    def __del__(self) -> None:
        for handle in self._ranks:
            with suppress(OSError):
                os.close(handle)

    def ended(self) -> list[int]:
        """The ranks whose processes are no more."""
        self._ended += {self._ranks[handle] for handle, _ in self._poll.poll(0)} - {*self._ended}
        return self._ended


def neighbourhood() -> str:
    """What processes have in common that know each other by number; nothing where that cannot be told."""
    try:
        return f"{machine()} {Path('/proc/self/ns/pid').readlink()}" if machine() else ""
    except OSError:
        return ""
