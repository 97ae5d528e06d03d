"""Boards on PyTorch's stores, on which ranks leave each other what needs no message; that of a process group is on the
store of its own."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ringattn.comm.calls import PeerError
from ringattn.comm.forks import check_own

Answer = TypeVar("Answer")


def _import_without_group() -> None:
    """Imports a module of PyTorch's that keeps the default group of that moment for ever, as the default of arguments
    (None stands for it as well). The first call of any operator of ours would import it, through torch._dynamo, and
    a gloo group that is still there when the interpreter ends may abort the process."""
    world = dist.group.WORLD
    dist.group.WORLD = None
    try:
        import torch.distributed.nn.functional  # noqa: F401
    finally:
        dist.group.WORLD = world


_import_without_group()


class StoreBoard:
    """A board on one of PyTorch's key/value stores."""

    rank: int
    name: str

    @property
    def _open_store(self) -> dist.Store:
        """The store; raises RuntimeError where there is none any more."""
        raise NotImplementedError

    def publish(self, key: str, value: str) -> None:
        """See `Board`."""
        self._ask(lambda: self._open_store.set(key, value))

    def lookup(self, key: str) -> str | None:
        """See `Board`."""
        # get() alone would block on an absent key
        return self._ask(lambda: self._open_store.get(key).decode() if self._open_store.check([key]) else None)

    def count(self, key: str) -> int:
        """See `Board`."""
        return self._ask(lambda: self._open_store.add(key, 1))

    def await_key(self, key: str, timeout: float) -> bool:
        """See `Board`. Asks again and again: a store's own wait logs a warning when its time is over."""
        deadline, pause = time.monotonic() + timeout, 0.0005
        while not self._ask(lambda: self._open_store.check([key])):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, 0.05)
        return True

    def forget(self, key: str) -> None:
        """See `Board`."""
        try:
            self._ask(lambda: self._open_store.delete_key(key))
        except NotImplementedError:
            return

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        try:
            return question()
        except dist.DistError as error:
            raise PeerError(
                f"rank {self.rank}: the store of group '{self.name}' does not answer, the process that hosts "
                f"it may have died ({error})"
            ) from error


class GroupBoard(StoreBoard):
    """A rank's view of a process group and its store.

    The group is not kept alive: what the board holds ends with it.

    Args:
        group: a process group that this rank belongs to (of a 1-D DeviceMesh: `mesh.get_group()`).

    Raises:
        ValueError: `group` is not a group of this rank's.
        RuntimeError: it is that of the process that this one was forked from.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                f"group is {group!r}: it must be a process group that this rank is in; call "
                "init_process_group first, make the transport on the group's own ranks only, and of a "
                "DeviceMesh take mesh.get_group()"
            )
        check_own(group)
        self.rank: int = dist.get_rank(group)
        self.world_size: int = dist.get_world_size(group)
        self.name: str = group.group_name
        self._group = weakref.ref(group)
        self._ends: list[Callable[[], None]] = []
        # Every kind of group has a store, registered beside its name.
        self._store: dist.Store | None = dist.PrefixStore("ringattn", distributed_c10d._get_process_group_store(group))
        # without a reference to the board, which lives with contexts
        weakref.finalize(group, _end, weakref.ref(self)).atexit = False

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group.

        Raises:
            RuntimeError: it has been destroyed.
        """
        group = self._group()
        if group is None or group not in distributed_c10d._world.pg_map:
            raise RuntimeError(
                f"process group '{self.name}' has been destroyed, and this context ended with it: make a new context "
                "on a new group"
            )
        return group

    def check_open(self) -> None:
        """See `Transport`."""
        self.group  # noqa: B018 - raises

    def at_end(self, action: Callable[[], None]) -> None:
        """Does something when the group is no more."""
        self._ends.append(action)

    def _end(self) -> None:
        self._store = None
        for action in self._ends:
            action()

    def keep_apart(self, number: int) -> None:
        """From now on uses keys of its own: those of boards with another number are others."""
        self._store = dist.PrefixStore(str(number), self._open_store)

    @property
    def _open_store(self) -> dist.Store:
        self.check_open()
        assert self._store is not None, "it lives as long as the group"
        return self._store

    @property
    def board(self) -> GroupBoard:
        """See `Voters`."""
        return self


def _end(board: weakref.ref[GroupBoard]) -> None:
    if (alive := board()) is not None:
        alive._end()
