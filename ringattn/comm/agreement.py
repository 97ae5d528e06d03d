"""The agreement check: before the first byte of a new kind of call moves, the ranks compare what they are
about to do, so that a difference becomes an error on every rank and not a hang or a wrong result."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping

from ringattn.comm.calls import CallMismatch, PeerError
from ringattn.comm.subset import Subset
from ringattn.comm.transport import Voters, name_ranks

AGREED = json.dumps("agreed")
_SLICE = 0.2  # seconds between looks at what the other ranks say


def agree(transport: Voters, call: int | str, facts: Mapping[str, str], called: str = "") -> None:
    """Returns when all ranks have come to this call with the same facts; raises on all of them otherwise.

    Every rank posts its facts and counts itself on their digest. The rank that completes the count of a
    digest says that all agree; the last to come, if that has not happened, says who differs. That is a
    handful of store operations per rank while all is well, and the keys are gone afterwards.

    Args:
        transport: the ranks that have to agree.
        call: tells calls apart; every rank numbers its calls the same way and uses a number once.
        facts: what to compare, in words: shapes, dtypes, mask, layout, schedule, version.
        called: what errors call it, beside its number.

    Raises:
        CallMismatch: (a ValueError) some facts differ; names each with its values and the ranks that hold them.
        PeerError: some ranks did not come within the transport's deadline; names them.
        Exception: what a rank refuses or fails with in the meantime.
    """
    if transport.world_size == 1:
        return
    ballot = _Ballot(transport, call, facts, called)
    try:
        verdict = ballot.cast()
    except PeerError as error:
        if error.waited:
            error.args = (f"{error}; in {ballot.said}",)
        raise
    if verdict == AGREED:
        ballot.clear()
        return
    kind, text, apart = json.loads(verdict)
    raise CallMismatch(text, apart) if kind == "differ" else PeerError(text)


class _Ballot:
    """The store keys of one call, and the one verdict that is reached on it."""

    def __init__(self, transport: Voters, call: int | str, facts: Mapping[str, str], called: str) -> None:
        self.transport = transport
        self.said = f"call {call}, {called}" if called else f"call {call}"
        self.facts = json.dumps(dict(facts))
        prefix = f"agree/{call}"
        self.facts_keys = [f"{prefix}/facts/{rank}" for rank in range(transport.world_size)]
        self.alike = f"{prefix}/alike/{hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()}"
        self.here, self.decided, self.verdict, self.read = (
            f"{prefix}/{key}" for key in ("here", "decided", "verdict", "read")
        )

    def cast(self) -> str:
        """Takes part, and returns the verdict, which is the same on every rank."""
        transport = self.transport
        transport.board.publish(self.facts_keys[transport.rank], self.facts)
        if transport.board.count(self.alike) == transport.world_size:
            self._decide(lambda: AGREED)
        # Counted after the line above: if all are alike, that has been decided before the last one is here.
        if transport.board.count(self.here) == transport.world_size:
            self._decide(lambda: json.dumps(("differ", *self._differences())))
        return self._await_verdict()

    def clear(self) -> None:
        """Frees the keys of a call on which all agreed: nobody reads facts any more, and the last rank to
        have read the verdict frees what the ranks share."""
        self.transport.board.forget(self.facts_keys[self.transport.rank])
        if self.transport.board.count(self.read) == self.transport.world_size:
            for key in (self.alike, self.here, self.decided, self.verdict, self.read):
                self.transport.board.forget(key)

    def _decide(self, verdict: Callable[[], str]) -> None:
        """Only the first to decide does: no rank that gives up fails alone, no late one passes alone."""
        if self.transport.board.count(self.decided) == 1:
            self.transport.board.publish(self.verdict, verdict())

    def _await_verdict(self) -> str:
        transport = self.transport
        if not self._decided_in_time():
            self._decide(lambda: json.dumps(("missing", self._missing(), False)))
            transport.board.await_key(self.verdict, min(5.0, transport.timeout or 5.0))
        verdict = transport.board.lookup(self.verdict)
        if verdict is None:
            raise PeerError(
                f"{self.said}: the rank that was to say whether all ranks agree fell silent "
                f"(waited {transport.timeout} s)"
            )
        return verdict

    def _decided_in_time(self) -> bool:
        begun = time.monotonic()
        deadline = begun + self.transport.timeout
        warn_after = 0.0
        while not self.transport.board.await_key(self.verdict, min(max(deadline - time.monotonic(), 0.0), _SLICE)):
            waited = time.monotonic() - begun
            if waited > self.transport.timeout:
                return False
            if waited > warn_after:  # more than once, as gloo notices a death when it sends something
                self.transport.warn(self.transport.log.agreement(json.loads(self.facts)))
                warn_after = 2 * waited
            self.transport.heed()
        return True

    def _missing(self) -> str:
        absent = [rank for rank, key in enumerate(self.facts_keys) if self.transport.board.lookup(key) is None]
        late = self._named(absent) if absent else "the last rank"  # which came since
        if not self.transport.timeout:
            return f"{self.said}: {self._named([self.transport.rank])} was interrupted before {late} came"
        return (
            f"{self.said}: {late} of {self.transport.world_size} did not come within "
            f"{self.transport.timeout} s; every rank must make the same calls in the same order, and be alive"
            f"{self.transport.log.hint}"
        )

    def _named(self, ranks: list[int]) -> str:
        """As errors name them."""
        voters = self.transport
        return name_ranks([voters.members[rank] for rank in ranks] if isinstance(voters, Subset) else ranks)

    def _differences(self) -> tuple[str, bool]:
        """Who differs in what, and whether in the kind of call."""
        facts = [json.loads(self.transport.board.lookup(key) or "{}") for key in self.facts_keys]
        lines = [f"{self.said}: the ranks disagree; give every rank the same"]
        names = list(dict.fromkeys(name for of_rank in facts for name in of_rank))
        for name in names:
            holders: dict[str, list[int]] = {}
            for rank, of_rank in enumerate(facts):
                holders.setdefault(of_rank.get(name, "(absent)"), []).append(rank)
            if len(holders) > 1:
                values = "; ".join(f"{value} on {self._named(ranks)}" for value, ranks in holders.items())
                lines.append(f"  {name}: {values}")
        return "\n".join(lines), len({of_rank.get("call") for of_rank in facts}) > 1
