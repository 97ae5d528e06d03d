"""CUDA graphs: what a loop queues on its device is captured once and replayed, which spares the host its launches.

A loop is captured from one message to the next: messages are posted and waited for at every replay as in any other
call, so that bytes are counted, ranks that fail are heard, and a group can end, whatever was captured. (A graph that
holds NCCL's own transfers would keep their communicator, and `destroy_process_group` would wait for it for ever.) What
the ranks do together before and after a loop is not captured either, nor is what takes the results out: a call returns
tensors of its own, where a graph's are overwritten by the next replay.

The first call of a kind runs eagerly, for its kernels to compile, the second is captured, and those after it are
replayed. A graph reads its inputs where they lay when it was captured. One that lies elsewhere later has moved: the
call is captured again with memory for it, into which it is copied before each replay.
"""

from __future__ import annotations

import copy
import traceback
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ringattn.comm import empty
from ringattn.planning.cost import Terms, host_and_device
from ringattn.planning.hardware import hardware
from ringattn.planning.plan import Plan
from ringattn.planning.shape import Shape
from ringattn.runtime.capture import Captured, Cuda, Device, Found, Recorder, Walk
from ringattn.runtime.link import Link
from ringattn.runtime.prepared import Prepared
from ringattn.runtime.settings import Options
from ringattn.runtime.workspace import Workspace

MOST = 64  # captured walks that a link keeps
# A device that is so much slower than its host gains next to nothing. Measured beside an H200, rings of eight: at 8,192
# tokens, three times as slow, 4 % of the forward pass; at 4,096 tokens, where both take as long, 21 %.
SLOWER = 4.0


@dataclass(eq=False, slots=True)
class Series:
    """Calls whose walks can be one graph: of one loop and one stream, with inputs that are laid out alike.
    ``addresses``: where these lay in the first of them, or when they were captured; ``moving``: which of them moved."""

    loop: str
    stream: Hashable
    addresses: tuple[int, ...]
    moving: set[int] = field(default_factory=set)
    captures: int = 0
    refused: str | None = None

    def follow(self, addresses: tuple[int, ...]) -> bool:
        """Whether an input has moved that did not before. When it happens again, all are taken to move, so that no
        series is captured more than three times."""
        found = {i for i, (was, now) in enumerate(zip(self.addresses, addresses, strict=True)) if was != now}
        if found <= self.moving:
            return False
        self.moving |= found if self.captures < 2 else set(range(len(addresses)))
        return True

    def __str__(self) -> str:
        if self.refused is not None:
            return f"{self.loop} eager: {self.refused}"
        if not self.captures:
            return f"{self.loop} eager so far: the second call is captured"
        moving = f", with {len(self.moving)} of {len(self.addresses)} inputs copied in, as they move"
        return f"{self.loop} captured{moving if self.moving else ''}"


