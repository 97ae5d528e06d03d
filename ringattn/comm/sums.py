"""Sums over the ranks among which data is split.

A plain all-reduce adds up what comes, whatever it is, and waits for who does not come. So the first message of every
sum says what its rank sums, in numbers of one size whatever that is, and a rank that refuses its part of a sum sends
one that says so: ranks that differ are told, all of them. What comes behind the first message is done to its end,
whatever a signal's handler raises.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Set
from contextlib import suppress
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.arguments.tensors import plain
from ringattn.arguments.values import listed, shown
from ringattn.comm.forks import check_own
from ringattn.comm.shield import shield

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
    with Part(group, value) as part:
        if plain("value", value).dtype == torch.bool:
            raise ValueError("value is torch.bool, whose sum would be an or: pass numbers, for instance value.sum()")
        what = f"sum_over() of {tuple(value.shape)} {value.dtype} on {value.device.type}"
        copy = value.detach().clone(memory_format=torch.contiguous_format)
        nothing = torch.zeros((), dtype=torch.int64, device=value.device)
        return part.sum(what, nothing, lambda _: add_up(copy, group))


def sum_gradients(parameters: Iterable[Tensor], group: Group = None, *, whole: Iterable[Tensor] = ()) -> None:
    """Adds up the gradients of shares over the ranks of ``group``, in place: what to do between ``backward()`` and the
    optimizer where no wrapper (DDP, FSDP) does.

    Args:
        parameters: the same on all ranks, in the same order; each counts once. Those without a gradient on some ranks
            count as zero there, those without one on all ranks stay without.
        group: data x context (see :mod:`ringattn.loss`).
        whole: parameters whose gradient is whole on every rank of the context already, since they went through
            ``cp.shard(x)`` and nowhere else; these are left alone. (``cp.shard(x, grad="share")`` gives a share.)

    Raises:
        ValueError: a parameter of FSDP or tensor parallel layers, which sum their own, or ranks whose parameters differ
            (in number, shape or dtype, or in which of them require a gradient).
    """
    with Part(group) as part:
        if isinstance(parameters, Set):
            raise ValueError("parameters are a set: must be in an order that is the same on all ranks; pass a list")
        given = _parameters("parameters", parameters)
        alone = {id(parameter) for parameter in _parameters("whole", whole)}
        shared = [p for p in given if p.requires_grad and id(p) not in alone]
        _check_gradients(shared)
        nothing = torch.zeros((), device=shared[0].device if shared else device_of(group))
        kinds = [(*p.shape, _gradient_dtype(p), p.device.type, p.requires_grad, id(p) in alone) for p in given]
        what = f"sum_gradients() of {len(shared)} parameters, of {len(given)} given: {kinds}"
        part.sum(what, nothing, lambda _: _sum_gradients(shared, group), wait=True)


def _parameters(name: str, given: Iterable[Tensor]) -> list[Tensor]:
    """Each once, in the order given."""
    found = [plain(name, parameter) for parameter in listed(name, given, "parameters", PARAMETERS)]
    return list({id(parameter): parameter for parameter in found}.values())


def _sum_gradients(shared: list[Tensor], group: Group) -> None:
    """Adds them up once every rank has its own as all can sum them."""
    if group is None or not shared:
        return
    forms = add_up(torch.tensor([_form(p) for p in shared]).to(shared[0].device), group).tolist()
    made: dict[int, Tensor] = {}
    with Part(group, shared[0]) as part:
        for at, (parameter, form) in enumerate(zip(shared, forms, strict=True)):
            if any(form):
                made[at] = _alike(parameter, _sparse_dim(*form))
        nothing = torch.zeros((), device=shared[0].device)
        part.sum("gradients in one form", nothing, lambda _: [add_up(grad, group) for grad in made.values()], wait=True)
    for at, grad in made.items():
        shared[at].grad = grad


def _form(parameter: Tensor) -> list[int]:
    """Of a gradient, whether it is dense, and sparse, and the dims that it is sparse in, and their square."""
    grad = parameter.grad
    if grad is None:
        return [0, 0, 0, 0]
    return [0, 1, grad.sparse_dim(), grad.sparse_dim() ** 2] if grad.is_sparse else [1, 0, 0, 0]


def _sparse_dim(dense: int, sparse: int, dims: int, squares: int) -> int:
    """In how many dims the sum over all ranks is sparse; 0 where it is dense, as it is if they differ."""
    return dims // sparse if not dense and sparse * squares == dims * dims else 0


def _is_dtensor(tensor: Tensor) -> bool:
    """Whoever has one has loaded its module, which takes half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _check_gradients(parameters: list[Tensor]) -> None:
    """Raises ValueError for gradients that could not be summed with those of other ranks."""
    begins: set[int] = set()
    for parameter in parameters:
        if _is_dtensor(parameter):
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is a DTensor: FSDP and tensor parallel layers sum "
                "the gradients of their parameters themselves; leave these out"
            )
        grad = parameter.grad
        if grad is None:
            continue
        if grad.layout not in (torch.strided, torch.sparse_coo) or grad.dtype != _gradient_dtype(parameter):
            raise ValueError(
                f"a gradient of {grad.dtype}, {grad.layout}, for a parameter of shape {tuple(parameter.shape)} "
                f"{parameter.dtype}: must be of its dtype (or of its grad_dtype), dense or sparse COO; convert it"
            )
        if grad.layout == torch.strided and grad.numel():
            if grad.data_ptr() in begins:
                raise ValueError(
                    f"the gradient of a parameter of shape {tuple(parameter.shape)} lies in the memory of another's, "
                    "and would be summed twice; clone one of them"
                )
            begins.add(grad.data_ptr())


