"""The `triton` kernel: a stage's whole table of tiles in one launch, which carries `(out, lse)` in and out.

It computes scattered tokens without copies, sums of fp32 over any number of steps, and all that may become of scores.
Each row of a result has one program that writes it, so results are the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from threading import Lock
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringattn.geometry.spans import Ints
from ringattn.geometry.tiles import RowIndex
from ringattn.kernels.base import Call, Grads, Needs, Rows
from ringattn.kernels.calls import TileCalls
from ringattn.kernels.partial import Partial, accumulator_dtype
from ringattn.kernels.scores import Alibi, Place, Scores
from ringattn.kernels.triton_tiles.sizes import INTERPRETED, WIDEST, Blocks, Sizes, padded, sizes, together
from ringattn.kernels.triton_tiles.views import Bias, Lists, Strided, Terms
from ringattn.kernels.triton_tiles.worklist import Bools, Table, Wave, waves

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FEATURES = frozenset({"softcap", "bias", "dropout", Alibi.name})
_INTERPRETER = Lock()  # Triton's has one state for all threads


class DeviceWave(NamedTuple):
    """A wave on the device, and its number of blocks."""

    blocks: int
    lists: Lists


class Where(NamedTuple):
    """Where all local rows and columns lie: their positions, in 32 bits where they fit, as a difference of two is then
    one instruction; hashes of heads and positions for dropout; and the query heads, also as a bias counts them."""

    q_at: Tensor
    k_at: Tensor
    hashes: tuple[Tensor, Tensor, Tensor]
    heads: slice
    bias_heads: slice

    @staticmethod
    def of(place: Place) -> Where:
        far = max((int(at.max()) for at in (place.q, place.k) if at.numel()), default=0)
        kind = torch.int32 if far < 1 << 31 else torch.int64
        return Where(place.q.to(kind), place.k.to(kind), place.hashes, place.heads, place.bias_heads)


@dataclass(frozen=True, eq=False)
class Work:
    """A table of tiles made ready: the waves of each kernel, and the sizes of their blocks."""

    sizes: Sizes
    group: int  # query heads of a KV head
    together: int  # of them, those that are rows of one block
    alone: int  # the same where biases have a gradient: a block's rows are then distinct rows of these
    forward: Sequence[DeviceWave]
    queries: Sequence[DeviceWave]
    keys: Sequence[DeviceWave]
    where: Where | None


@dataclass(frozen=True, eq=False)
class ListedCalls(TileCalls):
    """Tiles for this kernel."""

    work: Work

    def scored(self, scores: Scores) -> TileCalls:
        """See `TileCalls`."""
        return replace(self, scores=scores)


class Triton:
    """The `triton` kernel; see the module's docstring."""

    name = "triton"
    needs = Needs(frozenset({"cpu", "cuda"}), (8, 0), packages={"triton": ">=3.6"}, install="'ringattn[triton]'")
    reads_delta, leaves_sms, takes_lists = True, False, True
    named_only = frozenset({"cpu"})

    def fitted(self, call: Call) -> Triton:
        """See `Kernel`: sums have one order in any case."""
        return self

    def direct(self, call: Call) -> bool:
        """See `Kernel`. Triton's interpreter cuts 16-bit numbers off where a GPU rounds them."""
        return call.device_type == "cuda"

    def refuse(self, call: Call) -> str | None:
        if call.dtype not in DTYPES:
            return f"dtype {call.dtype} must be one of float16, bfloat16, float32; kernel='blockwise' takes float64"
        for name in ("head_dim", "v_head_dim"):
            if getattr(call, name) > WIDEST:
                size = f"{name} {getattr(call, name)} must be at most {WIDEST}"
                return f"{size}, as blocks must fit a processor's memory; kernel='blockwise' takes any"
        if unknown := call.features - FEATURES:
            return f"{', '.join(sorted(unknown))} is none of what it does to scores ({', '.join(sorted(FEATURES))})"
        if call.device_type == "cpu" and not _interprets():
            return "Triton compiles for GPUs, and runs on the CPU only where TRITON_INTERPRET=1 was set at its import"
        return None

    def ready(self, calls: TileCalls, call: Call) -> TileCalls:
        """See `Kernel`."""
        capability = torch.cuda.get_device_capability(calls.device) if calls.device.type == "cuda" else INTERPRETED
        chosen = sizes(call.head_dim, call.v_head_dim, call.dtype.itemsize, capability)
        group = call.num_heads // call.num_kv_heads
        packed = together(group)
        alone = 1 if "bias" in call.features else packed
        table = Table.of(calls.tiles)
        fresh = _rows_of(launch.q for launch in calls.launches if launch.fresh)
        fresh_keys = _rows_of(launch.k for launch in calls.launches if launch.fresh_keys)
        made = Work(
            chosen, group, packed, alone,
            _on_device(waves(table, chosen.forward.rows // packed, fresh), table, calls.device),
            _on_device(waves(table, chosen.queries.rows // alone, fresh), table, calls.device),
            _on_device(waves(table.transposed, chosen.keys.cols, fresh_keys), table.transposed, calls.device),
            None if calls.place is None else Where.of(calls.place),
        )  # fmt: skip
        return ListedCalls(calls.tiles, calls.launches, (), calls.scores, calls.place, calls.device, made)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, calls: TileCalls, acc: Partial) -> None:
        """See `Kernel`."""
        work, scores = _listed(calls)
        terms, bias = _terms(scores, work.where), _bias(scores.bias, work.where)
        tensors = [Strided.tokens(x) for x in (q, k, v, acc.out)]
        settings = _settings(work.sizes.forward, work.group, work.together, q, v)
        grid = q.shape[2] // work.together, q.shape[0]
        for wave in work.forward:
            given = (*tensors, Strided.rows(acc.lse), wave.lists, terms, bias, _seed(scores))
            _launch("forward", "forward_tiles", (wave.blocks, *grid), given, settings)

    def backward(self, rows: Rows, k: Tensor, v: Tensor, calls: TileCalls, grads: Grads) -> None:
        """See `Kernel`."""
        assert rows.delta is not None, "this kernel reads delta"
        work, scores = _listed(calls)
        side = (
            *(Strided.tokens(x) for x in (rows.q, k, v, rows.dout)),
            *(Strided.rows(x) for x in (rows.lse, rows.delta)),
        )
        if grads.dq is not None or scores.dbias is not None:
            _differentiate_queries(work, scores, side, rows.q, v, grads)
        if grads.dk is not None or grads.dv is not None:
            _differentiate_keys(work, scores, side, k, v, grads)


def _differentiate_queries(
    work: Work, scores: Scores, side: tuple[Strided, ...], q: Tensor, v: Tensor, grads: Grads
) -> None:
    """dq, and the gradient of a bias."""
    terms, dq = _terms(scores, work.where), Strided.tokens(_or_scratch(grads.dq, q))
    bias, dbias = _bias(scores.bias, work.where), _bias(scores.dbias, work.where)
    lanes, batches = _summed(scores.dbias, q.shape[2], q.shape[0])
    settings = _settings(work.sizes.queries, work.group, work.alone, q, v) | {"LANES": lanes, "BATCHES": batches}
    grid = q.shape[2] // work.alone // lanes, q.shape[0] // batches
    for wave in work.queries:
        given = (*side, dq, wave.lists, terms, bias, dbias, _seed(scores))
        _launch("backward", "backward_queries", (wave.blocks, *grid), given, settings)


def _differentiate_keys(
    work: Work, scores: Scores, side: tuple[Strided, ...], k: Tensor, v: Tensor, grads: Grads
) -> None:
    """dk and dv."""
    terms, bias = _terms(scores, work.where), _bias(scores.bias, work.where)
    made = [Strided.tokens(_or_scratch(*pair)) for pair in ((grads.dk, k), (grads.dv, v))]
    settings = _settings(work.sizes.keys, work.group, work.together, k, v)
    for wave in work.keys:
        given = (*side, *made, wave.lists, terms, bias, _seed(scores))
        _launch("backward", "backward_keys", (wave.blocks, k.shape[2], k.shape[0]), given, settings)


def _or_scratch(grad: Tensor | None, like: Tensor) -> Tensor:
    """Where a gradient is written to, or what the kernels write there that compute it beside another."""
    return torch.empty_like(like, dtype=accumulator_dtype(like.dtype)) if grad is None else grad


def _listed(calls: TileCalls) -> tuple[Work, Scores]:
    assert isinstance(calls, ListedCalls), "calls are made ready by this kernel"
    return calls.work, calls.scores


def _rows_of(sides: Iterable[RowIndex]) -> Bools:
    """Which local rows some launches have: those that hold nothing yet, of fresh ones."""
    rows = list(sides)
    size = max((at.stop if isinstance(at, slice) else int(at.max()) + 1 for at in rows), default=0)
    fresh = np.zeros(size, bool)
    for at in rows:
        fresh[at] = True
    return fresh


def _on_device(made: Sequence[Wave], table: Table, device: torch.device) -> list[DeviceWave]:
    rows, cols = (_numbers(axis.index, device) if len(axis.index) else None for axis in (table.rows, table.cols))
    return [
        DeviceWave(
            len(wave.blocks),
            Lists(
                _numbers(wave.blocks, device),
                _numbers(wave.entries, device),
                rows if wave.lists[0] else None,
                cols if wave.lists[1] else None,
            ),
        )
        for wave in made
    ]


def _numbers(x: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(x.astype(np.int32)).to(device)


def _terms(scores: Scores, where: Where | None) -> Terms:
    """What the kernels are told of scores, but for a bias and the seed."""
    plain = Terms(float(scores.scale), None if scores.softcap is None else float(scores.softcap))
    if where is None:
        return plain
    slopes = None if scores.rule is None else scores.rule.params.to(torch.float32)[where.heads]
    plain = plain._replace(slopes=slopes, q_at=where.q_at, k_at=where.k_at)
    if scores.dropout is None:
        return plain
    (head_hash, q_hash, k_hash), p = where.hashes, scores.dropout.p
    least, boost = int(p * (1 << 32)) - (1 << 31), 1.0 / (1.0 - p)
    return plain._replace(head_hash=head_hash, q_hash=q_hash, k_hash=k_hash, least=least, boost=boost)


def _bias(x: Tensor | None, where: Where | None) -> Bias:
    return Bias() if where is None else Bias.of(x, where.bias_heads)


def _seed(scores: Scores) -> int:
    return 0 if scores.dropout is None else scores.dropout.mixed


def _summed(dbias: Tensor | None, heads: int, batch: int) -> tuple[int, int]:
    """Over how many heads and batch rows a program adds up, so that no two add to one bias."""
    if dbias is None:
        return 1, 1
    return heads if dbias.shape[1] == 1 else 1, batch if dbias.shape[0] == 1 else 1


def _settings(blocks: Blocks, group: int, together: int, q: Tensor, v: Tensor) -> dict[str, Any]:
    d, dv = q.shape[3], v.shape[3]
    return {
        "GROUP": group,
        "TOGETHER": together,
        "ROWS": blocks.rows,
        "COLS": blocks.cols,
        "D": d,
        "DV": dv,
        "WIDE": padded(d),
        "WIDE_V": padded(dv),
        "PRECISION": _precision(v),
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _precision(x: Tensor) -> str:
    """That of products. Triton's interpreter takes bf16 for integers."""
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        return "wide"
    tf32 = x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


def _launch(
    module: str, kernel: str, grid: tuple[int, int, int], given: tuple[Any, ...], settings: dict[str, Any]
) -> None:
    where = given[0].at
    with torch.cuda.device(where.device) if where.is_cuda else _INTERPRETER:
        getattr(_compiled(module), kernel)[grid](*given, **settings)


@cache
def _compiled(module: str) -> ModuleType:
    """The modules that import Triton."""
    from importlib import import_module

    return import_module(f"ringattn.kernels.triton_tiles.{module}")


def _interprets() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
