"""The forward loop and the backward loop.

Both walk the stages of a program. Before a stage computes, the keys of the next stage are posted (and,
backward, the gradients of the stage before); after it, they are waited for. The loops know no mask, layout or
schedule: those are in the program. Sums are fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringattn.kernels import Grads, Rows
from ringattn.kernels.partial import Partial, add_sinks
from ringattn.planning.program import Program, Stage
from ringattn.runtime.visits import BackwardVisits, ForwardVisits
from ringattn.runtime.wire import Batch, add_rows, add_shard, present, rows_kv
from ringattn.runtime.work import Area, Run, accumulator_dtype, row_delta


def forward(q: Tensor, k: Tensor, v: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """``out`` in the dtype of ``q`` and ``lse`` ``[B, H, S]`` in the accumulator dtype."""
    batch, seqlen, num_heads, _ = q.shape
    start = Partial.empty if run.program.blank else Partial.unset
    acc = start(batch, seqlen, num_heads, v.shape[-1], accumulator_dtype(q.dtype), q.device)
    visits = ForwardVisits(run, q, k, v)
    held: Tensor | None = None
    for t, stage in enumerate(run.program.stages):
        messages = Batch(run.link, "forward", t + 1)
        fetched = messages.fetch(run.stage(t + 1), k, v, held)
        visits.post(t, messages)
        pending = messages.post()
        area = Area(run, run.program.q_frame, stage.frame, stage.kv_heads(k.shape[2]), q.shape[2] // k.shape[2])
        keys, values = (k, v) if t == 0 else _held_kv(held, k, v)
        for launch in stage.launches:
            area.forward(launch, q, keys, values, acc)
        visits.compute(t)
        run.link.traffic.wait(pending)
        held = fetched
    visits.merge_into(acc)
    if run.sinks is not None:
        add_sinks(acc, run.sinks)
    return acc.out.to(q.dtype), acc.lse.to(acc.out.dtype)


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, run: Run
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` in the dtypes of the inputs. K/V travel again; dK/dV come home as the program says.

    Where there is enough to hide, half of the own shard's heads are computed first, while the first keys
    arrive, and half last, while the last gradients come home.
    """
    wide = accumulator_dtype(q.dtype)
    delta = row_delta(dout.to(wide), out, dlse) if run.kernel.reads_delta else None
    rows = Rows(q, dout, out, lse, delta, dlse)
    own = Grads(*(torch.zeros_like(x, dtype=wide) for x in (q, k, v)))  # laid in memory as the inputs are
    visits = BackwardVisits(run, rows, k, v, own)
    turns, group = len(run.program.stages), q.shape[2] // k.shape[2]
    held: Tensor | None = None
    left: Tensor | None = None  # gradients of the stage before, on their way out
    for t in range(turns + 1):
        messages = Batch(run.link, "backward", t + 1)
        fetched = messages.fetch(run.stage(t + 1), k, v, held)
        returned = messages.bring_home(run.stage(t - 1), left, own.dk, own.dv)
        visits.post(t, messages)
        pending = messages.post()
        stage, heads = run.program.stages[t % turns], _turn(t, run.program, k.shape[2])
        gathered = _zeros(run, f"grads {t % 2}", stage, k, v, wide) if 0 < t < turns and stage.size else None
        keys, values = _held_kv(held, k, v) if 0 < t < turns else (k[:, :, heads], v[:, :, heads])
        grads = own.kv_heads(heads) if gathered is None else Grads(own.dq, *rows_kv(gathered, k.shape[-1]))
        area = Area(run, run.program.q_frame, stage.frame, heads, group)
        for launch in stage.launches if keys.shape[2] else ():
            area.backward(launch, rows, keys, values, grads)
        if gathered is not None:
            _add_copies(stage, gathered, own.kv_heads(heads))
        visits.compute(t)
        run.link.traffic.wait(pending)
        for move, message in returned:
            if move.home:
                home = own.kv_heads(run.program.stages[t - 1].kv_heads(k.shape[2]))
                add_shard(home.dk, home.dv, move, message)
            else:
                add_rows(present(gathered), move, message)
        held, left = fetched, gathered
    visits.add_home()
    return own.dq.to(q.dtype), own.dk.to(k.dtype), own.dv.to(v.dtype)


def _turn(t: int, program: Program, kv_heads: int) -> slice:
    """The KV heads computed at turn ``t`` of a backward pass; the last turn is the own shard's second."""
    first = (kv_heads + 1) // 2 if program.two_turns else kv_heads
    if t == 0:
        return slice(0, first)
    return slice(first, kv_heads) if t == len(program.stages) else program.stages[t].kv_heads(kv_heads)


def _zeros(run: Run, name: str, stage: Stage, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    heads = stage.kv_heads(k.shape[2])
    shape = (stage.size, k.shape[0], heads.stop - heads.start, k.shape[3] + v.shape[3])
    return run.link.workspace.take(name, shape, k, dtype).zero_()


def _held_kv(held: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return (k[:, :0], v[:, :0]) if held is None else rows_kv(held, k.shape[-1])


def _add_copies(stage: Stage, gathered: Tensor, own: Grads) -> None:
    """Gradients of the rank's own keys that lay in the buffer."""
    for home, here in stage.copies:
        dk, dv = rows_kv(gathered[here], own.dk.shape[-1])
        own.dk[:, home].add_(dk)
        own.dv[:, home].add_(dv)
