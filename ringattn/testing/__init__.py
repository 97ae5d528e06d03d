"""For testing what is built on ringattn, and ringattn itself: ranks as processes, ranks without a world, and dense
attention to compare with. It needs nothing but torch and numpy.

* :func:`run_processes` calls a function on real processes, in one process group.
* :class:`PlanningRank` plans for a world that it cannot talk to; :class:`InstantRank` computes the whole program of
  one rank, with transfers that take no time; :class:`StagedRank` the same at a link's rate; :class:`SlowLinks` holds
  messages between real ranks back as a topology says.
* :func:`dense_attention` is the definition; :func:`dense_results` also its gradients.

:class:`ringattn.Loopback` runs the ranks of a world as threads of one process.
"""

from ringattn.comm import PlanningRank
from ringattn.testing.dense import Results, dense_attention, dense_results, results
from ringattn.testing.instant_rank import InstantRank
from ringattn.testing.processes import (
    ProcessDied,
    ProcessError,
    ProcessesLate,
    ProcessRaised,
    run_processes,
    share_gpus,
)
from ringattn.testing.slow_links import SlowLinks
from ringattn.testing.staged_rank import StagedRank

__all__ = [
    "InstantRank",
    "PlanningRank",
    "ProcessDied",
    "ProcessError",
    "ProcessRaised",
    "ProcessesLate",
    "Results",
    "SlowLinks",
    "StagedRank",
    "dense_attention",
    "dense_results",
    "results",
    "run_processes",
    "share_gpus",
]
