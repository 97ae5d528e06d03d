"""Token-wise modules (MLPs, norms, projections) computed over pieces of a shard's tokens, exactly.

What acts on each token alone can be computed a piece of the tokens at a time, so that its inner widths are never held
of all tokens at once (the TiledMLP of Arctic Long Sequence Training, arXiv 2506.13996).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from ringattn.arguments.tensors import dim_of, plain
from ringattn.arguments.values import integer, shown

MOST_TILES = 1 << 20  # each is a call of the function
WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # what gradients are added up in
CASTS = "ToCopyBackward0"  # of a parameter to autocast's dtype, which autocast keeps from one call to the next
GATHERS = "RegisterPostBackwardFunctionBackward"  # what FSDP2 puts before the forward of a module it has wrapped

Tensors = tuple[Tensor, ...]


def tiled(fn: Callable[..., Any], x: Tensor, *others: Tensor, tiles: int, dim: int = 1) -> Any:
    """``fn(x, *others)`` in pieces of the tokens, none of which keeps what it computed on the way.

    Backward computes each piece again, with the dropout that it drew and under the autocast that it saw. Parameters
    are found, not named: each that ``fn`` uses gets one gradient, the sum over all pieces, added up in fp32 where the
    parameter has 16 bits. So what acts on gradients (DDP, FSDP2) acts once, and ranks may have other numbers of
    tiles. In a graph of ``torch.compile`` pieces are checkpointed instead, and added up in the parameter's dtype.

    Args:
        fn: a module or function of pieces of all the tensors, each token by itself. That cannot be checked, but for the
            length of what it returns. It must compute the same when it is called again.
        x: ``[..., tokens, ...]``, any dtype.
        others: more tensors with as many tokens in the same dim.
        tiles: how many pieces, of lengths that differ by at most one; more than there are tokens are one for each.
        dim: the dim of the tokens, in what goes in and in what comes out.

    Returns:
        What ``fn`` would: a tensor, or a tuple of tensors.

    Raises:
        ValueError: tensors of unequal numbers of tokens; a result of another number than its piece has; an ``fn`` that
            uses a tensor made outside of it, other than a parameter, to which a gradient flows: pass it in ``others``;
            a parameter with a ``register_hook``, which would be called for each piece.
        NotImplementedError: an ``fn`` that is or holds a module wrapped by ``fully_shard``, which would gather and sum
            for each piece: wrap the module whose forward calls ``tiled()``.
    """
    inputs = x, *others
    at = dim_of(plain("x", x), dim)
    _check(fn, inputs, at)
    tiles = integer("tiles", tiles, 1, MOST_TILES, ", a number of pieces")
    call = _Call(fn, at, max(1, min(tiles, x.size(at))))
    if torch.compiler.is_compiling():
        return call.checkpointed(inputs)
    if not torch.is_grad_enabled():
        return call.run(inputs).returned
    surroundings = _Surroundings.now(x.device.type, inputs)
    with saved_tensors_hooks(_nothing, _nothing):  # a graph to be looked at, which holds nothing
        found = call.run(inputs)
    if any(found.differentiable):
        again = call, surroundings, found.differentiable
        found.outputs = list(_Tiled.apply(again, found.outputs, len(inputs), *inputs, *found.parameters.values()))
    return found.returned


@dataclass(slots=True)
class _Found:
    """What the pieces gave: whole results, whether a gradient flows into each, and the parameters (by identity) that
    one flows on to. ``single``: the function returns a tensor and no tuple."""

    outputs: list[Tensor] = field(default_factory=list)
    differentiable: list[bool] = field(default_factory=list)
    parameters: dict[int, Tensor] = field(default_factory=dict)
    single: bool = True

    @property
    def returned(self) -> Any:
        return self.outputs[0] if self.single else tuple(self.outputs)


@dataclass(frozen=True, slots=True)
class _Call:
    """A function, the dim of the tokens, and in how many pieces."""

    fn: Callable[..., Any]
    dim: int
    tiles: int

    def pieces(self, inputs: Sequence[Tensor]) -> Iterator[tuple[int, Tensors]]:
        """Where each piece begins, and what it is of each tensor."""
        start = 0
        for piece in zip(*(x.tensor_split(self.tiles, self.dim) for x in inputs), strict=True):
            yield start, piece
            start += piece[0].size(self.dim)

    def results(self, piece: Tensors) -> tuple[Tensors, bool]:
        """Those of a piece, and whether the function returned a tensor and no tuple."""
        given = self.fn(*piece)
        single, tokens = isinstance(given, Tensor), piece[0].size(self.dim)
        results = (given,) if single else tuple(given) if isinstance(given, (tuple, list)) else ()
        if not results or not all(isinstance(x, Tensor) for x in results):
            raise ValueError(f"fn returned {shown(given)}: must return a tensor, or a tuple of tensors")
        for x in results:
            if x.ndim <= self.dim or x.size(self.dim) != tokens:
                raise ValueError(
                    f"fn returned {tuple(x.shape)} for a piece of {tokens} tokens in dim {self.dim}: must have as many "
                    "there; tiled() is for what acts on each token alone"
                )
        return results, single

    def run(self, inputs: Tensors) -> _Found:
        """All pieces, one after the other."""
        found, grad = _Found(), torch.is_grad_enabled()
        for start, piece in self.pieces(inputs):
            born = _born() if grad else 0
            leaves = tuple(_leaf(x, x.requires_grad and grad) for x in piece)
            results, found.single = self.results(leaves)
            if not found.outputs:
                found.differentiable = [False] * len(results)
            found.differentiable = [x.requires_grad | y for x, y in zip(results, found.differentiable, strict=True)]
            used = (x for x in _leaves(results, born) if all(x is not leaf for leaf in leaves))
            found.parameters.update((id(x), _without_hooks(x)) for x in used)
            self._keep(found.outputs, results, start, inputs[0].size(self.dim))
            del results, leaves
        return found

    def _keep(self, outputs: list[Tensor], results: Tensors, start: int, tokens: int) -> None:
        """Lays the results of a piece where they belong."""
        if not outputs:
            outputs += [x.new_empty((*x.shape[: self.dim], tokens, *x.shape[self.dim + 1 :])) for x in results]
        for home, x in zip(outputs, results, strict=True):
            home.narrow(self.dim, start, x.size(self.dim)).copy_(x.detach())

    def checkpointed(self, inputs: Tensors) -> Any:
        """The same in PyTorch's own words, which compilers know."""
        found = [checkpoint(self.fn, *piece, use_reentrant=False) for _, piece in self.pieces(inputs)]
        if isinstance(found[0], Tensor):
            return torch.cat(found, dim=self.dim)
        return tuple(torch.cat(column, dim=self.dim) for column in zip(*found, strict=True))


