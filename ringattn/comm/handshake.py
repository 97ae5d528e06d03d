"""How the processes of one machine find each other: a socket for each pair of ranks.

The sockets have abstract addresses, which leave nothing in any folder, and to which every user of the machine can
connect. So a rank takes a caller only if it is of its own user and says the secret that went through the ranks' store.
"""

from __future__ import annotations

import hmac
import os
import secrets
import selectors
import socket
import struct
import time
from contextlib import ExitStack

from ringattn.comm.transport import Transport, in_vain

_SECRET = 16  # bytes
_HELLO = struct.Struct(f"<q{_SECRET}s")  # the caller's rank, the secret of the called


def connect(store: Transport) -> dict[int, socket.socket]:
    """A socket to every other rank of ``store``. Collective.

    Raises:
        PeerError: a rank did not come within the deadline of the store.
    """
    deadline = time.monotonic() + store.timeout
    secret = secrets.token_bytes(_SECRET)
    address = f"ringattn-{secrets.token_hex(16)}"
    with _Listener(address, secret, store.world_size) as listener:
        store.board.publish(f"socket {store.rank}", f"{address} {secret.hex()}")
        found: dict[int, socket.socket] = {}
        missing = [0]
        try:
            for rank in range(store.rank):
                missing = [rank]
                found[rank] = _call(store, rank, deadline)
            while missing := [rank for rank in range(store.rank + 1, store.world_size) if rank not in found]:
                found |= listener.callers(missing, deadline)
        except OSError as error:
            for connection in found.values():
                connection.close()
            who = f"connecting: rank {store.rank} of group '{store.name}'"
            raise in_vain(who, deadline - store.timeout, store.timeout, dict.fromkeys(missing, str(error))) from error
    return found


def _call(store: Transport, rank: int, deadline: float) -> socket.socket:
    if not store.board.await_key(f"socket {rank}", _left(deadline)):
        raise TimeoutError("it has published no socket")
    address, secret = (store.board.lookup(f"socket {rank}") or "").split()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(_left(deadline))
        while True:
            try:
                connection.connect(f"\0{address}")
                break
            except BlockingIOError:  # others stand in line
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        connection.send(_HELLO.pack(store.rank, bytes.fromhex(secret)))
    except OSError:
        connection.close()
        raise
    return connection


class _Listener:
    """Takes the calls of ranks, and hangs up on everyone else."""

    def __init__(self, address: str, secret: bytes, world_size: int) -> None:
        self.secret = secret
        self.open = ExitStack()
        self.socket = self.open.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        self.socket.setblocking(False)
        self.socket.bind(f"\0{address}")
        self.socket.listen(max(world_size, 128))
        self.selector = self.open.enter_context(selectors.DefaultSelector())
        self.selector.register(self.socket, selectors.EVENT_READ)

    def __enter__(self) -> _Listener:
        return self

    def __exit__(self, *_: object) -> None:
        for key in list(self.selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self.open.close()

    def callers(self, awaited: list[int], deadline: float) -> dict[int, socket.socket]:
        """Those of the awaited ranks that call next; raises TimeoutError where none does in time."""
        ready = self.selector.select(deadline - time.monotonic())
        if not ready:
            raise TimeoutError("it did not call")
        found = {}
        for key, _ in ready:
            assert isinstance(key.fileobj, socket.socket)
            if key.fileobj is self.socket:
                self._accept()
            else:
                caller = key.fileobj
                self.selector.unregister(caller)
                rank = self._recognise(caller)
                if rank in awaited and rank not in found:
                    found[rank] = caller
                else:
                    caller.close()
        if time.monotonic() > deadline and not found:
            raise TimeoutError("it did not call")
        return found

    def _accept(self) -> None:
        try:
            caller, _ = self.socket.accept()
        except BlockingIOError:  # gone again
            return
        _, user, _ = struct.unpack("3i", caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user == os.geteuid():
            caller.setblocking(False)
            self.selector.register(caller, selectors.EVENT_READ)
        else:
            caller.close()

    def _recognise(self, caller: socket.socket) -> int | None:
        try:
            rank, secret = _HELLO.unpack(caller.recv(_HELLO.size + 1))
        except (OSError, struct.error):
            return None
        return int(rank) if hmac.compare_digest(secret, self.secret) else None


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)
