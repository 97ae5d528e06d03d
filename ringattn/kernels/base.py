"""What a kernel is: it computes the tiles of a stage of attention and knows nothing of ranks.

A tile is a rectangle of queries and keys with a band through it, `scores.window = (left, right)`, aligned
bottom-right: query `i` of `nq` attends key `j` of `nk` iff
`i + (nk - nq) - left <= j <= i + (nk - nq) + right`, `None` meaning unbounded on that side. Tiles are
trimmed: every row has a key and every key has a row. The forward folds tiles into a running `Partial`; the
backward adds their gradients, given the *global* out, lse and delta, so that the tiles of one attention may be
computed in any number of calls. A kernel that computes a tile a call is a `TileKernel` (`calls.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata, util
from typing import TYPE_CHECKING, Protocol

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor

from ringattn.kernels.partial import Partial
from ringattn.kernels.passes import accumulate

if TYPE_CHECKING:
    from ringattn.kernels.calls import TileCalls

Index = slice | Tensor | tuple[slice | Tensor, ...]


@dataclass(frozen=True)
class Call:
    """What is asked of a kernel, for it to accept or refuse before anything is computed."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    num_heads: int
    num_kv_heads: int
    windowed: bool = False  # some tile is neither a full rectangle nor a plain causal triangle
    features: frozenset[str] = frozenset()  # of "softcap", "bias", "alibi", "dropout": see `Scores.features`
    dlse: bool = False  # lse has a gradient
    capability: tuple[int, int] = (0, 0)  # of a CUDA device
    deterministic: bool = False  # sums are to come in the same order in every run
    sm_margin: int = 0  # multiprocessors to be left free

    def __str__(self) -> str:
        return (
            f"{self.dtype} on {self.device_type}, head_dim {self.head_dim}, v_head_dim {self.v_head_dim}, "
            f"{self.num_heads} heads over {self.num_kv_heads} KV heads"
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """The query side of a backward call.

    q, dout, out: `[batch, nq, num_heads, *]` in the storage dtype; `out` is the global result.
    lse: `[batch, num_heads, nq]` fp32 (fp64 for fp64).
    delta: `rowsum(dout * out) - dlse`, shaped like `lse`; None for a kernel that does not read it.
    dlse: the gradient of `lse`, `[batch, num_heads, nq]`, or None where `lse` has none.
    """

    q: Tensor
    dout: Tensor
    out: Tensor
    lse: Tensor
    delta: Tensor | None
    dlse: Tensor | None

    def rows(self, rows: slice | Tensor) -> Rows:
        """A view of some query rows; the slice may have a step."""
        delta, dlse = (None if x is None else x[:, :, rows] for x in (self.delta, self.dlse))
        return Rows(self.q[:, rows], self.dout[:, rows], self.out[:, rows], self.lse[:, :, rows], delta, dlse)

    def batch(self, rows: slice) -> Rows:
        """A view of some batch rows."""
        return self.map(lambda x: x[rows], lambda x: x[rows])

    def heads(self, heads: slice) -> Rows:
        """A view of some query heads."""
        delta, dlse = (None if x is None else x[:, heads] for x in (self.delta, self.dlse))
        q, dout, out = self.q[:, :, heads], self.dout[:, :, heads], self.out[:, :, heads]
        return Rows(q, dout, out, self.lse[:, heads], delta, dlse)

    def map(self, tokens: Callable[[Tensor], Tensor], rows: Callable[[Tensor], Tensor]) -> Rows:
        """`tokens` applied to q, dout and out, `rows` to lse, delta and dlse."""
        q, dout, out = (tokens(x) for x in (self.q, self.dout, self.out))
        delta, dlse = (None if x is None else rows(x) for x in (self.delta, self.dlse))
        return Rows(q, dout, out, rows(self.lse), delta, dlse)


def row_delta(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """``rowsum(dout * out) - dlse``, ``[B, H, S]``: what the softmax's backward subtracts (D of FlashAttention-2)."""
    delta = (dout * out).sum(-1).transpose(1, 2).contiguous()
    return delta if dlse is None else delta - dlse


@dataclass(frozen=True, slots=True)
class Grads:
    """Accumulators in fp32 (fp64 for fp64) that kernels ADD into; they may be views. None: not wanted.

    dq: `[batch, nq, num_heads, head_dim]`.
    dk, dv: `[batch, nk, num_kv_heads, head_dim]` and `[batch, nk, num_kv_heads, v_head_dim]`.
    fresh, fresh_keys: nothing is in dq, or in dk and dv, yet: they are written. Then they may be in the storage dtype,
        where the kernel is `direct`.
    """

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    fresh: bool = False
    fresh_keys: bool = False

    def tile(self, rows: slice, cols: slice) -> Grads:
        """A view of some query rows and key columns, to add into."""
        return self.views((slice(None), rows), (slice(None), cols))

    def views(self, rows: Index, cols: Index, fresh: bool = False, fresh_keys: bool = False) -> Grads:
        """Views of the gradients of queries, and of those of keys."""
        dq, dk, dv = (None if x is None else x[at] for x, at in ((self.dq, rows), (self.dk, cols), (self.dv, cols)))
        return Grads(dq, dk, dv, fresh, fresh_keys)

    def begun(self) -> Grads:
        """The same to add into, where several parts of a tile add up: what is fresh is filled with zeros."""
        for x, fresh in ((self.dq, self.fresh), (self.dk, self.fresh_keys), (self.dv, self.fresh_keys)):
            if fresh and x is not None:
                x.zero_()
        return Grads(self.dq, self.dk, self.dv)

    def add(self, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Add, or write, head-major gradients, `[batch, heads, n, *]`, without their padding columns."""
        self.take(dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2))

    def take(self, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> None:
        """The same for gradients that lie as the accumulators do; None is written already. What is not wanted is
        dropped."""
        for fresh, pairs in ((self.fresh, ((self.dq, dq),)), (self.fresh_keys, ((self.dk, dk), (self.dv, dv)))):
            found = [(home, _columns(x, home)) for home, x in pairs if home is not None and x is not None]
            if found:
                accumulate(found, fresh)

    def homes(
        self, dtype: torch.dtype, writable: Callable[[Tensor], bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of dq, dk, dv that an operator of that dtype may write itself, None for the others."""
        fresh = ((self.dq, self.fresh), (self.dk, self.fresh_keys), (self.dv, self.fresh_keys))
        dq, dk, dv = (x if first and x is not None and x.dtype == dtype and writable(x) else None for x, first in fresh)
        return dq, dk, dv


def _columns(part: Tensor, home: Tensor) -> Tensor:
    """A gradient without padding columns."""
    return part if part.shape[3] == home.shape[3] else part[..., : home.shape[3]]


@dataclass(frozen=True)
class Needs:
    """What a kernel runs on: types of device, compute capabilities of CUDA devices (the least, and the one that is too
    new), packages with the versions that will do (``install`` is what pip is to be told), and modules of no package
    that pip knows, with the remedy."""

    devices: frozenset[str] | None = None  # None: any
    capability: tuple[int, int] = (0, 0)
    below: tuple[int, int] | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    install: str | None = None
    modules: Mapping[str, str] = field(default_factory=dict)

    def elsewhere(self, device_type: str) -> str | None:
        """That it does not run on a type of device at all; None if it does."""
        if self.devices is None or device_type in self.devices:
            return None
        having = " and ".join(sorted(self.devices))
        verb = "has" if len(self.devices) == 1 else "have"
        return f"there is no operator for device {device_type!r} (only {having} {verb} one)"

    def lacking(self, call: Call) -> str | None:
        """What is missing here for a call, with what to do; None if nothing is."""
        if said := self.elsewhere(call.device_type):
            return said
        if call.device_type == "cuda":
            shown = "the CUDA device, of compute capability {}.{},".format(*call.capability)
            if call.capability < self.capability:
                return f"{shown} is older than {self.capability[0]}.{self.capability[1]}"
            if self.below is not None and call.capability >= self.below:
                return f"{shown} is none that it computes right on (below {self.below[0]}.{self.below[1]})"
        for name, versions in self.packages.items():
            found = _installed(name)
            if found is None or not SpecifierSet(versions).contains(found, prereleases=True):
                install = self.install or f"'{name}{versions}'"
                return f"package {name}{versions} is needed, found {found or 'none'}: pip install {install}"
        absent = next((name for name in self.modules if util.find_spec(name) is None), None)
        return None if absent is None else f"module {absent} is not installed: {self.modules[absent]}"


@cache
def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class Kernel(Protocol):
    """Computes the tiles of a stage on one device. Inputs may be strided views with a contiguous last dim."""

    name: str
    needs: Needs
    reads_delta: bool  # whether backward is given `Rows.delta`, or makes its own from dout and out
    leaves_sms: bool  # whether it can leave multiprocessors of a GPU free, for messages
    takes_lists: bool  # whether it computes all tiles of a stage at once
    named_only: frozenset[str]  # types of device on which "auto" does not take it

    def fitted(self, call: Call) -> Kernel:
        """The kernel as this call wants it (deterministic, with multiprocessors left free)."""
        ...

    def direct(self, call: Call) -> bool:
        """Whether rows that only one tile of the whole call touches may be in the storage dtype: the kernel then writes
        them once, rounded once."""
        ...

    def refuse(self, call: Call) -> str | None:
        """None if the call can be computed, forward and backward, else the reason in words, with the value and the
        rule."""
        ...

    def ready(self, calls: TileCalls, call: Call) -> TileCalls:
        """What `forward` and `backward` are to be given for these tiles in calls of this kind: made once, with all that
        has to be on the device."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, calls: TileCalls, acc: Partial) -> None:
        """Fold tiles into `acc`, the running result of all rows of `q`."""
        ...

    def backward(self, rows: Rows, k: Tensor, v: Tensor, calls: TileCalls, grads: Grads) -> None:
        """Add the tiles' dq, dk, dv, given the global out, lse and delta."""
        ...
