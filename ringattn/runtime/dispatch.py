"""The two operators that PyTorch's dispatcher knows, `ringattn::attention` and `ringattn::attention_backward`.

As operators, attention is one node of a compiled graph (fullgraph), and selective activation checkpointing can name
it and keep its `(out, lse)` instead of running the ring again. They take tensors and numbers only: the context and
the mask are named by handles, tensors whose values no graph is specialised on.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ringattn.comm import agree, together
from ringattn.geometry.masks import Expression
from ringattn.kernels import KERNELS, Call, choose
from ringattn.kernels.scores import RULES, Dropout, Scores
from ringattn.planning.launches import Stacking
from ringattn.runtime.binding import Binding, Load, find
from ringattn.runtime.loops import backward, forward
from ringattn.runtime.work import Run, accumulator_dtype, row_delta

NO_SEED = -1
FORWARD, BACKWARD = "attention forward", "attention backward"


@torch.library.custom_op("ringattn::attention", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def attention_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rule: str,
    rule_params: Tensor | None,
    sinks: Tensor | None,
    context: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    seed: int,
    grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`out [B, S, H, Dv]`, `lse [B, H, S]` and the seed that dropout used, int64 `[1]`."""
    binding = find(context)
    with together(binding.link.transport, FORWARD), torch.autocast(q.device.type, enabled=False):
        drawn = torch.tensor([_draw(binding, dropout_p, seed)], device="cpu")
        scores = _scores(scale, softcap, bias, rule, rule_params, dropout_p, drawn)
        run = _prepare(binding, q, k, v, mask, scores, sinks)
        _begin(FORWARD, binding, run, q, k, v, mask, grad)
        if binding.settings.options.check_nan:
            _check_finite(binding, q=q, k=k, v=v)
        out, lse = forward(_rows_together(q), _rows_together(k), _rows_together(v), run)
        _finish(run, q)
    return out, lse, drawn


@torch.library.custom_op("ringattn::attention_backward", mutates_args=())
def attention_backward_operator(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    rule: str,
    rule_params: Tensor | None,
    sinks: Tensor | None,
    context: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    seed: Tensor,
    wants_dbias: bool,
    wants_dsinks: bool,
) -> list[Tensor]:
    """`dq, dk, dv`, then the bias tensor's gradient and that of the sinks, where they are wanted."""
    binding, wide = find(context), accumulator_dtype(q.dtype)
    with together(binding.link.transport, BACKWARD), torch.autocast(q.device.type, enabled=False):
        dbias = torch.zeros_like(bias, dtype=wide) if wants_dbias and bias is not None else None
        scores = _scores(scale, softcap, bias, rule, rule_params, dropout_p, seed, dbias)
        run = _prepare(binding, q, k, v, mask, scores, sinks)
        _begin(BACKWARD, binding, run, q, k, v, mask, grad=True)
        dense = [_rows_together(x) for x in (q, k, v)]
        found = backward(dense[0], dense[1], dense[2], out, lse, _rows_together(dout), dlse, run)
        # Laid in memory as the inputs are, which the fake kernel says too.
        laid = zip(found, (q, k, v), strict=True)
        grads = [g if x.stride(-1) == 1 else torch.empty_like(x).copy_(g) for g, x in laid]
        if dbias is not None and bias is not None:
            grads.append(dbias.to(bias.dtype))
        if wants_dsinks and sinks is not None:
            grads.append(_sinks_gradient(sinks, lse, row_delta(dout.to(wide), out, dlse)))
        _finish(run, q)
    return grads


@attention_operator.register_fake
def _(q, k, v, bias, rule, rule_params, sinks, context, mask, scale, softcap, dropout_p, seed, grad):  # type: ignore[no-untyped-def]
    batch, seqlen, heads, _ = q.shape
    out = q.new_empty(batch, seqlen, heads, v.shape[-1])
    lse = q.new_empty(batch, heads, seqlen, dtype=accumulator_dtype(q.dtype))
    return out, lse, torch.empty(1, dtype=torch.int64)


