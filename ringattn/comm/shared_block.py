"""Blocks of memory that processes of one machine share: made by one of them, mapped by those that it gives a handle."""

from __future__ import annotations

import errno
import mmap
import os
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class SharedBlock(mmap.mmap):
    """A block made here. It lives as long as a tensor that lies in it, or a peer that maps it, whatever becomes of the
    processes."""

    handle: int | None = None  # until it is sealed

    @staticmethod
    def make(size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """A new block for so many numbers, which later calls can use that train. Raises OSError where there is no
        memory, or no file handle is left."""
        size *= dtype.itemsize
        handle = os.memfd_create("ringattn")  # freed with its last user
        try:
            os.ftruncate(handle, max(size, 1))
            block = SharedBlock(handle, 0)
        except OSError:
            os.close(handle)
            raise
        block.handle = handle
        with torch.inference_mode(False):
            memory = torch.frombuffer(block, dtype=torch.uint8)
            _blocks[memory.data_ptr()] = block
            return memory[:size].view(dtype)

    @staticmethod
    def of(tensor: Tensor) -> SharedBlock | None:
        """The block that a tensor lies in; None for any other memory."""
        return _blocks.get(tensor.untyped_storage().data_ptr())

    def seal(self) -> None:
        """No peer more will map it, so that its handle can be closed."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    def __del__(self) -> None:
        self.seal()


_blocks: WeakValueDictionary[int, SharedBlock] = WeakValueDictionary()  # by address


def map_block(handle: int) -> Tensor:
    """All of a block whose handle a peer has given, and which need not be kept. Raises OSError where it cannot be
    mapped."""
    size = os.fstat(handle).st_size
    try:
        with torch.inference_mode(False):
            return torch.from_file(f"/proc/self/fd/{handle}", shared=True, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        raise OSError(errno.ENOMEM, f"{size:,} bytes of a peer: {error}") from None
