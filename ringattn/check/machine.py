"""Checks the machine that it runs on: links, and exactness of each schedule, head split and kernel. What ``ringattn
check`` runs without a model, alone or as one rank of many.

Every item is a call of all ranks, whose answers rank 0 judges. None depends on how many there are but by a ring's steps
and the comparison of answers, which grow with the ranks; a rank computes for at most 1,025 tokens (see
:mod:`ringattn.check.exactness`) and sends some 80 MB on each level of links.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from ringattn.check.exactness import LARGEST, Deviation, Exactness
from ringattn.check.place import Place, Seen, shared_gpus
from ringattn.comm import PeerError, ProcessGroupTransport, SharedMemoryTransport, Transport
from ringattn.comm.started import by_mpi, ranks_of_mpi
from ringattn.context import ContextParallel, Group
from ringattn.kernels import KERNELS, Call, Kernel
from ringattn.kernels.hub import HubFlash2, HubFlash3
from ringattn.links import measure_each
from ringattn.planning.heads import divisors
from ringattn.planning.topology import Link
from ringattn.runtime.nodes import told_nodes
from ringattn.runtime.settings import Options

OK, FAILS, SKIPPED = "ok", "fails", "skipped"
SCHEDULES = ("ring", "exchange", "gather", "double_ring")
DTYPES = {"cpu": (torch.float32, torch.float64), "cuda": (torch.bfloat16, torch.float32)}  # of kernels


@dataclass(frozen=True)
class Answer:
    """What one rank found of an item. Of the answers that decide, the one with the largest weight is quoted."""

    status: str
    said: str
    weight: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What all ranks found: ok, fails or skipped, and why. ``lost``: some gave no answer. ``ranks``: their answers, on
    rank 0; None of one that gave none."""

    item: str
    status: str
    said: str
    lost: bool = False
    ranks: tuple[Answer | None, ...] = ()

    def __str__(self) -> str:
        return f"{self.status:<7} {self.item}: {'because ' if self.status == SKIPPED else ''}{self.said}"


@dataclass(frozen=True)
class MachineReport:
    """All findings, alike on all ranks but for what each of them said, which rank 0 knows. ``stopped``: why items are
    missing, "" where none are."""

    ranks: tuple[Seen, ...]
    findings: tuple[Finding, ...]
    stopped: str
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.stopped and all(finding.status != FAILS for finding in self.findings)


@dataclass(frozen=True)
class Item:
    """One thing to check; ``run`` is a call of all ranks."""

    name: str
    run: Callable[[], Answer]


def check_machine(place: Place, tell: Callable[[Finding], None]) -> MachineReport:
    """Runs all items, a failed one too: then with contexts made anew, and no further where that cannot be done.

    Raises :class:`~ringattn.check.tally.RankLost` where rank 0 is gone.
    """
    start, machine, findings, stopped = time.monotonic(), _Machine(place), list[Finding](), ""
    for item in machine.items():
        finding = _settled(place, item)
        findings.append(finding)
        tell(finding)
        if finding.lost:
            stopped = "some ranks are lost"
            break
        if finding.status == FAILS:
            again = _settled(place, Item("contexts after a failure", machine.renew))
            if again.status == FAILS:
                stopped = f"{item.name} failed, and contexts cannot be made again: {again.said}"
                break
    return MachineReport(place.everyone, tuple(findings), stopped, time.monotonic() - start)


def _settled(place: Place, item: Item) -> Finding:
    try:
        answer = item.run()
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        weight = LARGEST / 2 if isinstance(error, PeerError) else LARGEST  # of another rank's own words
        answer = Answer(FAILS, f"rank {place.rank} raised {said}", weight)
    answers: list[Answer | None] = []

    def judge(all_of_them: list[dict[str, Any] | None]) -> tuple[str, str, bool]:
        answers.extend(None if one is None else Answer(**one) for one in all_of_them)
        return judged(answers, place.timeout)

    status, said, lost = place.tally.settle(asdict(answer), judge)
    return Finding(item.name, status, said, lost, tuple(answers))


def judged(answers: Sequence[Answer | None], timeout: float) -> tuple[str, str, bool]:
    """Status and words of all ranks' answers, and whether any is missing: that, or one that fails, fails the item."""
    given = [answer for answer in answers if answer is not None]
    if len(given) < len(answers):
        lost = ", ".join(str(rank) for rank, answer in enumerate(answers) if answer is None)
        return FAILS, f"no answer within {timeout:g} s from rank {lost}: dead, or hanging", True
    status = next(one for one in (FAILS, OK, SKIPPED) if any(answer.status == one for answer in given))
    those = [answer for answer in given if answer.status == status]
    said = max(those, key=lambda answer: answer.weight).said
    if status == FAILS and len(those) > 1:
        said += f" ({len(those)} of {len(given)} ranks)"
    return status, said, False


