"""The largest logit of a call: of this rank's queries by heads, and then of all ranks'."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ringattn.runtime.heads import Batch
from ringattn.runtime.link import Messages, Moved

NAME = "forward max_logit"  # as traffic and errors call its messages


def by_head(rows: Tensor) -> Tensor:
    """The largest of each head's rows ``[batch, heads, tokens]``, fp32 ``[batch, heads]``; -inf of no rows."""
    found = rows.amax(2) if rows.shape[2] else rows.new_full(rows.shape[:2], -math.inf)
    return found.float()


def of_all_ranks(link: Messages, own: Tensor, rank: int, world_size: int) -> Tensor:
    """The largest of what the ranks have found, on each of them.

    What a rank knows goes twice as far in every round, as in the dissemination barrier (Hensgen, Finkel and Manber
    1988): a maximum may count a rank more than once. So a rank sends and receives `ceil(log2(ranks))` times
    ``[batch, heads]`` in fp32.
    """
    found, away = own.contiguous(), 1
    while away < world_size:
        got = torch.empty_like(found)
        sends, recvs = [(found, (rank + away) % world_size)], [(got, (rank - away) % world_size)]
        pending = link.post(Batch(f"{NAME}, {away} ranks away", sends, recvs, [Moved.of(NAME, sends, recvs)]))
        if pending is not None:
            link.wait(pending)
        found, away = torch.maximum(found, got), 2 * away
    return found