class _Kept(OrderedDict[Series, Captured]):
    """What a link has captured, the least recently replayed first. ``memory`` holds inputs that move: all graphs of a
    stream copy theirs into the same, but for those captured before it grew, which keep what they had."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Workspace(empty)

    def pool(self, stream: Hashable) -> Hashable | None:
        """That of the graphs of a stream; one that no graph holds any more is none."""
        return next((captured.pool for one, captured in self.items() if one.stream == stream), None)

    def add(self, series: Series, captured: Captured) -> None:
        """Puts it last, and drops the first where there are too many."""
        self[series] = captured
        self.move_to_end(series)
        if len(self) > MOST:
            self.popitem(last=False)


class Graphs:
    """The graphs of a link. They go with its buffers, whose addresses they hold, and share memory: between the replay
    of one and the copies of what it has found, no other is replayed on the same stream."""

    def __init__(self, link: Link, device: Device | None = None) -> None:
        self.link, self.device = link, device or Cuda()
        self._known: WeakKeyDictionary[Prepared, dict[Hashable, Series]] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        """A copy has captured nothing."""
        return Graphs(copy.deepcopy(self.link, memo), self.device)

    def refuse(self, call: Prepared, plan: Plan, options: Options) -> str | None:
        """Why calls of a kind run eagerly, empty where that needs no word; None where they can be captured.

        Raises:
            ValueError, NotImplementedError: ``Options.graphs`` is "on", and they cannot.
        """
        if options.graphs == "off":
            return ""
        why = self.device.refuse(call.kind.device, self.link.transport)
        if why is None and call.positional:
            why = NotImplementedError("a bias or dropout brings other numbers into every call")
        if why is not None and options.graphs == "on":
            raise type(why)(f"Options.graphs='on': {why}; with graphs='auto' such calls run without") from None
        if why is not None:
            return "" if isinstance(why, ValueError) else str(why)  # of another device
        if not any(call.program.forward):
            return "this rank has nothing to do"
        return self._slower(call, plan, options) if options.graphs == "auto" else None

    def _slower(self, call: Prepared, plan: Plan, options: Options) -> str | None:
        """What is said of calls whose device is so much slower than its host that a graph would gain nothing."""
        kind, dtype = call.kind, str(call.kind.dtype)
        known = hardware(self.device.name(kind.device))
        shape = Shape(kind.num_heads, kind.num_kv_heads, kind.head_dim, kind.v_head_dim, kind.batch, dtype)
        terms = Terms(known.topology, options.rates or known.rates, shape)
        host, device = host_and_device(plan, call.program.rank, call.program, terms)
        if device < SLOWER * host:
            return None
        return f"the device takes about {1e3 * device:.3g} ms for both passes, the host {1e3 * host:.3g} ms"

    def run(self, walk: Walk, must: bool) -> tuple[Found, bool]:
        """What a walk finds, and whether that is in a graph's memory, to be copied out before anything else is called.

        Raises ``NotImplementedError`` where it ``must`` be captured and cannot.
        """
        stream = self.device.stream(walk.call.kind.device)
        if stream is None:  # part of a graph of the user's own
            return walk(self.link), False
        layouts = tuple(None if x is None else (x.dtype, x.stride()) for x in walk.inputs)  # sinks have any dtype
        addresses = tuple(0 if x is None else x.data_ptr() for x in walk.inputs)
        known = self._known.setdefault(walk.call, {})
        series = known.get((walk.loop, stream, layouts))
        if series is None:
            known[walk.loop, stream, layouts] = Series(walk.loop.__name__, stream, addresses)
        captured = None if series is None else self._captured(series, walk, addresses, must)
        if captured is None:
            return walk(self.link), False
        captured.replay(walk.inputs, self.link)
        return captured.found, True

    def report(self, call: Prepared) -> list[str]:
        """What became of the calls of a kind so far, in words."""
        if call.eager is not None:
            return [f"eager: {call.eager}"] if call.eager else []
        return [str(series) for series in self._known.get(call, {}).values()]

    def _captured(self, series: Series, walk: Walk, addresses: tuple[int, ...], must: bool) -> Captured | None:
        if series.refused is not None:
            return None
        moved = series.follow(addresses)
        captured = None if moved else self._kept.get(series)
        if captured is None:
            try:
                captured = self._capture(series, walk)
            except Exception as error:
                text = f"it cannot be captured: {_culprit(error)}"
                if must:
                    raise NotImplementedError(
                        f"Options.graphs='on': attention {series.loop}: {text}; with graphs='auto' it runs without"
                    ) from error
                series.refused = text
                return None
            series.addresses, series.captures = addresses, series.captures + 1
        self._kept.add(series, captured)
        return captured

    def _capture(self, series: Series, walk: Walk) -> Captured:
        workspace = self.link.workspace
        walk.call.turns(workspace)  # what that allocates is no memory of a graph
        own = tuple(self._room(series, i, x) for i, x in enumerate(walk.inputs))
        read = tuple(given if mine is None else mine for given, mine in zip(walk.inputs, own, strict=True))
        pool = self._kept.pool(series.stream) or self.device.pool()
        recorder = Recorder(workspace, self.device, pool)
        with self.device.aside(walk.call.kind.device):
            found = recorder.capture(walk._replace(inputs=read))
        return Captured(recorder.steps, own, found, pool)

    def _room(self, series: Series, number: int, given: Tensor | None) -> Tensor | None:
        """Memory for an input that moves, laid out alike."""
        if given is None or number not in series.moving:
            return None
        memory, size, slot = self._kept.memory, given.numel(), f"input {number} on stream {series.stream}"
        memory.reserve(slot, size, given.dtype, given.device)
        flat = memory.view(slot, (size,), given.dtype, given.device)
        return flat.as_strided(given.shape, torch.empty_like(given, device="meta").stride())

    @property
    def _kept(self) -> _Kept:
        """What is captured now."""
        kept = self.link.workspace.views(self)
        if not isinstance(kept, _Kept):
            kept = _Kept()
            self.link.workspace.keep(self, kept)
        return kept


def _culprit(error: Exception) -> str:
    """What an error says, and the operation that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{text} (at `{frame.line}`, line {frame.lineno} of {Path(frame.filename).name})"
