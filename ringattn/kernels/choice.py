"""Which kernel computes what. One that is named computes all; `auto` takes, of those that accept a call, the fastest
for each tile, where rates of the device are known, and else the first."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from ringattn.kernels.base import Call, Kernel
from ringattn.kernels.calls import TileCalls
from ringattn.kernels.rates import KernelRates, Kind
from ringattn.planning.launches import Launch

Share = tuple[Kernel, TileCalls]
LAUNCH = 5e-6  # seconds between two kernels on a device


@dataclass(frozen=True)
class Selection:
    """The kernels of a call, the fastest for each tile by ``rates``; without rates the first for all. ``refused``: why
    the others are none of them."""

    kernels: tuple[Kernel, ...]
    call: Call
    rates: KernelRates | None = None
    refused: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "+".join(kernel.name for kernel in self.kernels)

    @property
    def reads_delta(self) -> bool:
        """Whether backward is to be given delta."""
        return any(kernel.reads_delta for kernel in self.kernels)

    @property
    def direct(self) -> bool:
        """Whether what is written once may be in the dtype of the inputs."""
        return all(kernel.direct(self.call) for kernel in self.kernels)

    def shares(self, launches: Sequence[Launch], calls: TileCalls, backward: bool) -> Iterator[Share]:
        """The launches of one piece of work, with the calls they were made ready as: which kernel computes which, in
        their order."""
        taken = self.taken(launches, backward)
        pairs = zip(taken, calls.calls, strict=True)
        for kernel, some in groupby(pairs, key=lambda pair: pair[0]):
            yield kernel, replace(calls, calls=tuple(call for _, call in some))

    def taken(self, launches: Sequence[Launch], backward: bool) -> list[Kernel]:
        """The kernel of each launch. One that computes a list of tiles at once computes all of them or none."""
        if self.rates is None or len(self.kernels) == 1:
            return [self.kernels[0]] * len(launches)
        lists = [[kernel] * len(launches) for kernel in self.kernels if kernel.takes_lists]
        single = [kernel for kernel in self.kernels if not kernel.takes_lists]
        if single:
            lists.append([min(single, key=lambda kernel: self._seconds(kernel, x, backward)) for x in launches])
        return min(lists, key=lambda taken: self._whole(taken, launches, backward))

    def _whole(self, taken: Sequence[Kernel], launches: Sequence[Launch], backward: bool) -> float:
        """Seconds of all launches; those of a list are one."""
        count = 1 if taken and taken[0].takes_lists else len(launches)
        seconds = (self._seconds(kernel, launch, backward) for kernel, launch in zip(taken, launches, strict=True))
        return LAUNCH * count + sum(seconds)

    def _seconds(self, kernel: Kernel, launch: Launch, backward: bool) -> float:
        """Of one batch row."""
        assert self.rates is not None
        d, v = self.call.head_dim, self.call.v_head_dim
        flop = 2 * self.call.num_heads * ((3 * d + 2 * v) if backward else (d + v))
        return flop * launch.area / self.rates.rate(kernel.name, Kind.of(launch), backward)


def choose(kernel: str, call: Call, registry: Sequence[Kernel], rates: KernelRates | None = None) -> Selection:
    """The kernel of that name, or for "auto" those of the registry that do not refuse the call, in their order.

    Raises ValueError for an unknown name, NotImplementedError where the named kernel, or with "auto" every
    kernel, refuses. A named kernel is never replaced by another.
    """
    if kernel == "auto":
        return _those_that_fit(call, registry, rates)
    named = {known.name: known for known in registry}
    if kernel not in named:
        names = ["auto", *named]
        near = difflib.get_close_matches(kernel, names, n=1, cutoff=0.0)[0]
        raise ValueError(f"kernel {kernel!r} is unknown; did you mean {near!r}? There are: {', '.join(names)}")
    reason = _refusal(named[kernel], call)
    if reason is not None:
        others = [known.name for known in registry if known.name != kernel and _refusal(known, call) is None]
        fit = f"{', '.join(others)} can" if others else "no kernel can"
        raise NotImplementedError(
            f"kernel {kernel!r} cannot compute {call}: {reason}; {fit}, and kernel='auto' chooses"
        )
    return Selection((named[kernel].fitted(call),), call)


def _those_that_fit(call: Call, registry: Sequence[Kernel], rates: KernelRates | None) -> Selection:
    fit, reasons = [], []
    for kernel in registry:
        only_named = call.device_type in kernel.named_only
        reason = f"taken by name only on {call.device_type!r}" if only_named else _refusal(kernel, call)
        if reason is None:
            fit.append(kernel.fitted(call))
            if rates is None:
                break
        else:
            reasons.append(f"{kernel.name}: {reason}")
    if not fit:
        raise NotImplementedError(f"no kernel for {call}. " + ". ".join(reasons))
    known = [kernel for kernel in fit if rates is not None and kernel.name in rates.table]
    return Selection(tuple(known or fit[:1]), call, rates if known else None, tuple(reasons))


def _refusal(kernel: Kernel, call: Call) -> str | None:
    if call.sm_margin and not kernel.leaves_sms:
        return f"Options.sm_margin={call.sm_margin}: it cannot leave multiprocessors free"
    return kernel.needs.lacking(call) or kernel.refuse(call)
