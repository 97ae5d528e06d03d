"""What the ranks of a run tell each other beside the group's own messages, through the launcher's store: what each is
doing, that it is alive, why it ends. So a refusal on one rank is one on all of them, and whoever waits in vain can say
for whom, and what that rank was doing."""

import itertools
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from launch.stopping import StopSignal

BEAT = 0.5  # seconds between two signs of life
GRACE = 3.0  # without one, once something has failed: six beats
PATIENCE = 2 * GRACE  # without one, once the launcher wants this rank to stop
TIMEOUT = 300.0  # until the config says otherwise

LOST_CODE = 5  # exit code
REFUSED, FAILED, LOST, DONE = "refused", "failed", "lost", "done"


class LostRank(RuntimeError):
    """Another rank died, froze, or is not where this one is. The text names it and what it was doing."""


@dataclass(frozen=True, slots=True)
class Word:
    """The last word of a rank: how it ended (`refused`, `failed`, `lost` another, `done`), its exit code, and why."""

    kind: str
    code: int
    text: str


class Board:
    """One rank's view of the board. A thread gives signs of life; the rest happens in the caller's."""

    def __init__(self, store: dist.Store, rank: int, size: int, hosts: bool, stop: StopSignal | None = None) -> None:
        """`hosts`: whether rank 0 hosts the store, and not the launcher."""
        self.store, self.rank, self.size, self.hosts, self.stop = store, rank, size, hosts, stop
        self.timeout = TIMEOUT
        self.ending = threading.Lock()  # whoever takes it ends this process
        self._phase = "starting"
        self._calls = itertools.count()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._live, name="board", daemon=True)
        self.at("starting")
        self._thread.start()

    def at(self, phase: str) -> None:
        """Says what this rank does from now on. One message that nobody waits for."""
        self._phase = phase
        self._ask(lambda: self.store.set(f"phase/{self.rank}", phase))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank; anything that JSON can hold. All ranks call this equally
        often. Raises LostRank naming who has not come."""
        call = next(self._calls)
        self._ask(lambda: self.store.set(f"value/{call}/{self.rank}", json.dumps(value)))
        self._ask(lambda: self.store.add(f"come/{call}", 1))
        begin, pause = time.monotonic(), 0.005
        while self._ask(lambda: self.store.add(f"come/{call}", 0)) < self.size:
            self._look_for(call, begin)
            time.sleep(pause)
            pause = min(0.1, 1.5 * pause)
        values = self._ask(lambda: self.store.multi_get([f"value/{call}/{rank}" for rank in range(self.size)]))
        if call:  # whoever is here has read the values of the call before
            self._ask(lambda: self.store.delete_key(f"value/{call - 1}/{self.rank}"))
        return [json.loads(value) for value in values]

    def _look_for(self, call: int, begin: float) -> None:
        """Raises if a rank that has not come will not."""
        ended, waited = self.words(), time.monotonic() - begin
        asked = self.stop is not None and self.stop.number != 0
        if not ended and waited < (GRACE if asked else self.timeout):
            return
        silent: Collection[int] = () if ended.keys() & self._absent(call) else self.silent(GRACE)
        absent = self._absent(call)
        for rank in absent:
            if rank in ended:
                raise LostRank(_of_word(rank, ended[rank]))
        if absent.intersection(silent):
            raise LostRank(self._describe(sorted(absent.intersection(silent))))
        if absent and waited >= self.timeout:
            phases = self._phases()
            where = "; ".join(f"rank {rank} is at {phases[rank]!r}" for rank in sorted(absent))
            raise LostRank(f"{where}, and did not come to {self._phase!r} within {self.timeout} s")

    def _absent(self, call: int) -> set[int]:
        return {r for r in range(self.size) if not self._ask(lambda r=r: self.store.check([f"value/{call}/{r}"]))}

    def silent(self, seconds: float) -> list[int]:
        """The ranks that give no sign of life for so long from now on, and have not said that they end."""
        first, begin = self._beats(), time.monotonic()
        waiting = {rank for rank in range(self.size) if rank != self.rank}
        while waiting and time.monotonic() - begin < seconds:
            time.sleep(BEAT / 2)
            now = self._beats()
            waiting = {rank for rank in waiting if now[rank] == first[rank]} - self.words().keys()
        return sorted(waiting)

    def words(self) -> dict[int, Word]:
        """The last words of other ranks."""
        if not self._ask(lambda: self.store.add("words", 0)):
            return {}
        keys = {rank: f"word/{rank}" for rank in range(self.size) if rank != self.rank}
        there = {rank: key for rank, key in keys.items() if self._ask(lambda key=key: self.store.check([key]))}
        return {rank: Word(*json.loads(self._ask(lambda key=key: self.store.get(key)))) for rank, key in there.items()}

    def end(self, kind: str, code: int, text: str) -> None:
        """This rank's last word."""
        self._closed.set()
        try:
            self.store.set(f"word/{self.rank}", json.dumps([kind, code, text]))
            self.store.add("words", 1)
        except RuntimeError:  # nobody is left to hear it
            return

    def await_words(self, seconds: float) -> bool:
        """Waits, for so long at most, until all others have said that they end; whether they have."""
        begin, here = time.monotonic(), 0
        with suppress(RuntimeError):  # the store may be gone
            while (here := len(self.words())) < self.size - 1 and time.monotonic() - begin < seconds:
                time.sleep(0.05)
        return here == self.size - 1

    def explain(self, error: BaseException) -> Word | None:
        """Whose fault it is that this rank failed with `error`: another's refusal or failure, or a rank that is dead,
        frozen or elsewhere. None: its own."""
        try:
            ended = self._ended((REFUSED, FAILED))
            if ended or isinstance(error, LostRank):
                return ended or Word(LOST, LOST_CODE, str(error))
            silent = self.silent(GRACE)
            if self._ended((REFUSED, FAILED)) or not silent:
                return self._ended((REFUSED, FAILED, LOST, DONE)) or self._elsewhere(error)
            return Word(LOST, LOST_CODE, self._describe(silent))
        except LostRank as gone:  # the store itself
            return Word(LOST, LOST_CODE, str(gone))

    def _ended(self, kinds: Sequence[str]) -> Word | None:
        """The first of other ranks' last words of such kinds, as this rank's."""
        for kind in kinds:
            for rank, word in self.words().items():
                if word.kind == kind:
                    code = word.code if kind == REFUSED else LOST_CODE
                    return Word(REFUSED if kind == REFUSED else LOST, code, _of_word(rank, word))
        return None

    def _elsewhere(self, error: BaseException) -> Word | None:
        """All ranks live: where this one has waited too long, others may be elsewhere."""
        if not re.search(r"tim(ed|e) ?out|within [0-9.]+ s", str(error), re.IGNORECASE):
            return None
        others = [f"rank {rank} is at {phase!r}" for rank, phase in self._phases().items() if phase != self._phase]
        text = f"{'; '.join(others) or 'all ranks are here'}; waited in vain at {self._phase!r}: {_line(error)}"
        return Word(LOST, LOST_CODE, text)

    def _describe(self, silent: Collection[int]) -> str:
        phases = self._phases()
        return "; ".join(
            f"rank {rank} is dead or frozen: it gives no sign of life, the last was at {phases[rank]!r}"
            for rank in silent
        )

    def _phases(self) -> dict[int, str]:
        keys = [f"phase/{rank}" for rank in range(self.size)]
        there = [key if self._ask(lambda key=key: self.store.check([key])) else None for key in keys]
        return {
            rank: self._ask(lambda key=key: self.store.get(key)).decode() if key else "before the start"
            for rank, key in enumerate(there)
        }

    def _beats(self) -> list[int]:
        return [self._ask(lambda rank=rank: self.store.add(f"beat/{rank}", 0)) for rank in range(self.size)]

    def _live(self) -> None:
        watching = False
        try:
            while not self._closed.is_set():
                self.store.add(f"beat/{self.rank}", 1)
                if self.stop is None:
                    self._closed.wait(BEAT)
                elif self.stop.wait(BEAT) and not watching:
                    watching = True
                    threading.Thread(target=self._watch, name="board watch", daemon=True).start()
        except RuntimeError:  # the store is gone, and the main thread will find that out
            return

    def _watch(self) -> None:
        """Once the launcher has asked this rank to stop, and another gives no sign of life, its main thread may never
        come back from what it waits for: then the line is said, and the process ended, from here."""
        try:
            while not self._closed.is_set():
                silent = self.silent(PATIENCE)
                ended = self._ended((REFUSED, FAILED))
                if (silent or ended) and not self._closed.is_set():
                    end_lost(self, ended.text if ended else self._describe(silent))
        except LostRank as gone:
            end_lost(self, str(gone))

    def _ask(self, question: Any) -> Any:
        try:
            return question()
        except RuntimeError as error:
            host = "rank 0, which hosts the store," if self.hosts else "the launcher, which hosts the store,"
            raise LostRank(f"{host} does not answer: it has died, or cannot be reached ({_line(error)})") from None


