"""How a walk over the turns of a program is captured: as graphs of what its device is to do from one message to the
next, and the messages in between, which every replay posts and waits for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ringattn.comm import LoopbackTransport, Pending, Transport
from ringattn.kernels.scores import Scores
from ringattn.runtime.link import Batch, Messages
from ringattn.runtime.prepared import Prepared
from ringattn.runtime.workspace import Workspace

Inputs = tuple[Tensor | None, ...]
Found = tuple[Tensor | None, ...]  # None for a gradient that is not wanted
Loop = Callable[..., Found]  # of `loops.py`


class Walk(NamedTuple):
    """A loop over the turns of a prepared call, and all that it reads."""

    loop: Loop
    inputs: Inputs
    call: Prepared
    scores: Scores

    def __call__(self, link: Messages) -> Found:
        return self.loop(*self.inputs, self.call, self.scores, link)


class Graph(Protocol):
    """As `torch.cuda.CUDAGraph`: notes what is queued between begin and end without doing it, and does it when
    replayed."""

    def capture_begin(self, pool: Any = ..., capture_error_mode: str = ...) -> None: ...
    def capture_end(self) -> None: ...
    def replay(self) -> None: ...


class Device(Protocol):
    """What can capture."""

    def refuse(self, device: torch.device, transport: Transport) -> Exception | None:
        """None where calls on a device can be captured, else what is to be said of it."""

    def name(self, device: torch.device) -> str:
        """What :func:`hardware` knows it by."""

    def stream(self, device: torch.device) -> Hashable | None:
        """The queue of the calls made now; None while a graph of the user's own is captured from it."""

    def aside(self, device: torch.device) -> AbstractContextManager[object]:
        """Queues to capture from in the place of the current one."""

    def graph(self) -> Graph: ...
    def pool(self) -> Hashable: ...
    def unowned(self, tensor: Tensor) -> Tensor:
        """The same memory, without keeping it."""


class Cuda:
    """CUDA devices."""

    def __init__(self) -> None:
        self._aside: dict[torch.device, torch.cuda.Stream] = {}

    def refuse(self, device: torch.device, transport: Transport) -> Exception | None:
        """See `Device`."""
        if device.type != "cuda":
            return ValueError(f"the tensors are on {device.type}, and graphs are of CUDA devices")
        if isinstance(transport, LoopbackTransport):
            return NotImplementedError("ranks that are threads of one process would disturb each other's captures")
        return None

    def name(self, device: torch.device) -> str:
        """See `Device`."""
        return torch.cuda.get_device_name(device)

    def stream(self, device: torch.device) -> Hashable | None:
        """See `Device`."""
        return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream(device).cuda_stream

    @contextmanager
    def aside(self, device: torch.device) -> Iterator[None]:
        """See `Device`. One for all captures: what one of them has freed of a pool, only the same stream takes. Where a
        turn has nothing to do between two messages, a graph is empty, of which PyTorch warns."""
        with torch.cuda.device(device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            if device not in self._aside:
                self._aside[device] = torch.cuda.Stream(device)
            with torch.cuda.stream(self._aside[device]):
                yield

    def graph(self) -> Graph:
        """See `Device`."""
        return torch.cuda.CUDAGraph()

    def pool(self) -> Hashable:
        """See `Device`."""
        handle: Hashable = torch.cuda.graph_pool_handle()
        return handle

    def unowned(self, tensor: Tensor) -> Tensor:
        """See `Device`."""
        storage = tensor.untyped_storage()
        seen = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), tensor.device, storage.nbytes())
        with torch.inference_mode(False):
            made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return made.set_(seen, tensor.storage_offset(), tensor.shape, tensor.stride())


class Step(NamedTuple):
    """A graph, and what follows it: a batch to post, or, with None, a wait for the one before or the end."""

    graph: Graph
    batch: Batch | None


class Recorder:
    """Stands for a link while a walk is captured: where that moves messages, one graph ends and another begins."""

    def __init__(self, workspace: Workspace, device: Device, pool: Hashable) -> None:
        self.workspace, self.steps = workspace, list[Step]()
        self._device, self._pool = device, pool

    def capture(self, walk: Walk) -> Found:
        """What the walk will have found when the steps are replayed."""
        self._begin()
        try:
            found = walk(self)
        except BaseException:
            with suppress(RuntimeError):  # it says less than the first
                self._graph.capture_end()
            raise
        self._end(None)
        return tuple(None if x is None else self._device.unowned(x) for x in found)

    def post(self, batch: Batch) -> Pending | None:
        """See `Messages`."""
        if not (batch.sends or batch.recvs):
            return None
        self._end(batch)
        self._begin()
        return _Posted()

    def wait(self, pending: Pending) -> None:
        """See `Messages`."""
        self._end(None)
        self._begin()

    def _begin(self) -> None:
        self._graph = self._device.graph()
        # other threads (NCCL's watchdog, data loaders) go on meanwhile
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _end(self, batch: Batch | None) -> None:
        self._graph.capture_end()
        self.steps.append(Step(self._graph, batch))


class _Posted:
    """A batch that will be posted when the walk is replayed."""

    def wait(self) -> None:
        """Nothing is under way."""


class Captured(NamedTuple):
    """A walk that was captured. ``own``: the memory of inputs that move; ``found``: its results, in a pool of memory
    which the next replay of any graph of the stream may overwrite."""

    steps: Sequence[Step]
    own: Inputs
    found: Found
    pool: Hashable

    def replay(self, inputs: Inputs, link: Messages) -> None:
        """Does again, with these inputs, what was captured."""
        for own, given in zip(self.own, inputs, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        pending = None
        for graph, batch in self.steps:
            graph.replay()
            if pending is not None:
                link.wait(pending)
                pending = None
            elif batch is not None:
                pending = link.post(batch)
