"""What autograd holds between forward and backward, put away: in a GPU's host, or in files of a directory.

Done by `torch.autograd.graph.saved_tensors_hooks`, so whatever is saved may go: attention's q, k, v, out and lse, the
inputs of checkpointed or tiled layers. A tensor is stored once, however many operations save it.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol
from weakref import ReferenceType, WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ringattn.arguments.values import path, shown

Where = bool | str
LEAST = 1 << 16  # bytes below which a tensor stays where it is
PART = 1 << 26  # bytes of a file that are written, and then dropped from the page cache, at a time
AHEAD = 8  # tensors that are fetched before backward asks for them: about a layer's


class Held(Protocol):
    """A tensor that was put away."""

    def fetch(self) -> None:
        """Begins to bring it back, where that takes the host no time."""

    def take(self) -> Tensor:
        """It, where it was before, in the same bits and the same order of strides."""


def where_of(name: str, value: Any) -> Where:
    """A checked `offload`: False, True (to the host of a GPU), or an existing directory. Raises `ValueError`."""
    if isinstance(value, bool):
        return value
    try:
        directory = path(name, value)
    except ValueError:
        raise ValueError(f"{name}={shown(value)}: must be False, True, or the path of a directory") from None
    if not (os.path.isdir(directory) and os.access(directory, os.W_OK | os.X_OK)):
        raise ValueError(f"{name}={shown(directory)}: must be a directory that this process may write to; make it")
    return directory


def check_device(where: Where, device: torch.device) -> None:
    """Raises `ValueError` where there is nowhere for a tensor of this device to go."""
    if where is True and device.type != "cuda":
        raise ValueError(
            f"offload=True is from a CUDA device to its host, and this tensor is on {device.type}: pass a directory, "
            "such as offload='/scratch'"
        )


def offloaded(where: Where | os.PathLike[str] = True) -> AbstractContextManager[None]:
    """What autograd saves in this block is put away until backward asks for it.

    with ringattn.offloaded("/scratch"):
        loss = model(tokens)
    loss.backward()

    Stay where they are: parameters and other leaves, views of them, tensors below 64 KiB, those whose elements share
    memory, conjugates that were not computed, tensor subclasses, and what a block inside has hooks of its own for (a
    checkpointed layer is computed again; its input is put away). A saved tensor that is changed in place is back as it
    was saved, where PyTorch would raise.

    Args:
        where: True: pinned host memory, behind the work of the GPU, and back before backward gets there (written
            for CUDA, not yet run on a GPU). A directory: files that have no name there, so that nothing is left
            of them, whatever ends the process; the caller waits for them. False: nothing is done.

    Raises:
        ValueError: another ``where``; or, when a tensor is saved, True with one that is not on a CUDA device.
        OSError: when a tensor is saved, a directory that has no room for it.
    """
    checked = where_of("where", where)
    return nullcontext() if checked is False else Shelf(checked).open()


def saving(shelf: Shelf | None, x: Any) -> AbstractContextManager[Any]:
    """Around a call of our own with ``Options.offload`` that is given ``x``. Nothing where other hooks have the say:
    those of checkpointing, or of a whole block.

    Raises `ValueError` where there is nowhere for tensors like ``x`` to go.
    """
    if shelf is None:
        return nullcontext()
    if isinstance(x, Tensor):
        check_device(shelf.where, x.device)
    return nullcontext() if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None else shelf.open()


def refuse_graph(shelf: Shelf | None) -> None:
    """Raises `NotImplementedError` for a call with ``Options.offload`` in a graph that is traced."""
    if shelf is not None:
        raise NotImplementedError(
            f"Options.offload={shown(shelf.where)} in a compiled graph, which saves for itself: leave the option out, "
            "and run the compiled function within ringattn.offloaded()"
        )


class Entry:
    """A tensor that was put away, and which was before it: that one backward will ask for next."""

    def __init__(self, held: Held, before: Entry | None) -> None:
        self.held, self.before = held, None if before is None else weakref.ref(before)
        self.back: ReferenceType[Tensor] | None = None

    def take(self) -> Tensor:
        """It, once for all who ask while somebody has it."""
        found = None if self.back is None else self.back()
        if found is None:
            found = self.held.take()
            self.back = weakref.ref(found)
            self._fetch_those_before()
        return found

    def _fetch_those_before(self) -> None:
        entry: Entry | None = self
        for _ in range(AHEAD):
            entry = None if entry is None or entry.before is None else entry.before()
            if entry is None:
                return
            entry.held.fetch()


class Shelf:
    """Where tensors are put away, in the order in which they come."""

    def __init__(self, where: Where) -> None:
        self.where = where
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last: ReferenceType[Entry] | None = None
        self._known: WeakKeyDictionary[torch.UntypedStorage, dict[Any, ReferenceType[Entry]]] = WeakKeyDictionary()

    def open(self) -> AbstractContextManager[Any]:
        """Around what saves the tensors."""
        return saved_tensors_hooks(self.put, taken)

    def put(self, x: Tensor) -> Tensor | Entry:
        """What autograd is to keep in its place."""
        if stays(x) or torch._C._current_graph_task_id() != -1:  # the latter: backward itself wants it, at once
            return x if x.is_leaf else x.detach()  # whose graph would otherwise hold itself
        check_device(self.where, x.device)
        of_storage = self._known.setdefault(x.untyped_storage(), {})
        key = x.storage_offset(), x.shape, x.stride(), x.dtype, x._version
        known = of_storage.get(key)
        entry = None if known is None else known()
        if entry is None:
            held = PinnedCopy(x, self._stream(x.device)) if self.where is True else File(x, str(self.where))
            entry = Entry(held, None if self._last is None else self._last())
            of_storage[key] = self._last = weakref.ref(entry)
        return entry

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def taken(kept: Tensor | Entry) -> Tensor:
    """A saved tensor, wherever it is."""
    return kept if isinstance(kept, Tensor) else kept.take()


def stays(x: Tensor) -> bool:
    """Whether putting a tensor away would save nothing, or is not for us to do."""
    if type(x) is not Tensor or x.layout != torch.strided or x.nbytes < LEAST:
        return True
    if x.is_conj() or x.is_neg():  # another tensor's bits, to be read as their conjugates or negatives
        return True
    base = x._base if x._is_view() else x
    if isinstance(base, nn.Parameter) or (base is not None and base.is_leaf and base.requires_grad):
        return True
    return any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))


class File:
    """A tensor's bytes in a file without a name, which ends with this object."""

    def __init__(self, x: Tensor, directory: str) -> None:
        self.like, self.device = torch.empty_like(x, device="meta"), x.device
        dense = x.device.type == "cpu" and x.stride() == self.like.stride()
        data = _bytes(x.detach() if dense else torch.empty_like(self.like, device="cpu").copy_(x))
        try:
            self.file: Any = tempfile.TemporaryFile(dir=directory, buffering=0)
            weakref.finalize(self, self.file.close)
            self._write(data)
        except OSError as error:
            raise OSError(
                error.errno,
                f"offload to {shown(directory)}: {x.nbytes:,} bytes of {tuple(x.shape)} {x.dtype} could not be written "
                f"({error.strerror}): name a directory with room for all that backward needs, or, with too many files "
                "open, raise ulimit -n",
            ) from error

    def _write(self, data: memoryview) -> None:
        """And drops from the page cache what the disk has, or the file would only be another place in memory."""
        number = self.file.fileno()
        for start in range(0, len(data), PART):
            part = data[start : start + PART]
            while part:
                part = part[self.file.write(part) :]
            os.fdatasync(number)
            os.posix_fadvise(number, start, PART, os.POSIX_FADV_DONTNEED)

    def fetch(self) -> None:
        """Reading takes the host's time."""

    def take(self) -> Tensor:
        found = torch.empty_like(self.like, device="cpu")
        left, at = _bytes(found), 0
        while left:
            size = os.preadv(self.file.fileno(), [left[:PART]], at)
            if not size:
                raise OSError(f"offload: a file ends after {at:,} bytes of {found.nbytes:,}: it was cut from outside")
            os.posix_fadvise(self.file.fileno(), at, size, os.POSIX_FADV_DONTNEED)
            left, at = left[size:], at + size
        return found.to(self.device)