class _Tiled(torch.autograd.Function):
    """Takes results that are there already; backward computes them again, piece by piece."""

    @staticmethod
    def forward(ctx: Any, again: Any, outputs: list[Tensor], count: int, *tensors: Tensor) -> Tensors:
        ctx.call, ctx.surroundings, differentiable = again
        ctx.count = count
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x, flows in zip(outputs, differentiable, strict=True) if not flows))
        ctx.save_for_backward(*tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[3:]
        sums: list[Tensor | None] = [None] * len(tensors)
        # pieces save for themselves, whatever is done around backward() with what is saved
        saving = saved_tensors_hooks(Tensor.detach, lambda x: x)
        with torch.enable_grad(), ctx.surroundings.again(), saving:
            for start, piece in ctx.call.pieces(tensors[: ctx.count]):
                _differentiate(ctx.call, start, piece, tensors, wanted, douts, sums)
        return None, None, None, *(x if x is None else x.to(y.dtype) for x, y in zip(sums, tensors, strict=True))


def _differentiate(
    call: _Call, start: int, piece: Tensors, tensors: Tensors, wanted: Sequence[bool],
    douts: Sequence[Tensor | None], sums: list[Tensor | None],
) -> None:  # fmt: skip
    """Computes a piece again, lays the gradients of its tokens in ``sums``, and adds those of parameters to them."""
    count, tokens = len(piece), piece[0].size(call.dim)
    leaves = tuple(_leaf(x, needed) for x, needed in zip(piece, wanted, strict=False))
    results, _ = call.results(leaves)
    pairs = [
        (x, dout.narrow(call.dim, start, tokens))
        for x, dout in zip(results, douts, strict=True)
        if dout is not None and x.requires_grad
    ]
    if not pairs:
        return
    places = [i for i, needed in enumerate(wanted) if needed]
    sources = [leaves[i] if i < count else tensors[i] for i in places]
    roots, grads = zip(*pairs, strict=True)
    found = list(torch.autograd.grad(roots, sources, grads, allow_unused=True))
    del results, pairs, roots, grads
    for i in places:
        grad = found.pop(0)
        if grad is None:
            continue
        known = sums[i]
        if i < count:
            home = torch.zeros_like(tensors[i]) if known is None else known
            home.narrow(call.dim, start, tokens).copy_(grad)
            sums[i] = home
        elif known is None:  # a copy: the gradients of several may be one tensor
            sums[i] = grad.to(WIDE.get(grad.dtype, grad.dtype), copy=True)
        else:
            known.add_(grad)


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """What a piece depends on besides its tensors: the states of random generators, and autocast."""

    device: str
    cpu: Tensor
    devices: list[int]
    states: list[Tensor]
    casts: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, device: str, inputs: Tensors) -> _Surroundings:
        devices, states = get_device_states(*inputs)
        types = [t for t in dict.fromkeys((device, "cpu")) if torch.amp.is_autocast_available(t)]
        casts = tuple((t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types)
        return cls(device, torch.get_rng_state(), devices, states, casts)

    @contextmanager
    def again(self) -> Iterator[None]:
        """As it was; afterwards as it is now. Each parameter is cast once for all pieces."""
        with ExitStack() as stack:
            kind = {} if self.device == "cpu" else {"device_type": self.device}
            stack.enter_context(torch.random.fork_rng(self.devices, **kind))
            torch.set_rng_state(self.cpu)
            if self.devices:
                set_device_states(self.devices, self.states, device_type=self.device)
            for device, enabled, dtype in self.casts:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            yield


def _check(fn: Callable[..., Any], inputs: Tensors, dim: int) -> None:
    if not callable(fn):
        raise ValueError(f"fn={shown(fn)}: must be a module or a function")
    tokens = inputs[0].size(dim)
    for i, x in enumerate(inputs[1:]):
        if plain(f"others[{i}]", x).ndim <= dim or x.size(dim) != tokens:
            raise ValueError(
                f"others[{i}] {tuple(x.shape)} with x {tuple(inputs[0].shape)}: must have as many tokens in dim {dim}; "
                "what is not of tokens fn brings along itself"
            )
    for module in fn.modules() if isinstance(fn, nn.Module) else ():
        if isinstance(module, FSDPModule):
            raise _gathers(type(module).__name__)


def _gathers(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"fn holds {what}, which fully_shard has wrapped and which would gather and sum for each piece: wrap the "
        "module whose forward calls tiled()"
    )


def _nothing(_: Any) -> Any:
    return None


def _leaf(x: Tensor, needed: bool) -> Tensor:
    return x.detach().requires_grad_() if needed else x.detach()


def _without_hooks(parameter: Tensor) -> Tensor:
    if parameter._backward_hooks:
        raise ValueError(
            f"fn uses a parameter {tuple(parameter.shape)} with a register_hook, which would be called for each piece: "
            "use register_post_accumulate_grad_hook, which is called once"
        )
    return parameter


def _born() -> int:
    """Nodes of the graph made from now on have a larger number."""
    node = torch.zeros((), device="cpu", requires_grad=True).neg().grad_fn
    assert node is not None
    return int(node._sequence_nr())


def _leaves(results: Tensors, born: int) -> Iterator[Tensor]:
    """The leaves of the graph that a piece has made."""
    left: list[Node] = [x.grad_fn for x in results if x.grad_fn is not None]
    seen = set()
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
            continue
        if node.name() == GATHERS:
            raise _gathers("a module")
        if node._sequence_nr() < born and node.name() != CASTS:
            raise ValueError(
                f"fn uses a tensor that {node.name()} made outside of it and to which a gradient flows: pass it in "
                "others, where it is of tokens, or compute it inside fn"
            )
        left += [below for below, _ in node.next_functions if below is not None]
