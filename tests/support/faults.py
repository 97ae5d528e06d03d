"""Faults at a rank's messages: an exception of the test's own at any batch or wait."""

from typing import Any


class Injected(Exception):
    """What a test makes a rank raise."""


class Faults:
    """Counts a rank's batches and waits, and raises at one of them."""

    def __init__(self, transport: Any) -> None:
        self.at: int | None = None
        self.seen = 0
        post = transport.post

        def faulty_post(sends: Any, recvs: Any, what: str) -> Any:
            self.step()
            pending = post(sends, recvs, what)
            self.step()
            return FaultyPending(pending, self)

        transport.post = faulty_post

    def arm(self, at: int | None) -> None:
        self.at, self.seen = at, 0

    def step(self) -> None:
        self.seen += 1
        if self.at == self.seen:
            raise Injected(f"at {self.at}")


class FaultyPending:
    def __init__(self, pending: Any, faults: Faults) -> None:
        self.pending, self.faults = pending, faults

    def wait(self) -> None:
        self.faults.step()
        self.pending.wait()
