"""Profiles: where the seconds of calls went, turn by turn, as numbers, as a table and as a Chrome trace."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ringattn.geometry.spans import Ints
from ringattn.planning import program as planned

COPIES, POST, COMPUTE, WAIT, ADDS = PHASES = ("copies", "post", "compute", "wait", "adds")
LANES = {COMPUTE: 1, WAIT: 2, COPIES: 3, POST: 3, ADDS: 3}  # of a trace
CALLS, MESSAGES = 0, 4  # two more
MOST_SPANS = 8  # that a trace writes out
COLUMNS = ("", "times", "copies + adds", "post", "compute", "wait", "transfer <=", "sent", "received")


class Stretch(NamedTuple):
    """Time in which a rank did one thing, in nanoseconds since 1970."""

    phase: str
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """One piece of a call: a turn of its program, an all-to-all, its begin or its end. ``sent`` and ``received`` are
    bytes; ``turn`` is what the program says, None of a piece that is no turn. All else are seconds of this rank."""

    name: str
    stretches: Sequence[Stretch]
    sent: int
    received: int
    turn: planned.Turn | None = None

    def spent(self, *phases: str) -> float:
        """In these phases together."""
        return sum(s.stop - s.start for s in self.stretches if s.phase in phases) / 1e9

    @property
    def seconds(self) -> float:
        return self.spent(*PHASES)

    @property
    def copies(self) -> float:
        """Rows laid into messages and buffers."""
        return self.spent(COPIES)

    @property
    def post(self) -> float:
        """Messages started."""
        return self.spent(POST)

    @property
    def compute(self) -> float:
        """Kernel calls, and zeros for what they add to."""
        return self.spent(COMPUTE)

    @property
    def wait(self) -> float:
        """Exposed wait: nothing left to do until messages, or the other ranks, have come."""
        return self.spent(WAIT)

    @property
    def adds(self) -> float:
        """What came added or merged."""
        return self.spent(ADDS)

    @property
    def flight(self) -> tuple[int, int]:
        """From where messages were posted to where they were there, in nanoseconds since 1970: they may have been there
        sooner. Two equal numbers where nothing moved."""
        if not (self.sent or self.received):
            return 0, 0
        start = next((s.start for s in self.stretches if s.phase in (POST, WAIT)), 0)
        return start, next((s.stop for s in reversed(self.stretches) if s.phase == WAIT), start)

    @property
    def transfer(self) -> float:
        """What the messages took at most; of that, ``wait`` was not hidden."""
        start, stop = self.flight
        return (stop - start) / 1e9


@dataclass(frozen=True)
class ProfiledCall:
    """One call on this rank: ``attention forward``, ``attention backward``, ``unshard``, ``roll``, or the backward of
    one of these. ``facts``: what the ranks compare of it (mask, lengths, schedule, kernel, shapes). ``start`` and
    ``stop``: nanoseconds since 1970."""

    name: str
    facts: Mapping[str, str]
    start: int
    stop: int
    pieces: Sequence[Piece]

    @property
    def seconds(self) -> float:
        """From begin to end, what lies between pieces included."""
        return (self.stop - self.start) / 1e9

    @property
    def wait(self) -> float:
        """Seconds of exposed wait."""
        return sum(piece.wait for piece in self.pieces)

    @property
    def between(self) -> float:
        """Seconds of no piece: results made, inputs and results brought into form."""
        return max(self.seconds - sum(piece.seconds for piece in self.pieces), 0.0)

    @property
    def turns(self) -> list[Piece]:
        """The pieces that are turns of the program; where heads go by chunks, those of one chunk after the other."""
        return [piece for piece in self.pieces if piece.turn is not None]

    @property
    def kind(self) -> str:
        """What calls are summed up under in a table."""
        facts = (self.facts.get(name) for name in ("mask", "lengths", "schedule"))
        return ", ".join([self.name, *(fact for fact in facts if fact is not None)])


class Profile:
    """What ``cp.profile()`` gives: this rank's calls, once its ``with`` has ended."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._calls: tuple[ProfiledCall, ...] | None = None

    def close(self, calls: Iterable[ProfiledCall]) -> None:
        """Takes the calls, in their order."""
        self._calls = tuple(calls)

    @property
    def calls(self) -> tuple[ProfiledCall, ...]:
        """The calls that have ended, in their order. Raises ``RuntimeError`` inside of the ``with``."""
        if self._calls is None:
            raise RuntimeError("this profile is still open: read it after its `with`, when all clocks have been read")
        return self._calls

    @property
    def seconds(self) -> float:
        """Seconds inside of calls."""
        return sum(call.seconds for call in self.calls)

    @property
    def exposed(self) -> float:
        """The part of the seconds inside of calls in which this rank waited; 0.0 without a call. All waiting counts:
        for the messages of a turn or an all-to-all, for the other ranks at the end of a call, and to begin it."""
        return sum(call.wait for call in self.calls) / (self.seconds or 1.0)

    def table(self) -> str:
        """Printable text: for each kind of call its pieces, with medians over its calls. A step that is made several
        times in a call (heads by chunks) counts as often."""
        kinds: dict[str, list[ProfiledCall]] = {}
        for call in self.calls:
            kinds.setdefault(call.kind, []).append(call)
        count, part = len(self.calls), f"{100 * self.exposed:.1f} %"
        lines = [f"rank {self.rank}: exposed wait {part} of {_ms(self.seconds)} in {count} calls"]
        for kind, calls in kinds.items():
            lines += ["", *_about(kind, calls), *_columns([COLUMNS, *_rows(calls)])]
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Writes a Chrome trace, for chrome://tracing and Perfetto, and says where: ``trace.json`` is written as
        ``trace.rank0.json`` by rank 0, so that ranks may share a folder. Times are of one clock on one machine, so its
        ranks' files can be looked at together. Lanes: the calls, compute, wait, copies (with posts and adds), and
        messages on their way."""
        path = Path(path)
        path = path.with_name(f"{path.stem}.rank{self.rank}{path.suffix}")
        path.write_text(json.dumps({"traceEvents": self._events(), "displayTimeUnit": "ms"}) + "\n")
        return path

    def _events(self) -> list[dict[str, Any]]:
        names = {CALLS: "calls", 1: COMPUTE, 2: WAIT, 3: COPIES, MESSAGES: "messages"}
        events = [_named(self.rank, 0, "process_name", f"rank {self.rank}")]
        events += [_named(self.rank, lane, "thread_name", name) for lane, name in names.items()]
        for call in self.calls:
            events.append(_event(self.rank, CALLS, call.name, "call", (call.start, call.stop), dict(call.facts)))
            for piece in call.pieces:
                args, flight = _args(piece), (MESSAGES, "transfer", *piece.flight)
                spent = [(LANES[phase], phase, start, stop) for phase, start, stop in piece.stretches]
                events += [
                    _event(self.rank, lane, piece.name, what, times, args)
                    for lane, what, *times in (*spent, flight)
                    if times[0] < times[1]
                ]
        return events


# -- the table ----------------------------------------------------------------------------------


def _about(kind: str, calls: Sequence[ProfiledCall]) -> list[str]:
    wait = 100 * sum(call.wait for call in calls) / (sum(call.seconds for call in calls) or 1.0)
    middle, rest = (
        statistics.median(figures) for figures in zip(*((c.seconds, c.between) for c in calls), strict=True)
    )
    return [kind, f"{len(calls)} of {_ms(middle)} (median), of which {_ms(rest)} between; exposed wait {wait:.1f} %"]


def _rows(calls: Sequence[ProfiledCall]) -> list[tuple[str, ...]]:
    """A row for each name of a piece."""
    pieces: dict[str, list[Piece]] = {}
    for call in calls:
        for piece in call.pieces:
            pieces.setdefault(piece.name, []).append(piece)
    return [
        (
            name,
            *_figures([(p.copies + p.adds, p.post, p.compute, p.wait, p.transfer, p.sent, p.received) for p in some]),
        )
        for name, some in pieces.items()
    ]


def _figures(pieces: Sequence[tuple[float, ...]]) -> list[str]:
    """How many there are, and the medians of their figures, the last two in bytes."""
    middle = [statistics.median_low(figures) for figures in zip(*pieces, strict=True)]
    return [str(len(pieces)), *map(_ms, middle[:-2]), *(f"{figure:,}" for figure in middle[-2:])]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3f} ms"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Names to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "    " + "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]).rstrip() for row in rows
    ]


# -- the trace ----------------------------------------------------------------------------------


def _named(rank: int, lane: int, what: str, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": rank, "tid": lane, "name": what, "args": {"name": name}}


def _event(
    rank: int, lane: int, name: str, category: str, times: Sequence[int], args: Mapping[str, Any]
) -> dict[str, Any]:
    """In whole microseconds, as JSON's numbers have no more figures since 1970."""
    start, stop = (time // 1000 for time in times)
    return {
        "ph": "X", "pid": rank, "tid": lane, "name": name, "cat": category, "ts": start, "dur": stop - start,
        "args": args,
    }  # fmt: skip


def _args(piece: Piece) -> dict[str, Any]:
    args: dict[str, Any] = {"sent bytes": piece.sent, "received bytes": piece.received}
    if piece.turn is not None:
        works = [w for w in piece.turn.work if w.launches]
        args["kernel calls"] = len(piece.turn.launches)
        args["keys"] = "; ".join(_spans(work.k_frame.spans) for work in works)
    return args


def _spans(spans: Ints) -> str:
    """Global positions, as slices are written."""
    texts = [f"{at}:{at + (n - 1) * step + 1}" + (f":{step}" if step > 1 else "") for at, n, step in spans.tolist()]
    return ", ".join(texts[:MOST_SPANS]) + (f" and {len(texts) - MOST_SPANS} more" if len(texts) > MOST_SPANS else "")
