"""What a call and a context may be asked for, in which words they refuse the rest, and what is meant where nothing was
said: all rules of arguments that look at more than one of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from ringattn.arguments.tensors import FLOATS, plain
from ringattn.arguments.values import flag, integer, integers, listed, number, seed_of, shown
from ringattn.geometry.layouts import NAMED, Layout, named
from ringattn.geometry.masks import Expression
from ringattn.kernels import KERNELS
from ringattn.kernels.partial import accumulator_dtype
from ringattn.kernels.scores import GREATEST, RULES, SMALLEST, Rule
from ringattn.masks import Mask
from ringattn.planning.heads import divisors
from ringattn.planning.placement import PLACEMENTS
from ringattn.planning.schedules import SCHEDULES
from ringattn.planning.shape import Shape
from ringattn.runtime.link import Link
from ringattn.runtime.record import NO_SEED, CallRecord
from ringattn.runtime.settings import ContextSettings, Options

if TYPE_CHECKING:
    from ringattn.context import ContextParallel

SYMBOLS = (torch.SymFloat, torch.SymInt)  # numbers of a graph that is not tied to their values


# -- a context ---------------------------------------------------------------------------------

STACK = 1024  # masks of one context
UNKNOWN_MASK = "is not one of the context's"


def checked_context(given: dict[str, Any]) -> dict[str, Any]:
    """A context's arguments, as what they stand for."""
    if not isinstance(given["options"], Options):
        raise ValueError(f"options={shown(given['options'])}: must be a ringattn.Options")
    if given["ulysses"] == "auto" and given["shape"] is None:
        raise ValueError("ulysses='auto' splits heads by cost: tell them with shape=ringattn.Shape(num_heads, ...)")
    if given["shape"] is not None and not isinstance(given["shape"], Shape):
        raise ValueError(f"shape={shown(given['shape'])}: must be a ringattn.Shape(num_heads, num_kv_heads, head_dim)")
    lengths = _lengths(given["seqlen"], given["kv_seqlen"], given["q_offset"])
    masks = _masks(given["mask"])
    check_names(given["layout"], given["schedule"], given["kernel"], given["kv_layout"])
    for mask in masks:
        mask.bind(lengths["seqlen"], lengths["kv_seqlen"] or lengths["seqlen"], lengths["q_offset"])
    return {**given, **lengths, "mask": masks}


def checked_ranks(ranks: Iterable[int], rank: int, world_size: int) -> tuple[int, ...]:
    """Some ranks of a group, rising."""
    members = tuple(sorted(integers("ranks", ranks)))
    outside = [member for member in members if member >= world_size]
    if outside or not members:
        raise ValueError(f"ranks={list(members)}: must be some of the group's, 0 to {world_size - 1}")
    if len(set(members)) < len(members):
        raise ValueError(f"ranks={list(members)}: must name each rank once")
    if rank not in members:
        raise ValueError(
            f"ranks={list(members)} on rank {rank}, which is not among them: only they make calls of this subset; pass "
            "each rank the ranks that it attends with"
        )
    return members


def _lengths(seqlen: Any, kv_seqlen: Any, q_offset: Any) -> dict[str, Any]:
    hint = ", a number of tokens"
    seqlen, q_offset = (
        integer(name, value, least, hint=hint, rule="an integer of ")
        for name, value, least in (("seqlen", seqlen, 1), ("q_offset", q_offset, 0))
    )
    if kv_seqlen is not None:
        kv_seqlen = integer("kv_seqlen", kv_seqlen, 1, hint=hint, rule="an integer of ")
    return {"seqlen": seqlen, "kv_seqlen": kv_seqlen, "q_offset": q_offset}


def _refuse_tensor(mask: object) -> None:
    """A mask of the sequence squared is never held; as a bias it is one, of this rank's queries."""
    if isinstance(mask, Tensor):
        raise ValueError(
            f"mask={shown(mask)}: say it in masks, e.g. ringattn.causal() & ringattn.documents(cu_seqlens), and pack "
            "padded rows with ringattn.pack; what masks cannot say, with mask=ringattn.full() and a bias. Of a bool "
            "mask [seqlen, kv_seqlen], True where a key is seen, that is bias=torch.zeros(mask.shape)"
            ".masked_fill(~mask, -math.inf)[None, None, cp.position_ids], which every rank computes with in full"
        )


