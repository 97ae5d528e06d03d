"""Gradients that a plain all-reduce would add up wrongly, or wait for: right on all ranks, or refused on all."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter

import ringattn as ra
import ringattn.comm.shield as shield_module
from ringattn.comm.shield import shield
from ringattn.loss import TokenMeter, sum_gradients, sum_over
from ringattn.testing import run_processes
from tests.support.alarms import alarmed

AT_ONCE = 2.0


def outcomes(rank: int, ways: dict[str, Callable[[], Any]]) -> dict[str, tuple[str, float]]:
    """What came of each, and the seconds it took; a sum after it must be right."""
    found = {}
    for name, way in ways.items():
        begun = time.monotonic()
        try:
            text = str(way())
        except ValueError as error:
            text = f"ValueError: {error}"
        except (RuntimeError, MemoryError) as error:
            text = f"{type(error).__name__}: {error}"
        found[name] = text, time.monotonic() - begun
        world = dist.get_world_size()
        assert sum_over(torch.tensor(rank + 1.0), dist.group.WORLD) == world * (world + 1) / 2, name
    return found


def graded(grad: torch.Tensor | None, like: torch.Tensor | None = None) -> Parameter:
    like = grad if like is None else like
    assert like is not None
    parameter = Parameter(torch.zeros(like.shape, dtype=like.dtype))
    if grad is not None:
        parameter.grad = grad
    return parameter


def sum_strangely(rank: int, world: int) -> dict[str, tuple[str, float]]:
    group, ones = dist.group.WORLD, torch.ones(3)

    def total(*parameters: Parameter, **how: Any) -> Any:
        sum_gradients(parameters, group, **how)
        return [None if p.grad is None else p.grad.to_dense().resolve_conj().tolist() for p in parameters]

    def twice() -> Any:
        p = graded(ones * (rank + 1))
        return total(p, p)

    def whole_of_one() -> Any:
        p, q = graded(ones.clone()), graded(ones.clone())
        return total(p, q, whole=[q if rank else p])

    def shared_memory() -> Any:
        grad = ones.clone()
        return total(graded(grad), graded(grad))

    def negated() -> Any:
        return total(graded(torch._neg_view(-ones) if rank == 0 else ones.clone()))

    def conjugated() -> Any:
        z = torch.full((2, 2), 1 + 1j)
        return total(graded(z.conj() if rank == 0 else None, z), graded(z.clone().mT.conj()))

    def sparse(dims: int | None) -> Any:
        grad = None if dims is None else torch.ones(2, 2).to_sparse(dims)
        return total(graded(grad, torch.ones(2, 2)))

    def no_room() -> Any:
        p = graded(torch.ones(2, 2).mT.expand(3, 2, 2)[:, :, 0] if rank == 0 else torch.ones(3, 2))
        if rank == 0:
            from ringattn.comm import sums

            kept, sums._alike = sums._alike, lambda *_: (_ for _ in ()).throw(MemoryError("no room"))  # type: ignore
        try:
            return total(p)
        finally:
            if rank == 0:
                sums._alike = kept

    a, b = graded(ones.clone()), graded(ones.clone())
    return outcomes(
        rank,
        {
            "a set": lambda: sum_gradients({a, b}, group),
            "given twice": twice,
            "other ones left alone": whole_of_one,
            "shared memory": shared_memory,
            "negated": negated,
            "conjugated": conjugated,
            "sparse in two dims or none": lambda: sparse(2 if rank == 0 else None),
            "sparse in one dim and two": lambda: sparse(1 if rank == 0 else 2),
            "no room": no_room,
        },
    )


@pytest.mark.parametrize("world", [2, 3])
def test_strange_gradients_are_summed_right_or_refused_by_all(world: int) -> None:
    ranks = run_processes(sum_strangely, world)
    for rank, found in enumerate(ranks):
        assert all(seconds < AT_ONCE for _, seconds in found.values()), found
        text = {name: said for name, (said, _) in found.items()}
        assert "a set" in text["a set"] and "a list" in text["a set"]
        once = float(sum(range(1, world + 1)))
        assert text["given twice"] == str([[once] * 3] * 2)
        assert "every rank must call the same" in text["other ones left alone"]
        assert "in the memory of another's" in text["shared memory"]
        assert text["negated"] == str([[float(world)] * 3])
        whole = [[world * (1 - 1j)] * 2] * 2
        assert text["conjugated"] == str([[[1 - 1j] * 2] * 2, whole]), text["conjugated"]
        assert text["sparse in two dims or none"] == str([[[1.0] * 2] * 2])
        assert text["sparse in one dim and two"] == str([[[float(world)] * 2] * 2])
        assert ("MemoryError" if rank == 0 else "ValueError: another rank refused") in text["no room"]


def read_interrupted(rank: int, world: int) -> list[tuple[int, float]]:
    """One rank is interrupted in a reading that the others come to late."""
    meter = TokenMeter(dist.group.WORLD)

    def add_and_read() -> tuple[int, float]:
        meter.add(torch.ones(1, 100), torch.tensor(1.0))
        reading = meter.read()
        return reading.tokens, reading.loss

    if rank == 0:
        assert alarmed(add_and_read, 0.3)
    else:
        time.sleep(0.6)
        add_and_read()
    return [add_and_read()]


def test_a_reading_that_is_interrupted_counts_once() -> None:
    assert run_processes(read_interrupted, 2) == [[(400, 2.0)]] * 2


def read_apart(rank: int, world: int) -> str:
    meter = TokenMeter(dist.group.WORLD)
    meter.add(torch.ones(1, 100), torch.tensor(1.0))
    try:
        return str(meter.read(rank + 1))
    except ValueError as error:
        return str(error)


def test_readings_of_other_numbers_of_steps_are_refused() -> None:
    assert all("TokenMeter.read(" in text and "must call the same" in text for text in run_processes(read_apart, 2))


def test_a_handler_that_raises_what_a_thread_that_cannot_start_does_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    start = shield_module._thread.start_new_thread

    def interrupted(*arguments: Any) -> None:
        start(*arguments)
        monkeypatch.undo()
        raise RuntimeError("the user's own")

    monkeypatch.setattr(shield_module._thread, "start_new_thread", interrupted)
    with pytest.raises(RuntimeError, match="the user's own"):
        shield(lambda: done.append(1))
    assert done == [1]


def test_where_no_thread_can_start_the_work_is_done_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(shield_module._thread, "start_new_thread", refuse)
    assert shield(lambda: 7) == 7


def compile_sums(rank: int, world: int) -> bool:
    """Of a loss whose count is summed in a graph."""
    logits, labels = torch.randn(1, 5, 7), torch.arange(5)[None] + rank
    plain = ra.loss.token_mean(logits, labels, group=dist.group.WORLD)
    compiled = torch.compile(lambda x: ra.loss.token_mean(x, labels, group=dist.group.WORLD), backend="eager")
    return torch.allclose(compiled(logits), plain)


def test_losses_with_a_group_compile() -> None:
    assert run_processes(compile_sums, 2) == [True, True]


def test_a_sum_of_bools_is_refused() -> None:
    with pytest.raises(ValueError, match=r"value is torch\.bool"):
        sum_over(torch.ones(2, dtype=torch.bool))
