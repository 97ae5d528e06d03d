"""Courses: the calls that the same ranks make together, one after the other."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence

RECENT = 64  # calls whose texts are kept


class Course:
    """The calls of all ranks of a transport, or of some ``members``. ``made`` counts all of them, ``number`` those of
    the epoch, ``ballots`` its agreements; ``chain`` is the digest of the epoch's calls, and ``current`` the number of
    the call that this rank is in, begun or not. ``said``: which ranks, for texts about a call."""

    def __init__(self, members: Sequence[int] = (), said: str = "") -> None:
        digest = hashlib.blake2b(repr(tuple(members)).encode(), digest_size=8).digest()
        self.ident = int.from_bytes(digest, "little") if members else 0
        self.said = said
        self.made = 0
        self.restart()

    def restart(self) -> None:
        """Begins an epoch."""
        self.number = self.ballots = self.current = 0
        self.chain = self.ident  # calls of other ranks have other digests, even if they are alike
        self.recent: deque[tuple[int, str]] = deque(maxlen=RECENT)

    def begin(self, text: str, digest: bytes, labelled: bool) -> str:
        """Counts a call, whose ``digest`` is that of all that ranks must have alike; its text, which is kept where
        messages are not ``labelled`` with it."""
        self.number += 1
        self.made += 1
        self.fold(digest)
        if not labelled:
            self.recent.append((self.number, text))
        return text

    def fold(self, digest: bytes) -> None:
        """What ranks must have alike, from the next call on."""
        digest = hashlib.blake2b(self.chain.to_bytes(8, "little") + digest, digest_size=8).digest()
        self.chain = int.from_bytes(digest, "little")

    def passed(self, number: int, ballot: int) -> bool:
        """Whether this rank has gone past an agreement for which another waits, having begun so many calls."""
        return number < self.number and ballot > self.ballots
