"""Functions on real processes: results by rank, a failure or a death told at once and by name, nothing left behind."""

import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

from ringattn.testing import ProcessDied, ProcessError, ProcessesLate, ProcessRaised, run_processes


def sum_of_ranks(rank: int, world_size: int, x: torch.Tensor) -> tuple[int, torch.Tensor, float]:
    assert torch.get_num_threads() == 1 and torch.initial_seed() == 0
    x = x + rank
    dist.all_reduce(x)
    return os.getpid(), x, float(torch.rand(()))


@pytest.mark.parametrize("world", [1, 3])
def test_results_come_by_rank_from_processes_of_one_group(world: int) -> None:
    x = torch.arange(3.0)
    ranks = run_processes(sum_of_ranks, world, x)
    assert len({process for process, *_ in ranks} - {os.getpid()}) == world
    for _, total, draw in ranks:
        assert torch.equal(total, world * x + sum(range(world))) and draw == ranks[0][2]


def fail_on_rank_one(rank: int, world_size: int, text: str) -> None:
    if rank == 1:
        raise LookupError(text)
    dist.barrier()


def hang(rank: int, world_size: int) -> None:
    time.sleep(60 * rank)


def die(rank: int, world_size: int) -> int:
    """One rank dies, once all have connected."""
    store = dist.distributed_c10d._get_default_store()
    connected = store.add("connected", 1)
    while rank == 1 and connected < world_size:
        time.sleep(0.01)
        connected = store.add("connected", 0)
    if rank == 1:
        os._exit(5)
    return rank


def test_the_harness_reports_the_first_traceback_and_never_hangs() -> None:
    with pytest.raises(ProcessRaised, match=r"(?s)rank 1 of 2: LookupError: here at .*in fail_on_rank_one.*Traceback"):
        run_processes(fail_on_rank_one, 2, "here")
    start = time.monotonic()
    with pytest.raises(ProcessesLate, match=r"ranks 1-2 of 3: no answer within 1 s"):
        run_processes(hang, 3, timeout=1.0)
    assert time.monotonic() - start < 10
    with pytest.raises(ProcessDied, match="rank 1 of 2: the process died without a word") as caught:
        run_processes(die, 2)
    assert isinstance(caught.value, ProcessError) and (caught.value.ranks, caught.value.world_size) == ((1,), 2)
    assert not multiprocessing.active_children()


def test_casualties_may_die() -> None:
    assert run_processes(die, 3, casualties=[1, 2]) == [0, None, 2]


class Untold(LookupError):
    """An exception that cannot be pickled: it takes more than its text."""

    def __init__(self, text: str, more: object) -> None:
        super().__init__(text)


def raise_untold(rank: int, world_size: int) -> None:
    raise Untold("there", lambda: None)


def test_named_exceptions_are_raised_again() -> None:
    with pytest.raises(LookupError, match=r"^here$"):
        run_processes(fail_on_rank_one, 2, "here", reraise=(LookupError,))
    with pytest.raises(ProcessRaised, match="Untold: there"):
        run_processes(raise_untold, 1, reraise=(LookupError,))


def give_what_cannot_be_pickled(rank: int, world_size: int) -> object:
    return lambda: rank


def test_a_result_that_cannot_be_pickled_is_told() -> None:
    with pytest.raises(ProcessRaised, match=r"rank 0 of 1: .*pickle"):
        run_processes(give_what_cannot_be_pickled, 1)
