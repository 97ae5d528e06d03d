"""The record of a call: one list of what attention is asked for, from which the operators' schema, the places of their
arguments and their fake kernels are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from ringattn.planning.wanted import Wanted

NO_SEED = -1
_TYPES = {"Tensor | None": "Tensor?", "float | None": "float?"}


@dataclass(frozen=True, slots=True)
class CallRecord:
    """A forward call, as tensors and numbers: the context and the mask are named by handles, tensors whose values no
    compiled graph is specialised on.

    ``rule`` and ``rule_params`` make a bias rule; ``seed`` is NO_SEED for the context's next; ``grads`` names the
    tensors whose gradients are wanted, of q, k, v, bias and sinks, joined by commas; ``dlse`` says that lse may have
    one, ``max_logit`` that the largest logits are asked for; texts call it by its ``label``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    rule: str
    rule_params: Tensor | None
    sinks: Tensor | None
    context: Tensor
    mask: Tensor
    scale: float
    softcap: float | None
    dropout_p: float
    seed: int
    grads: str
    dlse: bool
    max_logit: bool
    label: str

    @property
    def wants(self) -> list[str]:
        """The names of what it is to give gradients of, in order."""
        return self.grads.split(",") if self.grads else []

    @property
    def wanted(self) -> Wanted:
        """The same of what other ranks take part in."""
        return Wanted(*(name in self.wants for name in Wanted._fields))

    def gradients(self, of: Mapping[str, Tensor | None]) -> tuple[Tensor | None, ...]:
        """Gradients by name as autograd wants them, one for each argument."""
        return tuple(of.get(field.name) for field in fields(self))


@dataclass(frozen=True, slots=True)
class BackwardRecord(CallRecord):
    """Its backward. ``drawn`` is the seed that dropout used, int64 ``[1]``."""

    out: Tensor
    lse: Tensor
    drawn: Tensor
    dout: Tensor
    dout_lse: Tensor | None


def schema(record: type[CallRecord], results: str) -> str:
    """As PyTorch's dispatcher states it."""
    return f"({', '.join(_argument(field.name, str(field.type)) for field in fields(record))}) -> {results}"


def _argument(name: str, kind: str) -> str:
    return f"{_TYPES.get(kind, kind)} {name}"


def arguments(call: CallRecord) -> Iterable[object]:
    """A record's values, in order."""
    return [getattr(call, field.name) for field in fields(call)]
