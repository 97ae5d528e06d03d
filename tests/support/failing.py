"""Calls that fail, differ or are refused on one rank, over any transport, and what all ranks must say of them."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.comm import PeerError, Transport
from ringattn.rolling import roll
from tests.support.faults import Faults
from tests.support.steps import AT_ONCE, S, inputs_of, step


def fail_everywhere(rank: int, world: int, make: Callable[[], Transport], culprit: int) -> list[list[str]]:
    """A fault at every batch and wait of a step, in turn; what became of that step and of the two after it."""

    def fresh() -> tuple[Faults, ra.ContextParallel]:
        transport = make()
        return Faults(transport), ra.ContextParallel(transport, S, layout="zigzag")

    faults, cp = fresh()
    found = [[step(cp, 0)]]
    points = torch.tensor([faults.seen])
    dist.broadcast(points, culprit)
    for at in range(1, int(points) + 1):
        faults.arm(at if rank == culprit else None)
        outcomes = [step(cp, 3 * at)]
        faults.arm(None)
        outcomes += [step(cp, 3 * at + 1), step(cp, 3 * at + 2)]
        found.append(outcomes)
        last: list[Any] = [None] * world
        dist.all_gather_object(last, outcomes)
        assert len({outcomes[-1] == "right" for outcomes in last}) == 1, (at, last)
        if outcomes[-1] != "right":
            faults, cp = fresh()
    return found


def check_faults(ranks: list[Any], world: int) -> None:
    assert all(found[0] == ["right"] for found in ranks)
    refused = 0
    for cases_of in zip(*(found[1:] for found in ranks), strict=True):
        assert cases_of[-1][0].startswith("Injected")
        told = [outcomes[0] for outcomes in cases_of[:-1]]
        assert all("Injected" in text or text == "right" for text in told), cases_of
        if all(outcomes[1:] == ["right", "right"] for outcomes in cases_of):
            assert all(f"rank {world - 1} failed in call" in text for text in told), cases_of
        else:  # the culprit had done its part, and failed when the others could go on
            refused += 1
            assert all("right" not in outcomes[1:] for outcomes in cases_of), cases_of
            assert all("make a new context" in outcomes[2] for outcomes in cases_of), cases_of
    # Only in the rounds by which all ranks end a pass, forward and backward: there are three places for a fault in a
    # round, and from the second place of the first round on, some rank may have heard all that it waits for.
    rounds = (world - 1).bit_length()
    assert refused <= 2 * (3 * rounds - 1)


def differ(rank: int, world: int, make: Callable[[], Transport]) -> list[tuple[str, list[str], float]]:
    """Calls in which rank 0 is not like the others, none of them the first of its kind; then a step that is right."""
    q, k, v, dout = inputs_of(1)
    masks = [ra.causal(), ra.sliding_window(5)]
    odd = rank == 0

    def attend(cp: ra.ContextParallel, **arguments: Any) -> torch.Tensor:
        return ra.attention(*map(cp.shard, (q, k, v)), cp=cp, **arguments)

    def graph(cp: ra.ContextParallel, wanted: bool) -> None:
        leaves = [cp.shard(t).requires_grad_(wanted) for t in (q, k, v)]
        ra.attention(*leaves, cp=cp)

    def skip_backward(cp: ra.ContextParallel) -> None:
        for number in range(2):
            leaves = [cp.shard(t).clone().requires_grad_() for t in (q, k, v)]
            out = ra.attention(*leaves, cp=cp)
            if not (odd and number == 0):
                out.backward(cp.shard(dout))

    def backward_of_another_layer(cp: ra.ContextParallel) -> None:
        leaves = [cp.shard(t).clone().requires_grad_() for t in (q, k, v)]
        outs = [ra.attention(*leaves, cp=cp, mask=mask) for mask in masks]
        for out in outs if odd else reversed(outs):
            out.backward(cp.shard(dout), retain_graph=True)

    ways: dict[str, Callable[[ra.ContextParallel], Any]] = {
        "mask": lambda cp: attend(cp, mask=masks[odd]),
        "scale": lambda cp: attend(cp, scale=0.5 if odd else 0.25),
        "seed": lambda cp: attend(cp, dropout_p=0.5, seed=int(odd)),
        "slopes": lambda cp: attend(cp, bias=ra.alibi([0.5, 0.25, 0.125, 0.1 + 0.1 * odd])),
        "gradient": lambda cp: graph(cp, wanted=odd),
        "roll": lambda cp: roll(cp, cp.shard(q), 1 + odd),
        "kind": lambda cp: cp.unshard(cp.shard(q)) if odd else attend(cp),
        "skipped backward": skip_backward,
        "order of backward": backward_of_another_layer,
        "new kind": lambda cp: attend(cp, scale=2.0 if odd else None),
    }
    cp = ra.ContextParallel(make(), S, mask=masks, layout="zigzag")
    known: tuple[Callable[[], Any], ...] = (
        lambda: [attend(cp, mask=mask) for mask in masks],
        lambda: [attend(cp, scale=scale) for scale in (0.5, 0.25)],
        lambda: [attend(cp, dropout_p=0.5, seed=seed) for seed in (0, 1)],
        lambda: [attend(cp, bias=ra.alibi([0.5, 0.25, 0.125, slope])) for slope in (0.1, 0.2)],
        lambda: [graph(cp, wanted) for wanted in (True, False)],
        lambda: [roll(cp, cp.shard(q), by) for by in (1, 2)],
        lambda: cp.unshard(cp.shard(q)),
    )
    found = []
    for name, way in ways.items():
        for same in known:
            same()
        start = time.monotonic()
        try:
            way(cp)
            text = "nothing"
        except (PeerError, ValueError) as error:
            text = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - start
        found.append((f"{name}: {text}", [step(cp, 2), step(cp, 3)], seconds))
        cp = usable(cp, name, make)
    return found


APART = ("kind", "skipped backward")  # after which a rank is ahead of the others


def usable(cp: ra.ContextParallel, name: str, make: Callable[[], Transport]) -> ra.ContextParallel:
    return ra.ContextParallel(make(), S, mask=cp.masks, layout="zigzag") if name in APART else cp


def check_differences(ranks: list[Any]) -> None:
    for outcomes in zip(*ranks, strict=True):
        for text, later, seconds in outcomes:
            assert "CallMismatch" in text and "every rank must make the same calls" in text, outcomes
            assert text.count("is at call") == 2, "both calls are named"
            if text.startswith(APART):
                assert all("CallMismatch" in one and "make a new context" in one for one in later), outcomes
            else:
                assert later == ["right", "right"], outcomes
            assert seconds < AT_ONCE, outcomes


def refuse(rank: int, world: int, make: Callable[[], Transport]) -> list[tuple[str, str, float]]:
    """Calls that the last rank refuses, at the first call of their kind and later; then a step that is right."""
    cp = ra.ContextParallel(make(), S, layout="zigzag")
    q, k, v, _ = map(cp.shard, inputs_of(1))
    odd = rank == world - 1
    ways: dict[str, Callable[[], Any]] = {
        "tokens, but rank": lambda: ra.attention(*(x[:, 1:] if odd else x for x in (q, k, v)), cp=cp),
        "is not one of": lambda: ra.attention(q, k, v, cp=cp, mask=ra.full() if odd else None),
        "softcap=-1": lambda: ra.attention(q, k, v, cp=cp, softcap=-1.0 if odd else 5.0),
        "local.size(1)": lambda: cp.unshard(q[:, 1:] if odd else q),
        "by=": lambda: roll(cp, q, "x" if odd else 1),  # type: ignore[arg-type]
        "x.size(1)": lambda: [cp.shard(q), ra.attention(q, k, v, cp=cp)] if odd else ra.attention(q, k, v, cp=cp),
    }
    found = []
    for _ in range(2):
        for name, way in ways.items():
            start = time.monotonic()
            try:
                way()
                text = "nothing"
            except ValueError as error:
                text = f"{type(error).__name__}: {error}"
            seconds = time.monotonic() - start
            assert name in text, (name, text)
            found.append((text, step(cp, 2), seconds))
    return found


def check_refusals(ranks: list[Any], world: int) -> None:
    for outcomes in zip(*ranks, strict=True):
        for rank, (text, later, seconds) in enumerate(outcomes):
            assert text.startswith("ValueError") and later == "right" and seconds < AT_ONCE, outcomes
            assert rank == world - 1 or f"rank {world - 1} refused" in text, outcomes
