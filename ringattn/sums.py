"""Sums over the ranks among which data is split.

A plain all-reduce adds up what comes, whatever it is, and waits for who does not come. So the first message of every
sum says what its rank sums, in numbers of one size whatever that is, and a rank that refuses its part of a sum sends
one that says so: ranks that differ are told, all of them. What comes behind the first message is done to its end,
whatever a signal's handler raises.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ringattn.arguments import listed, shown
from ringattn.shield import shield
from ringattn.tensors import plain

REFUSED = "another rank refused its part of the sum (its own error says why)"
DIFFER = "every rank must call the same function with tensors of the same shapes and dtypes, and other ranks do not"

PARAMETERS = 1 << 20  # of one model
Result = TypeVar("Result")
Group = dist.ProcessGroup | DeviceMesh | None


def sum_over(value: Tensor, group: Group = None) -> Tensor:
    """The sum of ``value`` over the ranks of ``group``, detached: of shares, the loss to log.

    The device must be one whose tensors the group moves. Raises ``ValueError`` for a group this rank is not in, and
    where ranks differ in shape or dtype (on a GPU, which would have to be waited for, by PyTorch's own assertion).
    """
    with taking_part(group, value) as part:
        plain("value", value)
        what = f"sum_over() of {tuple(value.shape)} {value.dtype} on {value.device.type}"
        copy = value.detach().clone(memory_format=torch.contiguous_format)
        nothing = torch.zeros((), dtype=torch.int64, device=value.device)
        return part.sum(what, nothing, lambda _: add_up(copy, group))


def sum_gradients(parameters: Iterable[Tensor], group: Group = None, *, whole: Iterable[Tensor] = ()) -> None:
    """Adds up the gradients of shares over the ranks of ``group``, in place: what to do between ``backward()`` and the
    optimizer where no wrapper (DDP, FSDP) does.

    Args:
        parameters: the same on all ranks; those without a gradient on some ranks count as zero there, those without
            one on all ranks stay without.
        group: data x context (see :mod:`ringattn.loss`).
        whole: parameters whose gradient is whole on every rank of the context already, since they went through
            ``cp.shard(x)`` and nowhere else; these are left alone. (``cp.shard(x, grad="share")`` gives a share.)

    Raises:
        ValueError: a parameter of FSDP or tensor parallel layers, which sum their own, or ranks whose parameters differ
            (in number, shape or dtype, or in which of them require a gradient).
    """
    with taking_part(group) as part:
        alone = {id(parameter) for parameter in _parameters("whole", whole)}
        shared = [p for p in _parameters("parameters", parameters) if p.requires_grad and id(p) not in alone]
        for parameter in shared:
            if isinstance(parameter, DTensor):
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is a DTensor: FSDP and tensor parallel layers sum "
                    "the gradients of their parameters themselves; leave these out"
                )
            _check_gradient(parameter)
        nothing = torch.zeros((), device=shared[0].device if shared else device_of(group))
        sizes = [(*p.shape, _gradient_dtype(p), p.device.type) for p in shared]
        what = f"sum_gradients() of {len(sizes)} parameters {sizes}"
        part.sum(what, nothing, lambda _: _sum_gradients(shared, group), wait=True)


def _parameters(name: str, given: Iterable[Tensor]) -> list[Tensor]:
    return [plain(name, parameter) for parameter in listed(name, given, "parameters", PARAMETERS)]


def _sum_gradients(shared: list[Tensor], group: Group) -> None:
    if group is None or not shared:
        return
    held = torch.tensor([[_is(p, torch.strided), _is(p, torch.sparse_coo)] for p in shared], dtype=torch.int32)
    for parameter, (dense, sparse) in zip(shared, add_up(held.to(shared[0].device), group).tolist(), strict=True):
        if dense or sparse:
            parameter.grad = add_up(_alike(parameter, sparse=not dense), group)


def _check_gradient(parameter: Tensor) -> None:
    """Raises ValueError for a gradient that could not be summed with those of other ranks."""
    grad = parameter.grad
    if grad is None:
        return
    if grad.layout not in (torch.strided, torch.sparse_coo) or grad.dtype != _gradient_dtype(parameter):
        raise ValueError(
            f"a gradient of {grad.dtype}, {grad.layout}, for a parameter of shape {tuple(parameter.shape)} "
            f"{parameter.dtype}: must be of its dtype (or of its grad_dtype), dense or sparse COO; convert it"
        )


def _gradient_dtype(parameter: Tensor) -> torch.dtype:
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def _is(parameter: Tensor, layout: torch.layout) -> bool:
    return parameter.grad is not None and parameter.grad.layout is layout


def _alike(parameter: Tensor, sparse: bool) -> Tensor:
    """The gradient as all ranks can sum it: sparse where none is dense, in the memory format that all have."""
    grad = parameter.grad
    if grad is None:
        rows = torch.zeros(1, 0, dtype=torch.int64, device=parameter.device)
        dtype = _gradient_dtype(parameter)
        if sparse:
            return torch.sparse_coo_tensor(
                rows, parameter.new_zeros(0, *parameter.shape[1:], dtype=dtype), parameter.shape
            )
        return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
    if sparse:
        return grad
    return grad.to_dense() if grad.is_sparse else grad.contiguous()


class Part:
    """What one rank does in a sum over ``group``; ``announced`` once its first message may be under way."""

    def __init__(self, group: Group) -> None:
        self.group, self.announced = group, False

    def sum(self, what: str, number: Tensor, then: Callable[[Tensor], Result], *, wait: bool = False) -> Result:
        """The first message, which compares over all ranks ``what`` they sum and sums up an integer with it, and
        what comes behind it: both or, on all ranks, neither.

        Args:
            what: in words, the same on every rank.
            number: scalar, on the device over which the message goes.
            then: what to do next, given the sum of the integers, int64.
            wait: for a device that is not the CPU, so that ranks that differ raise here and not by an assertion there.

        Raises:
            ValueError: a rank refused its part, or ranks differ in ``what``.
        """
        if not _axes(self.group):
            return then(number.to(torch.int64))

        def messages() -> Result:
            self.announced = True
            return then(_announce(what, self.group, number, wait))

        return shield(messages)


def _announce(what: str, group: Group, number: Tensor, wait: bool) -> Tensor:
    digest = hashlib.sha256(what.encode()).digest()
    marks = [int.from_bytes(digest[at : at + 2], "little") for at in (0, 2)]
    message = torch.tensor([0, 0, *marks, *(mark * mark for mark in marks)]).to(number.device, non_blocking=True)
    message[0] = number
    total, refusals, *sums = add_up(message, group).unbind()
    # By Cauchy and Schwarz equal only if all marks are; below 2**63 for 2**15 ranks.
    ranks = math.prod(axis.size() for axis in _axes(group))
    alike = [ranks * squares == s * s for s, squares in zip(sums[:2], sums[2:], strict=True)]
    if message.device.type != "cpu" and not wait:
        torch._assert_async((refusals == 0) & alike[0] & alike[1], f"{REFUSED}, or {DIFFER}")
    elif refusals:
        raise ValueError(REFUSED)
    elif not all(alike):
        raise ValueError(f"this rank is in {what[:300]}: {DIFFER}")
    return total


@contextmanager
def taking_part(group: Group, on: object = None) -> Iterator[Part]:
    """A rank that raises in here before its first message sends one that tells the others, over the device of the
    tensor ``on``."""
    part = Part(group)
    try:
        yield part
    except BaseException:
        if isinstance(group, (DeviceMesh, dist.ProcessGroup)) and not part.announced:
            device = on.device if isinstance(on, Tensor) and on.device.type != "meta" else device_of(group)
            with suppress(RuntimeError):  # the error itself matters more
                shield(lambda: add_up(torch.tensor([0, 1, 0, 0, 0, 0]).to(device), group))
        raise


def device_of(group: Group) -> torch.device:
    """Where what a group sums lies, if nothing else says so."""
    if isinstance(group, DeviceMesh):
        return torch.device(group.device_type)
    kinds = {str(device) for device in group._device_types} if isinstance(group, dist.ProcessGroup) else set()
    return torch.device("cuda" if "cuda" in kinds and torch.cuda.is_available() else "cpu")


def add_up(value: Tensor, group: Group) -> Tensor:
    """Summed over the axes of a group, in place."""
    for axis in _axes(group):
        dist.all_reduce(value, group=axis)
    return value


def check_group(group: object) -> None:
    """Raises ValueError for what is no group to sum over."""
    if group is not None and not isinstance(group, (DeviceMesh, dist.ProcessGroup)):
        raise ValueError(f"group={shown(group)}: pass a ProcessGroup that this rank is in, a DeviceMesh, or None")


def _axes(group: Group) -> list[dist.ProcessGroup]:
    check_group(group)
    if isinstance(group, DeviceMesh):
        return list(group.get_all_groups())
    return [group] if group is not None else []
