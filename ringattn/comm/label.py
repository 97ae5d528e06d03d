"""Labels: what every message says about itself, so that it never fills the tensor of another call."""

from __future__ import annotations

import struct
import zlib
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

LABEL_BYTES = 2048  # a label with its text


class Kind(IntEnum):
    """What a label is about: tensors, or nothing but itself: that its rank has raised its text, or that it waits in
    its epoch's agreement number ``chain``, having begun ``number`` calls."""

    TENSORS = 0
    FAILURE = 1
    AGREEMENT = 2


class Label(NamedTuple):
    """What a message says about itself: the epoch, course and number of its call, the digest of that call and those
    before it, and the batch within the call."""

    epoch: int
    course: int
    number: int
    chain: int
    mark: int
    rank: int
    kind: Kind
    text: str

    def pack(self) -> bytes:
        """At most `LABEL_BYTES`; a longer text is cut."""
        numbers = _NUMBERS.pack(*self[:-1])
        return numbers + self.text.encode(errors="replace")[: LABEL_BYTES - len(numbers)]

    @classmethod
    def unpack(cls, packed: bytes) -> Label:
        """What `pack` has packed, zeros behind it allowed."""
        text = packed[_NUMBERS.size :].rstrip(b"\0").decode(errors="ignore")
        epoch, course, number, chain, batch, rank, kind = _NUMBERS.unpack_from(packed)
        return cls(epoch, course, number, chain, batch, rank, Kind(kind), text)

    @property
    def call(self) -> str:
        """The kind of its call."""
        return self.text.split("; ")[0].partition(" of ")[2]

    def fits(self, other: Label) -> bool:
        """Whether the two ends of a transfer belong together."""
        return self[:5] == other[:5]

    def rivals(self, other: Label) -> bool:
        """Whether the two are of different calls, where ranks of one course should be at the same."""
        return self[:3] == other[:3] and self.chain != other.chain


_NUMBERS = struct.Struct("<qQqQIiB")


@lru_cache(maxsize=1024)
def mark(what: str) -> int:
    """A number that stands for the name of a batch."""
    return zlib.crc32(what.encode())