def _masks(mask: Mask | Iterable[Mask]) -> tuple[Mask, ...]:
    _refuse_tensor(mask)
    several = isinstance(mask, Iterable) and not isinstance(mask, str)
    masks = [mask] if isinstance(mask, Expression) else listed("mask", mask, "masks", STACK) if several else []
    if not masks or not all(isinstance(m, Expression) for m in masks):
        call = f"; did you mean {mask.__name__}()?" if callable(mask) and hasattr(mask, "__name__") else ""
        raise ValueError(f"mask={shown(mask)}: give one mask or several, e.g. ringattn.causal(){call}")
    return tuple(dict.fromkeys(masks))


def check_link(settings: ContextSettings, link: Link, self_attention: bool) -> None:
    """Raises ``ValueError`` for what does not fit the ranks, or the contexts before."""
    options, world = settings.options, link.transport.world_size
    if options.compare_every != link.compare_every:
        raise ValueError(
            f"Options.compare_every={options.compare_every}, but contexts that follow each other count calls "
            f"together, and the first said {link.compare_every}"
        )
    if options.communicators != link.communicators:
        raise ValueError(
            f"Options.communicators={options.communicators}, but the transport's are {link.communicators}: they are "
            "set when it is made, by the first of the contexts that follow each other, or by whoever passes it in"
        )
    if options.timeout not in (None, link.transport.timeout):
        raise ValueError(
            f"Options.timeout={options.timeout}, but the transport's deadline is {link.transport.timeout} s: it is "
            "set when the transport is made; leave Options.timeout out here"
        )
    if self_attention and world > settings.seqlen:
        raise ValueError(
            f"seqlen={settings.seqlen} over {world} ranks: more ranks than tokens; use fewer ranks "
            "(empty shards are legal with kv_seqlen or q_offset only)"
        )
    members = _splits(settings, world)
    _check_nodes(settings, world, members)
    rings = [world // n for n in members]
    layout, keys = settings.layout, settings.kv_layout
    over = f"{world} ranks"
    if rings != [world]:
        over = f"a ring of {' or '.join(map(str, rings))} ranks ({world} with ulysses={settings.ulysses!r})"
    if isinstance(layout, Layout) and (layout.seqlen != settings.seqlen or layout.world_size not in {*rings, world}):
        raise ValueError(f"{layout!r} does not fit seqlen={settings.seqlen} over {over}; build it for these")
    if isinstance(keys, Layout) and (keys.seqlen != settings.kv_seqlen or keys.world_size not in {*rings, world}):
        raise ValueError(f"kv_layout={keys!r} does not fit kv_seqlen={settings.kv_seqlen} over {over}")
    if isinstance(layout, Layout) and keys in (None, "auto") and settings.kv_seqlen != settings.seqlen:
        raise ValueError(
            f"a given layout of {layout.seqlen} positions cannot place kv_seqlen={settings.kv_seqlen} keys; give them "
            "a kv_layout, for instance 'contiguous'"
        )
    if not settings.splits(world):
        raise ValueError(
            f"ulysses='auto': no split of {world} ranks fits both layouts and Options.head_chunks="
            f"{options.head_chunks}; name one, or leave them out"
        )


def _splits(settings: ContextSettings, world: int) -> list[int]:
    """The numbers of ranks of the head axis that a context may have."""
    ulysses, shape, fits = settings.ulysses, settings.shape, divisors(world)
    if not isinstance(ulysses, int):
        return fits
    if world % ulysses:
        listed = ", ".join(map(str, fits))
        raise ValueError(f"ulysses={ulysses} does not divide the {world} ranks of the group: must be one of {listed}")
    if shape is not None and shape.num_heads < ulysses:
        raise ValueError(
            f"ulysses={ulysses} over the {shape.num_heads} heads of shape: some ranks would compute none; split the "
            "heads over at most as many"
        )
    return [ulysses]


def _check_nodes(settings: ContextSettings, world: int, members: list[int]) -> None:
    """That the nodes told of fit the ranks, and that a schedule for several nodes is given some."""
    asked = settings.options.topology
    size = None if asked is None or settings.among is not None else asked.ranks_per_node
    if size is not None and size < world and world % size:
        raise ValueError(
            f"Options.topology with ranks_per_node={size}: its {world} ranks are not whole nodes of {size}; give one "
            "that divides them, or, where nodes have unequal numbers, Topology(inter) alone"
        )
    flat = [settings.flat(world, n) for n in members] if settings.by_nodes else []
    if flat and all(flat):
        told = f"; {settings.nodes}" if settings.nodes and settings.options.topology is None else ""
        raise ValueError(
            f"schedule={settings.schedule!r} is for a ring of several nodes of several ranks each, and {flat[0]} "
            f"(ranks_per_node={settings.known.topology.ranks_per_node}{told}): say how many neighbours share a node "
            "with Options.topology=ringattn.Topology(intra, inter, ranks_per_node), or take another schedule"
        )


def check_names(layout: str | Layout, schedule: str, kernel: str, kv_layout: str | Layout | None = None) -> None:
    """Raises ``ValueError`` for a name that does not exist, with those that do."""
    named("kernel", kernel, ["auto", *(known.name for known in KERNELS)])
    named("schedule", schedule, ["auto", *(known.name for known in SCHEDULES)])
    if isinstance(layout, Layout):
        layout.check()
    else:
        named("layout", layout, PLACEMENTS)
    if isinstance(kv_layout, Layout):
        kv_layout.check()
    elif kv_layout is not None:
        named("kv_layout", kv_layout, ["auto", *(known.__name__ for known in NAMED)])


# -- a call ------------------------------------------------------------------------------------


def checked_call(
    q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel, mask: Mask | None, scale: float | None,
    softcap: float | None, bias: Tensor | Rule | None, sinks: Tensor | None, dropout_p: float, seed: int | None,
    return_max_logit: bool, return_lse: bool, label: str,
) -> CallRecord:  # fmt: skip
    """The call, if all its arguments fit."""
    return_max_logit = flag("return_max_logit", return_max_logit)
    return_lse = flag("return_lse", return_lse)
    _check_types(q, k, v, bias, sinks)
    scale, softcap, dropout_p, seed = _check_numbers(scale, softcap, dropout_p, seed)
    q, k, v = _autocast(q, k, v)
    _check_tensors(q, k, v, cp)
    mask_handle = _mask_handle(mask, cp)
    bias, rule = (bias, None) if bias is None or isinstance(bias, Tensor) else (None, bias)
    if not torch.compiler.is_compiling():
        _check_mode(q, k, v, bias, sinks)
    _check_extras(bias, rule, sinks, q, cp)
    q, scale = _apply_sign(q, q.shape[-1] ** -0.5 if scale is None else float(scale))
    grads = _wanted(q=q, k=k, v=v, bias=bias, sinks=sinks) if torch.is_grad_enabled() else ""
    params = rule.params.to(q.device, accumulator_dtype(q.dtype)) if rule else None
    return CallRecord(
        q, k, v, bias, rule.name if rule else "", params, sinks, cp.handle, mask_handle, scale, softcap, dropout_p,
        NO_SEED if seed is None else seed, grads, return_lse and bool(grads), return_max_logit, label,
    )  # fmt: skip


def _wanted(**tensors: Tensor | None) -> str:
    """The names of those that require a gradient, joined by commas."""
    return ",".join(name for name, x in tensors.items() if x is not None and _inner(x).requires_grad)


def _inner(x: Tensor) -> Tensor:
    """What :func:`torch.func.vmap` has wrapped, in a tensor that knows of no gradient."""
    while not torch.compiler.is_compiling() and _functorch.is_batchedtensor(x):
        x = _functorch.get_unwrapped(x)
    return x


def _check_types(q: object, k: object, v: object, bias: object, sinks: object) -> None:
    one_device = len({t.device for t in (q, k, v) if isinstance(t, Tensor)}) == 1  # else that is what is said of them
    for name, t in (("q", q), ("k", k), ("v", v)):
        if one_device or not isinstance(t, Tensor):
            plain(name, t)
    if sinks is not None:
        plain("sinks", sinks)
    if isinstance(bias, Tensor):
        plain("bias", bias)


def _check_numbers(
    scale: Any, softcap: Any, dropout_p: Any, seed: Any
) -> tuple[float | None, float | None, float, int | None]:
    """The numbers of a call, as plain ones unless they are symbols of a graph."""
    if scale is not None:
        scale = _check_scale(scale)
    if softcap is not None:
        softcap = number("softcap", softcap, SMALLEST, GREATEST, "; None is no cap", also=SYMBOLS, rule="a positive")
    dropout_p = number("dropout_p", dropout_p, 0.0, 1.0, ", and below 1", also=SYMBOLS)
    if dropout_p >= 1.0:
        raise ValueError(f"dropout_p={dropout_p}: must be at least 0 and below 1")
    if seed is not None and not dropout_p:
        raise ValueError(f"seed={shown(seed)} without dropout_p: a seed is used for dropout only; leave it out")
    if seed is not None and not isinstance(seed, SYMBOLS):
        seed = seed_of("seed", seed)
    return scale, softcap, dropout_p, seed


def _check_scale(scale: Any) -> float:
    if isinstance(scale, Tensor):
        if scale.requires_grad:
            raise ValueError("scale is a tensor that requires grad, and its gradient is not computed: multiply q by it")
        if plain("scale", scale).numel() != 1 or scale.dtype == torch.bool:
            raise ValueError(f"scale={shown(scale)}: must be one number; None is head_dim ** -0.5")
        scale = scale.item()
    if isinstance(scale, float) and not math.isfinite(scale):
        raise ValueError(f"scale={scale}: must be finite; None is head_dim ** -0.5")
    hint = ", and where it is not 0 at least 2**-40 either way; None is head_dim ** -0.5"
    scale = number("scale", scale, -GREATEST, GREATEST, hint, also=SYMBOLS)
    if scale and abs(scale) < SMALLEST:
        number("scale", scale, SMALLEST, GREATEST, ", or 0; None is head_dim ** -0.5")
    return scale


def _check_mode(*tensors: Tensor | None) -> None:
    """Operators without a formula drop tangents in silence; of transforms PyTorch speaks without a name."""
    if forward_ad._current_level >= 0:
        if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError("attention() has no forward-mode derivative (jvp): use reverse mode")
    if any(t is not None and _functorch.is_gradtrackingtensor(t) for t in tensors):
        raise NotImplementedError(
            "attention() cannot be differentiated by torch.func (grad, vjp, jacrev): use backward() or "
            "torch.autograd.grad"
        )


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast q, k and v in its dtype, like torch's own attention; fp64 is left alone."""
    kind = q.device.type
    if q.is_meta or not torch.is_autocast_enabled(kind):  # which knows no meta device
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    q, k, v = (t if t.dtype not in FLOATS or t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    return q, k, v


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.ndim != 4:
            raise ValueError(f"{name} has shape {_sizes(t)}: must be [batch, tokens, heads, head_dim]")
        if t.dtype not in FLOATS:
            raise ValueError(f"{name} is {t.dtype}: must be float16, bfloat16, float32 or float64")
    for what, of in (
        ("dtype", lambda t: t.dtype),
        ("device", lambda t: t.device),
        ("batch", lambda t: t.shape[0]),
    ):
        if not of(q) == of(k) == of(v):
            found = [int(x) if what == "batch" else x for x in map(of, (q, k, v))]
            raise ValueError(f"{what} differs: q {found[0]}, k {found[1]}, v {found[2]}; give all three the same")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {_sizes(k)} and v {_sizes(v)}: must agree in batch, length and heads")
    if not q.shape[-1] or not v.shape[-1]:
        raise ValueError(f"head_dim is {int(q.shape[-1])} and v_head_dim {int(v.shape[-1])}: must be at least 1")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"head_dim of q is {int(q.shape[-1])} and of k {int(k.shape[-1])}: must be equal")
    _check_heads(int(q.shape[2]), int(k.shape[2]), cp)
    if q.shape[1] != cp.local_seqlen:
        raise _wrong_length("q", q, cp.local_seqlen, f"seqlen={cp.seqlen}", cp)
    if k.shape[1] != cp.local_kv_seqlen:
        raise _wrong_length("k", k, cp.local_kv_seqlen, f"kv_seqlen={cp.kv_seqlen}", cp)


def _check_heads(heads: int, kv_heads: int, cp: ContextParallel) -> None:
    ulysses, chunks = cp.ulysses, cp.options.head_chunks
    if not heads or not kv_heads or heads % kv_heads:
        raise ValueError(f"{heads} heads over {kv_heads} KV heads: num_kv_heads must divide num_heads")
    if heads < ulysses:
        raise ValueError(
            f"{heads} heads over ulysses={ulysses}: some ranks would compute none; split the heads over at most as many"
        )
    if heads // ulysses < chunks:
        raise ValueError(
            f"Options.head_chunks={chunks}, but a rank computes {heads // ulysses} of the {heads} heads (ulysses="
            f"{ulysses}): must be at most that"
        )


def _sizes(x: Tensor) -> str:
    """A shape whose sizes are plain numbers also while a compiler traces: the text of an error must be a constant."""
    return "(" + ", ".join([f"{int(n)}" for n in x.shape]) + (",)" if x.ndim == 1 else ")")


def _wrong_length(name: str, x: Tensor, local: int, whole: str, cp: ContextParallel) -> ValueError:
    turned = (
        f"; its dims must be [batch, tokens, heads, head_dim], and dim 2 has {local}" if x.shape[2] == local else ""
    )
    layout, door = (cp.k_layout, "shard_kv") if name == "k" else (cp.q_layout, "shard")
    who, among = f"rank {cp.rank} of {cp.world_size}", cp.binding.settings.among
    if among is not None:
        who = f"rank {among[cp.rank]} of the group, here {who},"
    return ValueError(
        f"{name} has {int(x.shape[1])} tokens, but {who} holds {local} of {whole} "
        f"(layout {layout.name}); shard with cp.{door}(){turned}"
    )


def _mask_handle(mask: Mask | None, cp: ContextParallel) -> Tensor:
    if mask is None:
        return cp.mask_handles[0]
    if not torch.compiler.is_compiling() and (not isinstance(mask, Mask) or mask not in cp.plans):
        _refuse_tensor(mask)
        listed = "; ".join(map(str, cp.masks))
        raise ValueError(f"mask {shown(mask)} {UNKNOWN_MASK} ({listed}); name it in ContextParallel(mask=)")
    return torch.from_numpy(mask.handle)


def _check_extras(bias: Tensor | None, rule: Rule | None, sinks: Tensor | None, q: Tensor, cp: ContextParallel) -> None:
    heads = int(q.shape[2])
    if bias is not None:
        _check_bias(bias, q, cp)
    if rule is not None and type(rule) is not RULES.get(getattr(rule, "name", "")):
        raise ValueError(f"bias={shown(rule)}: must be a tensor or a rule such as ringattn.alibi(slopes[{heads}])")
    if rule is not None and (reason := rule.refuse(heads)) is not None:
        raise ValueError(reason)
    if sinks is not None and (sinks.shape != (heads,) or sinks.dtype not in FLOATS or sinks.device != q.device):
        raise ValueError(
            f"sinks {_sizes(sinks)} {sinks.dtype} on {sinks.device}: must be floats [{heads}] on {q.device}"
        )


def _check_bias(bias: Tensor, q: Tensor, cp: ContextParallel) -> None:
    shape = (q.shape[0], q.shape[2], cp.local_seqlen, cp.kv_seqlen)
    fits = bias.ndim == 4 and bias.shape[0] in (1, shape[0]) and bias.shape[1] in (1, shape[1])
    if not fits or bias.shape[2:] != shape[2:] or bias.dtype not in FLOATS or bias.device != q.device:
        allowed = " (True may be seen: torch.zeros(bias.shape).masked_fill(~bias, -math.inf))"
        hint = allowed if bias.dtype == torch.bool else ""
        raise ValueError(
            f"bias {_sizes(bias)} {bias.dtype} on {bias.device}: must be floats{hint} "
            f"[1 or {int(shape[0])}, 1 or {int(shape[1])}, {shape[2]}, {shape[3]}] on {q.device}: this rank's queries, "
            "all keys in global order"
        )


def _apply_sign(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a positive scale: kernels mask with -inf before they scale."""
    if scale > 0:
        return q, scale
    return (q * -1.0, -scale) if scale < 0 else (q * 0.0, 1.0)