def _bytes(x: Tensor) -> memoryview:
    """Those of a tensor of the host without gaps, in the order of memory."""
    return memoryview(x.as_strided((x.numel(),), (1,)).view(torch.uint8).numpy().data)


class PinnedCopy:
    """A CUDA tensor's copy in pinned memory of the host, made and brought back on a stream of its own: neither makes
    the stream that computes wait. Not yet run on a GPU."""

    def __init__(self, x: Tensor, copies: torch.cuda.Stream) -> None:
        self.device, self.copies = x.device, copies
        self.back: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        self.host = torch.empty_like(x, device="cpu", pin_memory=True)
        copies.wait_stream(torch.cuda.current_stream(x.device))  # which computes x
        with torch.cuda.stream(copies):
            self.host.copy_(x.detach(), non_blocking=True)
        x.record_stream(copies)  # freed meanwhile, its memory is not handed on before it is copied

    def fetch(self) -> None:
        if self.back is not None:
            return
        # memory of the stream that will use it, which may still be at work on what was there before
        self.back = torch.empty_like(self.host, device=self.device, pin_memory=False)
        self.copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copies):
            self.back.copy_(self.host, non_blocking=True)
            self.arrived = self.copies.record_event()
        self.back.record_stream(self.copies)  # dropped unused, it is not handed on while the copy writes to it

    def take(self) -> Tensor:
        self.fetch()
        assert self.back is not None and self.arrived is not None
        torch.cuda.current_stream(self.device).wait_event(self.arrived)
        found, self.back, self.arrived = self.back, None, None
        return found