class _Machine:
    """The items, and the contexts that they go on from."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.exact = Exactness(place.size, place.device)
        nodes = told_nodes(os.environ, range(place.size), place.rank)
        self.ranks_per_node = (nodes.ranks_per_node if nodes else None) or place.size

    def items(self) -> Iterator[Item]:
        yield Item("ranks", self._ranks)
        yield Item("versions", self._versions)
        yield Item("transport", self.renew)
        if self.place.size > 1:
            transport = self.cp.link.transport
            yield Item(f"links over {_name(transport)}", partial(self._links, transport))
            yield from (Item(f"schedule {name}", partial(self._schedule, name)) for name in SCHEDULES)
            yield from self._splits()
            yield Item("subsets of ranks", self._subsets)
            yield from self._other_transports()
        yield from self._kernels()

    def renew(self) -> Answer:
        """The context of all items, made anew."""
        self.cp = self._context(self.place.group)
        nodes = "" if self.place.size == 1 else f", {self.ranks_per_node} of {self.place.size} ranks a node"
        return Answer(OK, f"{_name(self.cp.link.transport)}{nodes}")

    def _context(self, group: Group) -> ContextParallel:
        masks, options = tuple(self.exact.masks.values()), Options(timeout=self.place.timeout)
        return ContextParallel(group, self.exact.seqlen, mask=masks, layout="zigzag", options=options)

    def _ranks(self) -> Answer:
        """Those that were started, of which rank 0 knows all: its answer has the weight."""
        everyone = self.place.everyone
        hosts = len({seen.host for seen in everyone})
        number = f"{len(everyone)} on {hosts} host{'s' if hosts > 1 else ''}" if len(everyone) > 1 else "1"
        devices = ", ".join(sorted({seen.device for seen in everyone}))
        shared = "; several share a GPU, each a host of its own for NCCL" if shared_gpus(everyone) else ""
        alone = "" if self.place.size > 1 else "; on several: torchrun --nproc-per-node 2 -m ringattn.cli check"
        return Answer(OK, f"{number}, {devices}{shared}{alone}", weight=0.0 if self.place.rank else 1.0)

    def _versions(self) -> Answer:
        """Those of all ranks, which rank 0 compares."""
        kinds = {"ringattn": "ringattn", "torch": "torch", "python": "Python", "nccl": "NCCL"}
        found = {name: sorted({getattr(seen, key) for seen in self.place.everyone}) for key, name in kinds.items()}
        apart = {name: versions for name, versions in found.items() if len(versions) > 1}
        if apart:
            said = "; ".join(f"{name} is {' and '.join(versions)}" for name, versions in apart.items())
            return Answer(FAILS, f"ranks differ: {said}; install the same everywhere", 1.0)
        said = ", ".join(f"{name} {versions[0]}" for name, versions in found.items() if versions[0])
        return Answer(OK, said, weight=0.0 if self.place.rank else 1.0)

    def _links(self, transport: Transport) -> Answer:
        topology, own = measure_each(transport, self.ranks_per_node)
        inside = "inside of a node" if self.ranks_per_node < self.place.size else "between ranks"
        levels = {"between nodes" if self.ranks_per_node == 1 else inside: topology.intra}
        if topology.inter is not None:
            levels["between nodes"] = topology.inter
        said = "; ".join(f"{level} {_link(link)}" for level, link in levels.items())
        mine = {level: asdict(link) for level, link in zip(("inside", "between"), own, strict=True) if link}
        return Answer(OK, f"{said} (of the slowest rank, each way)", figures=mine)

    def _schedule(self, name: str) -> Answer:
        if name == "double_ring" and not 1 < self.ranks_per_node < self.place.size:
            nodes = f"{self.place.size} ranks with {self.ranks_per_node} a node"
            return Answer(SKIPPED, f"it is for several nodes of several ranks each, and here are {nodes}")
        return self._exactly(schedule=name)

    def _splits(self) -> Iterator[Item]:
        heads, size = self.exact.sizes.heads, self.place.size
        numbers = [number for number in divisors(size) if 1 < number <= heads]
        yield from (Item(f"ulysses={number}", partial(self._exactly, ulysses=number)) for number in numbers)
        if not numbers:
            none = f"no number from 2 to {heads}, of its heads, divides {size} ranks"
            yield Item("ulysses", partial(Answer, SKIPPED, none))

    def _subsets(self) -> Answer:
        """Even and odd ranks apart, at the same time, over the connections of all."""
        if self.place.size < 3:
            return Answer(SKIPPED, "each of two ranks would be alone")
        mine = range(self.place.rank % 2, self.place.size, 2)
        return self._compared(self.cp.on(mine, schedule="ring"))

    def _other_transports(self) -> Iterator[Item]:
        """Those that users name, beside the one that contexts take by themselves."""
        if isinstance(self.cp.link.transport, SharedMemoryTransport):
            yield Item("transport gloo", self._over_gloo)
        if by_mpi(os.environ):
            yield Item("transport MPI", self._over_mpi)

    def _over_gloo(self) -> Answer:
        assert self.place.group is not None
        return self._over(ProcessGroupTransport(self.place.group, self.place.timeout))

    def _over_mpi(self) -> Answer:
        try:
            comm = ranks_of_mpi(self.place.size)
        except ImportError as error:
            return Answer(SKIPPED, f"mpi4py cannot be imported ({error}): pip install 'ringattn[mpi]'")
        return self._over(comm)

    def _over(self, group: Group) -> Answer:
        cp = self._context(group)
        found, links = self._compared(cp.replace(schedule="ring")), self._links(cp.link.transport)
        return Answer(found.status, f"{found.said}; {links.said}", found.weight, found.figures | links.figures)

    def _exactly(self, **settings: Any) -> Answer:
        return self._compared(self.cp.replace(**settings))

    def _compared(self, cp: ContextParallel) -> Answer:
        """In fp64, which shows what messages do; on a GPU by the definition, which computes in it."""
        if self.place.device.type == "cuda":
            cp = cp.replace(kernel="reference")
        return self._judged([self.exact.worst(cp, mask, torch.float64) for mask in self.exact.masks], "fp64")

    def _judged(self, deviations: Sequence[Deviation], dtypes: str) -> Answer:
        worst = max(deviations, key=lambda one: one.weight)
        where = f" on rank {self.place.rank}" if self.place.size > 1 else ""
        status = OK if worst.weight <= 1 else FAILS
        return Answer(status, f"{dtypes}, {worst}{where}", worst.weight, asdict(worst))

    def _kernels(self) -> Iterator[Item]:
        """One each, but for those of other devices, which have one together for each reason."""
        absent: dict[str, list[str]] = {}
        for kernel in KERNELS:
            if why := kernel.needs.elsewhere(self.place.device.type):
                absent.setdefault(why, []).append(kernel.name)
            else:
                yield Item(f"kernel {kernel.name}", partial(self._kernel, kernel))
        for why, names in absent.items():
            yield Item(f"kernel{'s' if len(names) > 1 else ''} {', '.join(names)}", partial(Answer, SKIPPED, why))

    def _kernel(self, kernel: Kernel) -> Answer:
        """A kernel by name, over every dtype and mask that it does not refuse."""
        if isinstance(kernel, (HubFlash2, HubFlash3)):
            return Answer(SKIPPED, "it fetches code, which is left to those who name it")
        cp, deviations, refused, dtypes = self.cp.replace(kernel=kernel.name), list[Deviation](), list[str](), []
        for dtype in DTYPES[self.place.device.type]:
            for mask in self.exact.masks:
                try:
                    deviations.append(self.exact.worst(cp, mask, dtype))
                    dtypes.append(str(dtype).removeprefix("torch."))
                except NotImplementedError as error:
                    refused.append(self._reason(kernel, dtype) or " ".join(str(error).split()))
        if not deviations:
            return Answer(SKIPPED, refused[0])
        answer = self._judged(deviations, " and ".join(dict.fromkeys(dtypes)))
        return Answer(answer.status, "; refuses: ".join([answer.said, *refused[:1]]), answer.weight, answer.figures)

    def _reason(self, kernel: Kernel, dtype: torch.dtype) -> str | None:
        sizes, device = self.exact.sizes, self.place.device
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        call = Call(
            device.type, dtype, sizes.dim, sizes.dim, sizes.heads, sizes.kv_heads,
            windowed=True, dlse=True, capability=capability,
        )  # fmt: skip
        return kernel.needs.lacking(call) or kernel.refuse(call)


def _name(transport: Transport) -> str:
    if isinstance(transport, ProcessGroupTransport):
        return "NCCL" if transport.blind else "gloo"
    names = {"SharedMemoryTransport": "shared memory", "MPITransport": "MPI", "Solo": "none, one rank"}
    return names.get(type(transport).__name__, transport.name)


def _link(link: Link) -> str:
    return f"{link.bytes_per_second / 1e9:.2f} GB/s, {1e6 * link.latency:.0f} microseconds"