@attention_backward_operator.register_fake
def _(dout, dlse, q, k, v, out, lse, bias, rule, rule_params, sinks, *others):  # type: ignore[no-untyped-def]
    *_, wants_dbias, wants_dsinks = others
    wanted = [q, k, v, *([bias] if wants_dbias else []), *([sinks] if wants_dsinks else [])]
    return [torch.empty_like(x) for x in wanted]


@torch.library.custom_op("ringattn::refused_attention", mutates_args=())
def refused_attention_operator(q: Tensor, context: Tensor, kind: str, text: str) -> tuple[Tensor, Tensor]:
    """Stands in a compiled graph for a call that was refused while it was traced, which no other rank would hear of."""
    refusals: dict[str, type[Exception]] = {"TypeError": TypeError, "NotImplementedError": NotImplementedError}
    with together(find(context).link.transport, FORWARD):
        raise refusals.get(kind, ValueError)(text)


@refused_attention_operator.register_fake
def _(q, context, kind, text):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), torch.empty_like(q)


refused_attention_operator.register_autograd(lambda ctx, *_: (None,) * 4)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, bias, rule, rule_params, sinks, context, mask, scale, softcap, dropout_p, _, _ = inputs
    out, lse, seed = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(seed)
    ctx.save_for_backward(q, k, v, out, lse, bias, rule_params, sinks, context, mask, seed)
    ctx.numbers = rule, scale, softcap, dropout_p
    ctx.binding = find(context) if type(context) is Tensor else None  # alive until backward, whatever the user drops


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    # a graph that is traced knows no ranks
    with nullcontext() if ctx.binding is None else together(ctx.binding.link.transport, BACKWARD):
        if torch.is_grad_enabled():
            raise RuntimeError("attention() is differentiable once: leave out create_graph=True")
        q, k, v, out, lse, bias, rule_params, sinks, context, mask, seed = ctx.saved_tensors
    rule, scale, softcap, dropout_p = ctx.numbers
    wants_dbias = bias is not None and ctx.needs_input_grad[3]
    wants_dsinks = sinks is not None and ctx.needs_input_grad[6]
    dq, dk, dv, *rest = torch.ops.ringattn.attention_backward(
        torch.zeros_like(out) if dout is None else dout, dlse, q, k, v, out, lse, bias, rule, rule_params, sinks,
        context, mask, scale, softcap, dropout_p, seed, wants_dbias, wants_dsinks,
    )  # fmt: skip
    dsinks = rest.pop() if wants_dsinks else None
    dbias = rest.pop() if wants_dbias else None
    return (dq, dk, dv, dbias, None, None, dsinks, *[None] * 7)


attention_operator.register_autograd(_differentiate, setup_context=_setup_context)


def _draw(binding: Binding, dropout_p: float, seed: int) -> int:
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


def _scores(
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    rule: str,
    rule_params: Tensor | None,
    dropout_p: float,
    seed: Tensor,
    dbias: Tensor | None = None,
) -> Scores:
    made = RULES[rule](rule_params) if rule_params is not None else None
    return Scores(scale, softcap, bias, dbias, made, Dropout(dropout_p, int(seed)) if dropout_p else None)


def _prepare(
    binding: Binding, q: Tensor, k: Tensor, v: Tensor, handle: Tensor, scores: Scores, sinks: Tensor | None
) -> Run:
    """The program and the kernel of a call."""
    mask = _mask_of(binding, handle)
    windowed = binding.plans[mask].windowed
    call = Call(q.device.type, q.dtype, q.shape[-1], v.shape[-1], q.shape[2], k.shape[2], windowed, scores.features)
    kernel = choose(binding.settings.kernel, call, KERNELS)
    row_bytes = q.shape[0] * (q.shape[-1] + v.shape[-1]) * q.element_size()
    stacking = Stacking.of(q.device.type, scores.positional)
    load = Load(k.shape[2], row_bytes, stacking, stay=scores.bias is not None)
    binding.last = load
    return Run(binding.program(mask, load), kernel, scores, binding.link, sinks)


