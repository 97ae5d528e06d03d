"""What a kernel is: it computes the tiles of a stage of attention and knows nothing of ranks.

A tile is a rectangle of queries and keys with a band through it, `scores.window = (left, right)`, aligned
bottom-right: query `i` of `nq` attends key `j` of `nk` iff
`i + (nk - nq) - left <= j <= i + (nk - nq) + right`, `None` meaning unbounded on that side. Tiles are
trimmed: every row has a key and every key has a row. The forward folds tiles into a running `Partial`; the
backward adds their gradients, given the *global* out, lse and delta, so that the tiles of one attention may be
computed in any number of calls. A kernel that computes a tile a call is a `TileKernel` (`calls.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Protocol

import torch
from packaging.version import Version
from torch import Tensor

from ringattn.kernels.partial import Partial

if TYPE_CHECKING:
    from ringattn.kernels.calls import TileCalls


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
    """Accumulators in fp32 (fp64 for fp64) that kernels ADD into; they may be views.

    dq: `[batch, nq, num_heads, head_dim]`.
    dk, dv: `[batch, nk, num_kv_heads, head_dim]` and `[batch, nk, num_kv_heads, v_head_dim]`.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor

    def tile(self, rows: slice, cols: slice) -> Grads:
        """A view of some query rows and key columns."""
        return Grads(self.dq[:, rows], self.dk[:, cols], self.dv[:, cols])

    def add(self, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Add head-major gradients, `[batch, heads, n, *]`, without their padding columns."""
        for grad, part in ((self.dq, dq), (self.dk, dk), (self.dv, dv)):
            grad.add_((part if part.shape[3] == grad.shape[3] else part[..., : grad.shape[3]]).transpose(1, 2))


@dataclass(frozen=True)
class Needs:
    """What a kernel runs on: types of device, the least compute capability of a CUDA device, and packages with the
    least version of each. ``extra`` is the library's own that brings them along; on the types ``named_only`` a kernel
    computes only where it is asked for by name."""

    devices: frozenset[str] | None = None  # None: any
    capability: tuple[int, int] = (0, 0)
    packages: Mapping[str, str] = field(default_factory=dict)
    extra: str | None = None
    named_only: frozenset[str] = frozenset()

    def lacking(self, call: Call) -> str | None:
        """What is missing here for a call, with what to do; None if nothing is."""
        if self.devices is not None and call.device_type not in self.devices:
            return f"device {call.device_type!r} has no operator here ({' and '.join(sorted(self.devices))} have)"
        if call.device_type == "cuda" and torch.cuda.get_device_capability() < self.capability:
            least = ".".join(map(str, self.capability))
            return f"the CUDA device is older than compute capability {least}"
        for name, least in self.packages.items():
            found = _installed(name)
            if found is None or Version(found) < Version(least):
                remedy = f"{name}>={least}" if self.extra is None else f"ringattn[{self.extra}]"
                return f"package {name} {least} or newer is needed, found {found or 'none'}: pip install '{remedy}'"
        return None


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


def choose(kernel: str, call: Call, registry: Sequence[Kernel]) -> Kernel:
    """The kernel of that name, or for "auto" the first of the registry that does not refuse the call.

    Raises ValueError for an unknown name, NotImplementedError where the named kernel, or with "auto" every
    kernel, refuses. A named kernel is never replaced by another.
    """
    if kernel == "auto":
        return _first_fit(call, registry)
    named = {known.name: known for known in registry}
    if kernel not in named:
        names = ["auto", *named]
        near = difflib.get_close_matches(kernel, names, n=1, cutoff=0.0)[0]
        raise ValueError(f"kernel {kernel!r} is unknown; did you mean {near!r}? There are: {', '.join(names)}")
    reason = _refusal(named[kernel], call)
    if reason is not None:
        raise NotImplementedError(
            f"kernel {kernel!r} cannot compute {call}: {reason}; kernel='auto' picks one that can, if any"
        )
    return named[kernel]


def _refusal(kernel: Kernel, call: Call) -> str | None:
    return kernel.needs.lacking(call) or kernel.refuse(call)


def _first_fit(call: Call, registry: Sequence[Kernel]) -> Kernel:
    reasons = []
    for kernel in registry:
        if call.device_type in kernel.needs.named_only:
            reasons.append(f"{kernel.name}: on device {call.device_type!r} only where it is asked for by name")
            continue
        reason = _refusal(kernel, call)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise NotImplementedError(f"no kernel for {call}. " + ". ".join(reasons))
