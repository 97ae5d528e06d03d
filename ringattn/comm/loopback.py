"""A world of rank-threads in one process: every rank runs the same code as a real one, messages pass through
mailboxes in memory. It tests a ring of any size without processes, and with several ranks on one GPU."""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection
from itertools import takewhile
from typing import TypeVar

import torch
from torch import Tensor

from ringattn.arguments.values import deadline, integer
from ringattn.comm.calls import CallLog, PeerError
from ringattn.comm.label import Kind, Label
from ringattn.comm.transport import Parcels, Pending, Transport, check_batch, name_ranks

RANKS = 4096  # threads that a process bears
Result = TypeVar("Result")
_Address = tuple[int, int, int, int]  # source, destination, epoch, number
_Receive = tuple[Tensor, _Address]


class Loopback:
    """Runs a function on each of `world_size` ranks that are threads of this process.

    ```python
    def work(transport):
        cp = ringattn.ContextParallel(transport, seqlen)
        return ringattn.attention(cp.shard(q), cp.shard(k), cp.shard(v), cp=cp)

    outs = ringattn.Loopback(4).run(work)  # one result per rank
    ```

    Autograd works inside: each rank-thread runs its own backward on itself, because CUDA's backward nodes
    share one worker thread per device, in which the ranks would wait for each other for ever. CUDA tensors
    are exchanged in the order of the device's default stream, so the ranks stay on that stream.

    Args:
        world_size: number of ranks, at least 1.
        timeout: seconds, the deadline on every wait of a rank for its peers.

    Raises:
        ValueError: `world_size` is not from 1 to 4096, or `timeout` no deadline.
    """

    def __init__(self, world_size: int, timeout: float = 60.0) -> None:
        self.world_size = integer("world_size", world_size, 1, RANKS)
        self.timeout = deadline("timeout", timeout)

    def run(self, fn: Callable[[Transport], Result]) -> list[Result]:
        """Calls `fn(transport)` on every rank and returns the results by rank.

        When a rank raises, the others are released from whatever they wait for, and the first exception is raised
        here, with a note that names its rank.

        Raises:
            RuntimeError: all ranks returned, but something that was sent was never received.
        """
        world = _World(self.world_size, self.timeout)
        results: dict[int, Result] = {}

        def rank_main(rank: int) -> None:
            try:
                with torch.autograd.set_multithreading_enabled(False):
                    results[rank] = fn(LoopbackTransport(world, rank))
            except BaseException as error:
                world.leave(rank, error)
            else:
                world.leave(rank)

        threads = [
            threading.Thread(target=rank_main, args=(rank,), name=f"rank {rank}", daemon=True)
            for rank in range(self.world_size)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C in the caller releases the ranks too
            world.leave(None, error)
            raise
        world.raise_failure()
        return [results[rank] for rank in range(self.world_size)]


class _World:
    """What the rank-threads share: mailboxes, the store, and who has left. One condition guards it all."""

    def __init__(self, world_size: int, timeout: float) -> None:
        self.world_size = world_size
        self.timeout = timeout
        self.name = f"loopback-{uuid.uuid4().hex[:12]}"
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        # The n-th receive of an epoch takes the n-th send, whatever the order in which batches are waited for.
        self.mail: dict[_Address, tuple[Tensor, Label]] = {}
        self.sent: Counter[tuple[int, int, int]] = Counter()
        self.asked: Counter[tuple[int, int, int]] = Counter()
        self.failures: dict[int, Label] = {}  # by epoch
        self.waiting: dict[int, Label] = {}  # in agreements, by rank
        self.store: dict[str, str] = {}
        self.left: set[int] = set()
        self.failure: tuple[int | None, BaseException] | None = None

    def leave(self, rank: int | None, error: BaseException | None = None) -> None:
        """Marks a rank (None: the caller of `run`) as gone; only the first error counts, and one that a rank was told
        by another does not count against the other's."""
        with self.lock:
            if rank is not None:
                self.left.add(rank)
            origins = {label.rank for label in self.failures.values()}
            if error is not None and (self.failure is None or (rank in origins and self.failure[0] not in origins)):
                self.failure = (rank, error)
            self.changed.notify_all()

    def check_failure(self, who: str) -> None:
        """Releases a rank that waits, with the condition held, when another has failed."""
        if self.failure is not None:
            rank, error = self.failure
            culprit = "the caller" if rank is None else f"rank {rank}"
            raise PeerError(f"{who}: released, because {culprit} failed with {error!r}") from error

    def raise_failure(self) -> None:
        """Raises what the run must not hide."""
        if self.failure is not None:
            rank, error = self.failure
            error.add_note(f"raised on rank {rank} of a loopback world of {self.world_size}")
            raise error
        kept = [address for address in self.mail if address[2] not in self.failures]
        lost = [f"number {number} from rank {source} to rank {to}" for source, to, _, number in kept]
        if lost:
            raise RuntimeError(f"tensors were sent but never received: {', '.join(lost)}")


class LoopbackTransport:
    """One rank's view of a loopback world; `Loopback.run` makes them."""

    blind = frozenset[str]()

    def __init__(self, world: _World, rank: int) -> None:
        self.rank = rank
        self.world_size = world.world_size
        self.name = world.name
        self.timeout = world.timeout
        self.log = CallLog(rank)
        self._world = world

    def post(self, sends: Parcels, recvs: Parcels, what: str) -> Pending:
        """Copies the sends into their mailboxes at once; receives are filled by `wait()`."""
        check_batch(self, sends, recvs)
        world, rank, label = self._world, self.rank, self.log.label(what)
        copies = [((tensor.detach() if tensor.requires_grad else tensor).clone(), peer) for tensor, peer in sends]
        receives: list[_Receive] = []
        with world.lock:
            self._heed()
            for copy, peer in copies:
                way = rank, peer, label.epoch
                world.mail[*way, world.sent[way]] = copy, label
                world.sent[way] += 1
            for tensor, peer in recvs:
                way = peer, rank, label.epoch
                receives += [(tensor, (*way, world.asked[way]))]
                world.asked[way] += 1
            world.changed.notify_all()
        return _Receives(self, receives, label, what)

    def check_open(self) -> None:
        """The world lasts as long as `Loopback.run`."""

    def warn(self, label: Label) -> None:
        """See `Transport`."""
        with self._world.lock:
            if label.kind is Kind.FAILURE:
                self._world.failures.setdefault(label.epoch, label)
            else:
                self._world.waiting[label.rank] = label
            self._world.changed.notify_all()

    def heed(self, among: Collection[int] | None = None) -> None:
        """See `Transport`. Who has left is not looked for."""
        with self._world.lock:
            self._heed()

    def _heed(self) -> None:
        """The same, with the condition held."""
        world, log = self._world, self.log
        if world.failures or world.waiting:
            told = [label for label in (world.failures.get(log.epoch), *world.waiting.values()) if label is not None]
            for label in told:
                log.hear(label)
        log.check()

    @property
    def board(self) -> LoopbackTransport:
        """See `Voters`."""
        return self

    def publish(self, key: str, value: str) -> None:
        """See `Transport`."""
        with self._world.lock:
            self._world.store[key] = value
            self._world.changed.notify_all()

    def lookup(self, key: str) -> str | None:
        """See `Transport`."""
        with self._world.lock:
            return self._world.store.get(key)

    def count(self, key: str) -> int:
        """See `Transport`."""
        with self._world.lock:
            number = int(self._world.store.get(key, "0")) + 1
            self._world.store[key] = str(number)
            self._world.changed.notify_all()
            return number

    def await_key(self, key: str, timeout: float) -> bool:
        """See `Transport`. Raises PeerError when another rank has failed meanwhile."""
        world = self._world
        with world.lock:
            epoch = self.log.epoch
            world.changed.wait_for(
                lambda: key in world.store or epoch in world.failures or world.failure is not None, timeout
            )
            if key not in world.store:
                self.heed()
                world.check_failure(f"rank {self.rank}, waiting for '{key}'")
            return key in world.store

    def forget(self, key: str) -> None:
        """See `Transport`."""
        with self._world.lock:
            self._world.store.pop(key, None)


class _Receives:
    """The receives of one batch that have not come yet."""

    def __init__(self, transport: LoopbackTransport, receives: list[_Receive], label: Label, what: str) -> None:
        self._transport = transport
        self._world = transport._world
        self._receives = receives
        self._label = label
        self._what = what

    def wait(self) -> None:
        """Fills the receives in order. Raises PeerError on the deadline, or when a peer failed or left."""
        deadline = time.monotonic() + self._world.timeout
        while self._receives:
            for tensor, address, sent, label in self._take(deadline):
                if not label.fits(self._label):
                    raise self._transport.log.mismatch(self._label, label)
                if (sent.dtype, sent.shape) != (tensor.dtype, tensor.shape):
                    sent = self._shaped(sent, tensor, address)
                tensor.copy_(sent)

    def _shaped(self, sent: Tensor, tensor: Tensor, address: _Address) -> Tensor:
        if (sent.dtype, sent.numel()) != (tensor.dtype, tensor.numel()):
            raise PeerError(
                f"{self._what}: rank {address[0]} sent {sent.numel()} x {sent.dtype}, rank {address[1]} expects "
                f"{tensor.numel()} x {tensor.dtype}: the ranks are not at the same call"
            )
        return sent.view_as(tensor)

    def _take(self, deadline: float) -> list[tuple[Tensor, _Address, Tensor, Label]]:
        """What has come, at least one message, with where it belongs."""
        mail, receives = self._world.mail, self._receives
        with self._world.lock:
            if receives[0][1] not in mail:
                self._await(receives[0][1], deadline)
            there = list(takewhile(lambda receive: receive[1] in mail, receives))
            came = [(*receive, *mail.pop(receive[1])) for receive in there]
            del receives[: len(came)]
        return came

    def _await(self, address: _Address, deadline: float) -> None:
        """Waits for a message, with the condition held."""
        world, (peer, rank, *_) = self._world, address
        while not (address in world.mail or peer in world.left or world.failure or time.monotonic() > deadline):
            self._transport._heed()
            world.changed.wait(deadline - time.monotonic())
        if address in world.mail:
            return
        sources = name_ranks([source for _, (source, *_) in self._receives])
        who = f"{self._what}: rank {rank}, waiting for {sources}"
        self._transport._heed()
        world.check_failure(who)
        if peer in world.left:
            raise PeerError.of_wait(f"{who}: rank {peer} has returned without sending it")
        raise PeerError.of_wait(f"{who}: nothing came within {world.timeout} s")