def end_lost(board: Board, text: str) -> None:
    """Ends this process at once, with its line: nothing that waits for a lost rank can be closed in order."""
    board.ending.acquire()  # never given back: one line, whichever thread comes first
    remedy = "see its own output, then go on with --resume and the run's directory"
    line = f"error: rank {board.rank}: {text}; {remedy}\n"
    os.write(2, line.encode())
    board.end(LOST, LOST_CODE, text)
    os._exit(LOST_CODE)


def _of_word(rank: int, word: Word) -> str:
    how = {REFUSED: "", FAILED: " failed", LOST: " has left, having lost another", DONE: " has left"}[word.kind]
    return f"rank {rank}{how}: {word.text}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def connect(stop: StopSignal | None) -> Board:
    """The board of the processes that torchrun has started. A restarted attempt has keys of its own, because the
    launcher's store outlives attempts and holds the addresses of dead ranks."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    by_launcher = _outlives_attempts()
    store = new_store(host=rank == 0 and not by_launcher)
    return Board(dist.PrefixStore("board", store), rank, size, hosts=not by_launcher, stop=stop)


@dataclass(frozen=True, slots=True)
class Attempt:
    """Which `launch` of the launcher a process belongs to, and how often it has begun this job anew."""

    launch: str = ""
    restarts: int = 0


ALONE = Attempt()


def find_attempt() -> Attempt:
    """This process's, for all that it can tell alone. The name of the launch is drawn by the first process that asks,
    where the launcher's store outlives attempts; else it is the launcher's own, which others may have too."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if _outlives_attempts():
        drawn = _launchers_store(False, TIMEOUT).compare_set("ringattn/launch", "", uuid.uuid4().hex)
        name = f"{name} {drawn.decode()}"
    return Attempt(name, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))


def new_store(host: bool = False, timeout: float = TIMEOUT) -> dist.Store:
    """A connection to the store of this attempt. Each holds up its callers one by one."""
    store = _launchers_store(host, timeout)
    # a store of its own is made for each attempt, and agents of several machines count attempts each for itself
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return dist.PrefixStore(attempt, store) if _outlives_attempts() else store


def _outlives_attempts() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _launchers_store(host: bool, timeout: float) -> dist.Store:
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_master=host,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        multi_tenant=True,
    )