def _gradient_dtype(parameter: Tensor) -> torch.dtype:
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def _alike(parameter: Tensor, sparse_dim: int) -> Tensor:
    """The gradient as all ranks can sum it: sparse in so many dims, or dense and in the memory format that all have."""
    grad, dtype = parameter.grad, _gradient_dtype(parameter)
    if grad is None and sparse_dim:
        none = torch.zeros(sparse_dim, 0, dtype=torch.int64, device=parameter.device)
        return torch.sparse_coo_tensor(
            none, parameter.new_zeros(0, *parameter.shape[sparse_dim:], dtype=dtype), parameter.shape
        )
    if grad is None:
        return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
    if sparse_dim:
        return grad
    return (grad.to_dense() if grad.is_sparse else grad).resolve_conj().resolve_neg().contiguous()


class Part:
    """One rank's part of a sum over ``group``. What it raises before its first message, in the `with`, it tells the
    others, over the device of the tensor ``on``. ``announced``: its first message, or that, may be under way."""

    def __init__(self, group: Group, on: object = None) -> None:
        self.group, self.announced = group, False
        self._on = on if isinstance(on, Tensor) and not on.is_meta else None

    def __enter__(self) -> Part:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            return
        try:
            shield(self._refuse)
        except BaseException:  # a second interrupt, right after the first
            shield(self._refuse)
            raise

    def _refuse(self) -> None:
        if self.announced or not isinstance(self.group, (DeviceMesh, dist.ProcessGroup)):
            return
        self.announced = True
        with suppress(RuntimeError):  # the error itself matters more
            device = device_of(self.group) if self._on is None else self._on.device
            add_up(torch.tensor([0, 1, 0, 0, 0, 0]).to(device), self.group)

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
    if torch.compiler.is_compiling() and not isinstance(group, DeviceMesh):  # for which a group is no ProcessGroup
        return [] if group is None else [group]
    check_group(group)
    axes = list(group.get_all_groups()) if isinstance(group, DeviceMesh) else [] if group is None else [group]
    for axis in axes:
        check_own(axis)
    return axes
