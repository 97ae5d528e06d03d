"""A piece of a model as the list of operations that it runs, and what is in memory while they run.

An operation makes tensors, and keeps some for its backward. A tensor lies in memory from the operation that makes it to
the last one that reads it or, where one keeps it, until that one's backward has run; its gradient from the first
operation backward that gives a part of it until the one that made it has run backward. That is what autograd does, so
the largest sum on the way is what PyTorch asks its allocator for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

from ringattn.budget.amounts import NOTHING, Amount

ACTIVATIONS = "gradients of activations"


@dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """``kind``: as the account calls it. ``base``: what it is a view of, whose memory it holds. ``grad``: bytes of its
    gradient, NOTHING for as many as its own; None for one that has no gradient."""

    kind: str
    name: str
    size: Amount
    base: Tensor | None = None
    grad: Amount | None = NOTHING

    @property
    def gradient(self) -> Amount:
        """Bytes of its gradient."""
        return self.size if self.grad is None or not self.grad.value else self.grad

    @property
    def storage(self) -> Tensor:
        """Whose memory it is."""
        return self if self.base is None else self.base.storage


@dataclass(frozen=True, eq=False, slots=True)
class Operation:
    """``keeps`` what its backward reads. ``passes``: the gradient of its result is handed on as it is, as an addition's
    or a view's is. ``weights``: bytes of the gradients of parameters that it makes. ``scratch``: what it takes while it
    runs, and while its backward does; ``sums``: in what gradients are added up there before they are cast."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    keeps: tuple[Tensor, ...] = ()
    passes: bool = False
    weights: tuple[Tensor, ...] = ()
    scratch: tuple[Tensor, ...] = ()
    backward_scratch: tuple[Tensor, ...] = ()
    sums: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Moment:
    """A point of time, and all that lies in memory at it: tensors with how many there are of each."""

    name: str
    alive: tuple[tuple[Tensor, int], ...]

    @property
    def bytes(self) -> int:
        return sum(tensor.size.value * count for tensor, count in self.alive)

    def beside(self, others: Iterable[tuple[Tensor, int]], name: str = "") -> Moment:
        """With what else there is."""
        return Moment(name or self.name, (*others, *self.alive))


def largest(moments: Iterable[Moment]) -> Moment:
    """The one with most bytes, the first of several."""
    return max(moments, key=lambda moment: moment.bytes)


@dataclass(slots=True)
class Tape:
    """Operations in order. ``inputs`` are the caller's, who holds them; ``results`` what is handed back to it."""

    inputs: tuple[Tensor, ...]
    results: tuple[Tensor, ...] = ()
    operations: list[Operation] = field(default_factory=list)

    def run(self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], **how: object) -> None:
        """Appends an operation."""
        self.operations.append(Operation(name, tuple(inputs), tuple(outputs), **how))  # type: ignore[arg-type]

    def kept(self) -> list[Tensor]:
        """What lies in memory between forward and backward, each storage once, without the inputs."""
        given = {x.storage for x in self.inputs}
        found = dict.fromkeys(x.storage for operation in self.operations for x in operation.keeps)
        return [x for x in found if x not in given]

    def forward(self, again: bool = False, keeping: Sequence[Tensor] | None = None) -> Moment:
        """The largest moment of the forward pass, the inputs not counted. ``again``: checkpointing computes it again,
        and stops at the last operation that keeps something, before that runs. ``keeping``: what stays for backward,
        where it is not all that backward reads."""
        given, moments = {x.storage for x in self.inputs}, [Moment("", ())]
        last = {x.storage: at for at, op in enumerate(self.operations) for x in (*op.inputs, *op.outputs)}
        staying = self.kept() if keeping is None else keeping
        last |= dict.fromkeys((*(x.storage for x in self.results), *staying), len(self.operations))
        alive: dict[Tensor, None] = {}
        stop = max(at for at, op in enumerate(self.operations) if op.keeps) if again else len(self.operations)
        for at, op in enumerate(self.operations[:stop]):
            alive |= dict.fromkeys(x.storage for x in op.outputs if x.storage not in given)
            moments.append(Moment(op.name, tuple((x, 1) for x in (*alive, *op.scratch))))
            alive = {x: None for x in alive if last[x] > at}
        return largest(moments)

    def backward(self, away: Container[Tensor] = (), taken: bool = False) -> tuple[Moment, tuple[Tensor, ...]]:
        """The largest moment of the backward pass, with the gradients of the results and without the inputs; and the
        gradients of parameters that are left behind, or ``taken`` elsewhere as soon as they are made. ``away``: what is
        elsewhere but while an operation reads it."""
        given = {x.storage for x in self.inputs}
        readers = Counter(x for op in self.operations for x in {x.storage: None for x in op.keeps})
        gradients = {x: _gradient(x) for x in self.results if x.grad is not None}
        left: list[Tensor] = []
        moments = [Moment("", ())]
        staying = [] if taken else left
        for op in reversed(self.operations):
            read = {x.storage for x in op.keeps}
            there = [x for x in _left(readers, given) if x not in away or x in read]
            made = self._made(op, gradients)
            left += op.weights
            now = [*there, *(op.weights if taken else left), *op.sums, *gradients.values()]
            results = made.values()
            for more in ((*op.backward_scratch,), results) if op.sums else ((*op.backward_scratch, *results),):
                moments.append(_moment(f"{op.name}, backward", [*now, *more]))
            for x in op.outputs:
                gradients.pop(x, None)
            readers.subtract({x.storage: 1 for x in op.keeps})
            sums = {x: _gradient(x) for x, grad in made.items() if gradients.get(x, grad) is not grad}
            if sums:  # gradients of two paths are added up in a tensor of its own
                there = [x for x in _left(readers, given) if x not in away]
                now = [*there, *staying, *gradients.values(), *made.values(), *sums.values()]
                moments.append(_moment(f"{op.name}, its gradient added", now))
            gradients |= made | sums
        return largest(moments), tuple(left)

    @staticmethod
    def _made(op: Operation, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """The gradients of an operation's inputs."""
        wanted = [x for x in op.inputs if x.grad is not None]
        if op.passes:
            handed = next((gradients[x] for x in op.outputs if x in gradients), None)
            return {} if handed is None else dict.fromkeys(wanted, handed)
        return {x: _gradient(x) for x in wanted}


def _left(readers: Counter[Tensor], given: Container[Tensor]) -> list[Tensor]:
    """What somebody still reads."""
    return [x for x, count in readers.items() if count > 0 and x not in given]


def _moment(name: str, tensors: Iterable[Tensor]) -> Moment:
    return Moment(name, tuple((x, 1) for x in dict.fromkeys(tensors)))


def _gradient(x: Tensor) -> Tensor:
    return Tensor(ACTIVATIONS, f"gradient of {x.name}", x.gradient, None, None)
