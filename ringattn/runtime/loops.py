"""The forward loop and the backward loop.

Both walk the turns of a prepared program: what is copied, posted, computed and added, in which order, was decided when
it was compiled. Before a turn computes, its messages are posted; after it, they are waited for. Sums are fp32 (fp64 for
fp64 inputs). Between messages a loop only queues work on its device, which is what a CUDA graph captures (`graphs.py`).
"""

from __future__ import annotations

from torch import Tensor

from ringattn.kernels import Rows
from ringattn.kernels.base import row_delta
from ringattn.kernels.partial import add_sinks
from ringattn.kernels.scores import Scores
from ringattn.runtime.link import Messages
from ringattn.runtime.prepared import Prepared
from ringattn.runtime.wire import Own


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Prepared, scores: Scores, link: Messages
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse [B, H, S]`` as they were added up."""
    own, placed = Own(q, k, v), scores if call.positional else None
    own.acc = call.result(q.shape[1], whole=sinks is None)
    for turn in call.turns(link.workspace)[0]:
        for copy in turn.copies:
            copy(own)
        pending = link.post(turn)
        for work in turn.work:
            work.forward(own, placed)
        if pending is not None:
            link.wait(pending)
        for merge in turn.adds:
            merge(own)
    if sinks is not None:
        add_sinks(own.acc, sinks)
    return own.acc.out, own.acc.lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, call: Prepared,
    scores: Scores, link: Messages,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Those of ``dq, dk, dv`` that are wanted, as they were added up. K/V travel again; dK/dV come home as the program
    says."""
    own, placed = Own(q, k, v), scores if call.positional else None
    delta = row_delta(dout.to(call.wide), out, dlse) if call.kernels.reads_delta else None
    own.rows = Rows(q, dout, out, lse, delta, dlse)
    own.grads = call.gradients(q, k, v)
    for turn in call.turns(link.workspace)[1]:
        for copy in turn.copies:
            copy(own)
        pending = link.post(turn)
        for buffer in turn.zeros:
            buffer.zero_()
        for work in turn.work:
            work.backward(own, placed)
        if pending is not None:
            link.wait(pending)
        for add in turn.adds:
            add(own)
    return own.grads.dq, own.grads.dk, own.grads.dv
