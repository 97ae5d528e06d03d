"""One rank of a world whose messages arrive at the rate of a link, from memory of the host: whether a program hides
them behind its attention shows in its time beside that of an :class:`InstantRank`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ringattn.arguments.values import shown
from ringattn.comm.transport import Parcels, Pending, check_batch
from ringattn.testing.instant_rank import InstantRank

PROBE = 1 << 26  # bytes whose copy tells a device's rate
FILLING = 1 << 24  # bytes copied at once to let time pass


class StagedRank(InstantRank):
    """An :class:`InstantRank` whose receives take their time.

    On a CUDA device a receive is copied from pinned host memory, random numbers, on a stream of its own, behind what
    the device does when it is posted; ``wait()`` makes the current stream wait for the batch, and the host for nothing.
    A device that copies faster than ``bytes_per_second`` is kept back: it copies as many bytes more, into memory of its
    own, as take the rest of the time. On a CPU the copy happens in ``wait()``, at the speed of memory.

    It takes none of the device's multiprocessors, as NCCL's kernels do, and sends take nothing.

    Args:
        rank, world_size, timeout: see :class:`InstantRank`.
        bytes_per_second: the rate at which receives arrive, above 0.

    Raises:
        ValueError: one of them is out of its range.
    """

    name = "staged"

    def __init__(self, rank: int, world_size: int, bytes_per_second: float = 50e9, timeout: float = 60.0) -> None:
        super().__init__(rank, world_size, timeout)
        if not (isinstance(bytes_per_second, (int, float)) and 0 < bytes_per_second < math.inf):
            raise ValueError(f"bytes_per_second={shown(bytes_per_second)}: must be a number above 0, for instance 50e9")
        self.bytes_per_second = float(bytes_per_second)
        self._staged: dict[torch.dtype, Tensor] = {}  # random numbers, as many as the largest message has
        self._lane: _Lane | None = None  # where CUDA copies

    @property
    def rate(self) -> float:
        """Bytes a second at which receives arrive: what was asked for, or what the device is able to; known once a
        message has been posted on a CUDA device."""
        return self.bytes_per_second if self._lane is None else min(self.bytes_per_second, self._lane.rate)

    def post(self, sends: Parcels, recvs: Parcels, what: str) -> Pending:
        """See the class. Receives of integers are left as they are."""
        check_batch(self, sends, recvs)
        pairs = [(tensor, self._numbers(tensor)) for tensor, _ in recvs if tensor.is_floating_point()]
        if not any(tensor.is_cuda for tensor, _ in pairs):
            return _OnHost(pairs)
        if self._lane is None:
            self._lane = _Lane(pairs[0][0].device)
        return self._lane.start(pairs, self.bytes_per_second)

    def _numbers(self, like: Tensor) -> Tensor:
        """What arrives in a tensor, in its shape."""
        held = self._staged.get(like.dtype)
        if held is None or held.numel() < like.numel():
            with torch.inference_mode(False), torch.no_grad():
                held = torch.randn(like.numel(), dtype=torch.float32).to(like.dtype)
            self._staged[like.dtype] = held = held.pin_memory() if like.is_cuda else held
        return held[: like.numel()].view(like.shape)


Pairs = list[tuple[Tensor, Tensor]]  # receives, and what arrives in them


class _OnHost:
    """Receives that are copied when they are waited for."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def wait(self) -> None:
        """See `Pending`."""
        with torch.no_grad():
            for tensor, numbers in self.pairs:
                tensor.copy_(numbers)
        self.pairs = []


class _Lane:
    """The stream of a device on which receives are copied. ``rate``: bytes a second that it copies, as measured."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.filling = torch.empty(FILLING, dtype=torch.uint8).pin_memory()
        self.waste = torch.empty(FILLING, dtype=torch.uint8, device=device)
        self.rate = self._measured()

    def _measured(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.stream.device)
        with torch.cuda.stream(self.stream):
            self._let_pass(FILLING)  # the first copy takes longer
            start.record()
            self._let_pass(PROBE)
            end.record()
        end.synchronize()
        return 1e3 * PROBE / start.elapsed_time(end)

    def _let_pass(self, size: int) -> None:
        """Copies so many bytes to nowhere."""
        for at in range(0, size, FILLING):
            part = slice(0, min(FILLING, size - at))
            self.waste[part].copy_(self.filling[part], non_blocking=True)

    def start(self, pairs: Pairs, bytes_per_second: float) -> _OnDevice:
        """The copies, begun behind what the current stream does now."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream), torch.no_grad():
            for tensor, numbers in pairs:
                tensor.copy_(numbers, non_blocking=True)
                self._let_pass(round(tensor.nbytes * max(self.rate / bytes_per_second - 1, 0)))
            return _OnDevice(pairs, self.stream.record_event())


class _OnDevice:
    """Receives under way. They are kept until the current stream waits for them."""

    def __init__(self, pairs: Pairs, event: torch.cuda.Event) -> None:
        self.pairs, self.event = pairs, event

    def wait(self) -> None:
        """See `Pending`."""
        if self.pairs:
            torch.cuda.current_stream(self.pairs[0][0].device).wait_event(self.event)
        self.pairs = []
