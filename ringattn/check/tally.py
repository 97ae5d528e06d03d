"""What ranks answer, told beside their group's messages, so that it is heard where these fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PATIENCE = 3  # deadlines for which others wait for rank 0: that of its own call, that of its answers, and one more
PARTING = timedelta(seconds=10)  # that rank 0, which may host the store, waits for others to have read its last word


class RankLost(RuntimeError):
    """Rank 0 gives no answer; the text says so."""


class Tally:
    """The answers of ``size`` ranks, through a store that all of them reach: each leaves its own there, rank 0 judges
    them, and all hear the judgement. Rank 0 alone reads as many answers as there are ranks.

    Answers and judgements are what JSON can hold.
    """

    def __init__(self, store: dist.Store | None, rank: int, size: int, timeout: float) -> None:
        """``store``: None for one rank alone. ``timeout``: seconds for which rank 0 waits for another's answer."""
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self._number, self._lost = 0, set[int]()

    def settle(self, answer: Any, judge: Callable[[list[Any]], Any]) -> Any:
        """What ``judge`` makes, on rank 0, of the answers by rank, None for those that did not come in time.

        Raises :class:`RankLost` where rank 0 does not come.
        """
        self._number += 1
        if self.store is None:
            return judge([answer])
        key = f"answer {self._number}"
        try:
            self.store.set(f"{key} of {self.rank}", json.dumps(answer))
            if self.rank:
                self.store.wait([f"{key} judged"], PATIENCE * timedelta(seconds=self.timeout))
                return json.loads(self.store.get(f"{key} judged"))
        except RuntimeError:  # torch's, of a store that is gone, or a wait that was too long
            raise RankLost(f"rank {self.rank}: rank 0 gives no answer: it has died, or hangs") from None
        answers = self._answers([f"{key} of {rank}" for rank in range(self.size)])
        self._lost |= {rank for rank, answer in enumerate(answers) if answer is None}
        judgement = judge(answers)
        self.store.set(f"{key} judged", json.dumps(judgement))
        return judgement

    def _answers(self, keys: list[str]) -> list[Any]:
        assert self.store is not None
        try:
            self.store.wait(keys, timedelta(seconds=self.timeout))
        except RuntimeError:
            return [json.loads(self.store.get(key)) if self.store.check([key]) else None for key in keys]
        return [json.loads(answer) for answer in self.store.multi_get(keys)]

    def close(self, last: Any) -> Any:
        """Rank 0's last word, on all ranks; it stays until the others have heard it."""
        if self.store is None:
            return last
        heard = [f"heard by {rank}" for rank in range(1, self.size) if rank not in self._lost]
        try:
            if self.rank:
                self.store.wait(["last word"], PATIENCE * timedelta(seconds=self.timeout))
                last = json.loads(self.store.get("last word"))
                self.store.set(f"heard by {self.rank}", "")
            else:
                self.store.set("last word", json.dumps(last))
                if heard:
                    self.store.wait(heard, PARTING)
        except RuntimeError:  # whoever is lost has been named, or ends with its launcher
            pass
        return last