def _mask_of(binding: Binding, handle: Tensor) -> Expression:
    mask = binding.masks.get(handle.numpy().tobytes().hex())
    if mask is None:
        listed = "; ".join(map(str, binding.settings.masks))
        raise ValueError(f"the mask of this call is not one of the context's ({listed}); name one of cp.masks")
    return mask


def _rows_together(x: Tensor) -> Tensor:
    """What kernels ask for: a contiguous last dim."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """This rank's part. A sink is a key of value 0: its logit's gradient is `p * (0 - delta)`, summed over queries."""
    p = torch.exp(sinks.to(lse.dtype)[:, None] - lse).masked_fill_(lse == -torch.inf, 0.0)
    return -(p * delta).sum((0, 2)).to(sinks.dtype)


def _check_finite(binding: Binding, **tensors: Tensor) -> None:
    """Raises on every rank if any rank holds a value that is not finite, so that no rank waits for another."""
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    found = f"{' and '.join(bad)} holds NaN or infinity" if bad else "all finite"
    transport = binding.link.transport
    if transport.world_size > 1:
        try:
            agree(transport, transport.log.ballot(), {"values of q, k and v": found})
        except ValueError as error:
            raise FloatingPointError(f"{error} (Options.check_nan)") from None
    if bad:
        raise FloatingPointError(f"{found} (Options.check_nan)")


def attended_mask(args: tuple[Any, ...]) -> Expression:
    """The mask of a call of `ringattn::attention`, from its arguments."""
    context, mask = args[7], args[8]
    return _mask_of(find(context), mask)


def _begin(name: str, binding: Binding, run: Run, q: Tensor, k: Tensor, v: Tensor, handle: Tensor, grad: bool) -> None:
    """Begins the call on all ranks, which compare what they are about to do."""
    if binding.world_size == 1:
        return
    s, scores, program, mask = binding.settings, run.scores, run.program, _mask_of(binding, handle)
    inputs = (
        f"batch {q.shape[0]}, heads {q.shape[2]} over {k.shape[2]}, head_dim {q.shape[3]}, v_head_dim {v.shape[3]}, "
        f"{q.dtype} on {q.device.type}"
    )
    rule = "no rule" if scores.rule is None else scores.rule.name
    bias = "no bias" if scores.bias is None else f"bias [{scores.bias.shape[0]}, {scores.bias.shape[1]}, ...]"
    logits = f"scale {scores.scale!r}, softcap {scores.softcap}, {bias}, {rule}"
    dropout = f"p {scores.dropout.p}" if scores.dropout else "none"
    sinks = "none" if run.sinks is None else "given"
    schedule = f"{program.schedule} (cut {program.cut}{', queries travel' if program.travel else ''})"
    gradient = "wanted" if grad else "not wanted"
    own = {"this call's dropout": f"seed {scores.dropout.seed}"} if scores.dropout else {}
    if scores.rule is not None and q.device.type == "cpu":  # reading values would wait for another device
        own["this call's slopes"] = f"{rule} {scores.rule.params.tolist()}"

    def facts() -> dict[str, str]:
        slopes = "" if scores.rule is None else f" {scores.rule.params.tolist()}"
        return {
            "mask": str(mask),
            "logits": logits + slopes,
            "gradient": gradient,
            "dropout": dropout,
            "sinks": sinks,
            "kernel": run.kernel.name,
            "shapes": inputs,
            "lengths": f"seqlen {s.seqlen}, kv_seqlen {s.kv_seqlen}, q_offset {s.q_offset}",
            "layout": f"{binding.q_layout.name} {binding.q_layout.digest}",
            "schedule": schedule,
            "planned for": str(s.terms),
            "digest of the mask": mask.digest,
        }

    signature = (binding.digest, mask.digest, inputs, schedule, run.kernel.name, logits, dropout, sinks, gradient)
    binding.link.begin(name, signature, facts, q.device.type, own)


def _finish(run: Run, q: Tensor) -> None:
    run.link.finish(q.device.type, needed=not run.program.alone)
