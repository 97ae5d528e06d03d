"""The two operators that PyTorch's dispatcher knows, `ringattn::attention` and `ringattn::attention_backward`, and the
function that stands for them where nothing looks on.

As operators, attention is one node of a compiled graph (fullgraph), and selective activation checkpointing can name
it and keep its `(out, lse)` instead of running the ring again. They take tensors and numbers only: see `record.py`.
Where no graph is traced and no mode sees operators, the dispatcher would only cost time.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ringattn.comm import together
from ringattn.geometry.masks import Expression
from ringattn.kernels.partial import accumulator_dtype
from ringattn.kernels.scores import RULES, Dropout, Scores
from ringattn.runtime.binding import Binding, find
from ringattn.runtime.execution import BACKWARD, FORWARD, Execution
from ringattn.runtime.record import NO_SEED, BackwardRecord, CallRecord, arguments, schema
from ringattn.runtime.wire import Kind

_nondeterministic = (torch.Tag.nondeterministic_seeded,)


def execution(
    binding: Binding, mask: Expression, call: CallRecord, drawn: int, dbias: Tensor | None = None
) -> Execution:
    """What a record stands for."""
    rule = None if call.rule_params is None else RULES[call.rule](call.rule_params)
    dropout = Dropout(call.dropout_p, drawn) if call.dropout_p else None
    scores = Scores(call.scale, call.softcap, call.bias, dbias, rule, dropout)
    kind = kind_of(call.q, call.k, call.v)
    prepared = binding.prepared(mask, kind, scores, call.dlse, call.wanted)
    largest = binding.largest(mask, kind, scores) if call.max_logit else None
    return Execution(binding, prepared, scores, call.sinks, bool(call.grads), call.rule, call.label, largest)


def kind_of(q: Tensor, k: Tensor, v: Tensor) -> Kind:
    return Kind(q.shape[0], q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype, q.device)


def draw(binding: Binding, dropout_p: float, seed: int) -> int:
    """The seed of this call: the one given, or the next that all ranks draw alike."""
    if not dropout_p or seed != NO_SEED:
        return seed
    if torch._C._current_graph_task_id() != -1:
        raise ValueError(
            "dropout without a seed in a forward that is recomputed during backward (activation checkpointing): it "
            "would drop other pairs than the first time; pass seed=, a number of your own for each layer and "
            "step (in a Transformers model set ring.seed, one number for each step)"
        )
    return binding.link.draw(binding.settings.options.seed)


# -- operators ----------------------------------------------------------------------------------


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = CallRecord(*args)
    binding = find(call.context)
    with together(binding.link.transport, FORWARD), torch.autocast(call.q.device.type, enabled=False):
        drawn = torch.tensor([draw(binding, call.dropout_p, call.seed)], device="cpu")
        made = execution(binding, binding.mask_of(call.mask), call, int(drawn))
        out, lse, largest = made.forward(call.q, call.k, call.v)
    return out, lse, drawn, call.q.new_empty(0, dtype=torch.float32) if largest is None else largest


def _backward(*args: Any) -> list[Tensor]:
    call = BackwardRecord(*args)
    binding = find(call.context)
    with together(binding.link.transport, BACKWARD), torch.autocast(call.q.device.type, enabled=False):
        wide = accumulator_dtype(call.q.dtype)
        dbias = torch.zeros_like(call.bias, dtype=wide) if call.bias is not None and call.wanted.bias else None
        made = execution(binding, binding.mask_of(call.mask), call, int(call.drawn), dbias)
        saved = call.q, call.k, call.v, call.out, call.lse
        found = made.backward(*saved, call.dout, call.dout_lse, "sinks" in call.wants)
    return [grad for grad in found if grad is not None]


attention_operator = torch.library.custom_op(
    "ringattn::attention", _forward, mutates_args=(), tags=_nondeterministic,
    schema=schema(CallRecord, "(Tensor, Tensor, Tensor, Tensor)"),
)  # fmt: skip
attention_backward_operator = torch.library.custom_op(
    "ringattn::attention_backward", _backward, mutates_args=(), schema=schema(BackwardRecord, "Tensor[]")
)


@attention_operator.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    call = CallRecord(*args)
    batch, seqlen, heads, _ = call.q.shape
    out = call.q.new_empty(batch, seqlen, heads, call.v.shape[-1])
    lse = call.q.new_empty(batch, heads, seqlen, dtype=accumulator_dtype(call.q.dtype))
    largest = call.q.new_empty((batch, heads) if call.max_logit else 0, dtype=torch.float32)
    return out, lse, torch.empty(1, dtype=torch.int64), largest


@attention_backward_operator.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    call = BackwardRecord(*args)
    return [torch.empty_like(getattr(call, name)) for name in call.wants]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = CallRecord(*inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)), *output[:3])
    ctx.inputs = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.tensors = [isinstance(value, Tensor) for value in inputs]
    # alive until backward, whatever the user drops
    ctx.binding = find(call.context) if type(call.context) is Tensor else None


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    # a graph that is traced knows no ranks
    with nullcontext() if ctx.binding is None else together(ctx.binding.link.transport, BACKWARD):
        _once()
        *saved, out, lse, drawn = ctx.saved_tensors
    given = iter(saved)
    inputs = [next(given) if tensor else value for value, tensor in zip(ctx.inputs, ctx.tensors, strict=True)]
    call = CallRecord(*inputs)
    dout = torch.zeros_like(out) if dout is None else dout
    record = BackwardRecord(*inputs, out, lse, drawn, dout, dlse)  # type: ignore[call-arg]
    found = torch.ops.ringattn.attention_backward(*arguments(record))
    return call.gradients(dict(zip(call.wants, found, strict=True)))


attention_operator.register_autograd(_differentiate, setup_context=_setup_context)


def _once(dout: Tensor | None = None) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("attention() is differentiable once: leave out create_graph=True")
    if dout is not None and torch._C._functorch.is_legacy_batchedtensor(dout):
        raise NotImplementedError("attention() takes one gradient at a time: leave out is_grads_batched=True")


@torch.library.custom_op("ringattn::refused_attention", mutates_args=())
def refused_attention_operator(q: Tensor, context: Tensor, kind: str, text: str) -> tuple[Tensor, Tensor, Tensor]:
    """Stands in a compiled graph for a call that was refused while it was traced, which no other rank would hear of."""
    refusals: dict[str, type[Exception]] = {"TypeError": TypeError, "NotImplementedError": NotImplementedError}
    with together(find(context).link.transport, FORWARD):
        raise refusals.get(kind, ValueError)(text)


@refused_attention_operator.register_fake
def _(q, context, kind, text):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), torch.empty_like(q), torch.empty_like(q)


refused_attention_operator.register_autograd(lambda ctx, *_: (None,) * 4)


def attended_mask(args: tuple[Any, ...]) -> Expression:
    """The mask of a call of `ringattn::attention`, from its arguments."""
    call = CallRecord(*args)
    return find(call.context).mask_of(call.mask)


# -- where nothing looks on ---------------------------------------------------------------------


PLAIN = frozenset({Tensor, torch.nn.Parameter})


def looked_on(*tensors: object) -> bool:
    """Whether something wants to see an operator: a compiler, a mode, a transform, or a tensor of another class."""
    for x in tensors:
        if type(x) not in PLAIN and x is not None:
            return True
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


class Attention(torch.autograd.Function):
    """The same as the operators, without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, made: Execution, *extras: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``extras``: none, or a bias tensor, the numbers of a bias rule, and sinks."""
        out, lse, largest = made.forward(q, k, v)
        ctx.set_materialize_grads(False)
        ctx.made = made.without_tensors()
        ctx.save_for_backward(q, k, v, out, lse, *extras)
        if largest is not None:
            ctx.mark_non_differentiable(largest)
        return out, lse, largest

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        made: Execution = ctx.made
        with together(made.binding.link.transport, BACKWARD):
            _once(dout)
            q, k, v, out, lse, *extras = ctx.saved_tensors
            dout = torch.zeros_like(out) if dout is None else dout
            wants_dsinks = False
            if extras:
                wants_dsinks = ctx.needs_input_grad[-1]
                made = made.with_tensors(*extras)
            if torch.is_autocast_enabled(q.device.type):
                with torch.autocast(q.device.type, enabled=False):
                    found = made.backward(q, k, v, out, lse, dout, dlse, wants_dsinks)
            else:
                found = made.backward(q, k, v, out, lse, dout, dlse, wants_dsinks)
        dq, dk, dv, dbias, dsinks = found
        return (dq, dk, dv, None, dbias, None, dsinks) if extras else (dq, dk, dv, None)
