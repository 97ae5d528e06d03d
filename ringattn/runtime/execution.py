"""A call from its beginning on all ranks to its end on all of them, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.comm import CallMismatch, agree, together
from ringattn.kernels.base import row_delta
from ringattn.kernels.operators import cast
from ringattn.kernels.scores import RULES, Rule, Scores
from ringattn.planning.wanted import Wanted
from ringattn.runtime import heads, loops
from ringattn.runtime.binding import Binding
from ringattn.runtime.capture import Found, Inputs, Loop, Walk
from ringattn.runtime.largest import by_head, of_all_ranks
from ringattn.runtime.link import Link, Messages
from ringattn.runtime.prepared import Prepared
from ringattn.runtime.timeline import Timeline

FORWARD, BACKWARD = "attention forward", "attention backward"
NOT_FINITE = "holds NaN or infinity"
Results = tuple[Tensor, Tensor, Tensor | None]  # out, lse, and the largest logits where they are asked for


@dataclass(frozen=True, slots=True)
class Execution:
    """A prepared call with what it alone brings along: how its logits are made, its sinks ``[num_heads]``, whether some
    gradient is wanted, of sinks too, and what finds its ``largest`` logits, if these are."""

    binding: Binding
    call: Prepared
    scores: Scores
    sinks: Tensor | None = None
    grad: bool = False
    rule: str = ""  # the name of the bias rule
    label: str = ""
    largest: Prepared | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Results:
        """``out`` and ``lse``, on all ranks together, and the largest logits where they are asked for."""
        with together(self.binding.link.transport, FORWARD):
            return self._forward(q, k, v)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor) -> Results:
        if self.binding.settings.options.check_nan:
            _check_finite(self.binding, self.label, q=q, k=k, v=v)
        link = self._begin(FORWARD)
        if self.call.seat.swap is None:
            out, lse = self._attend(q, k, v, self.sinks, self.scores)
        else:
            out, lse = self._attend_together(link, q, k, v)
        found = None if self.largest is None else self._largest(self.largest, link, q, k)
        link.finish(q.device.type, needed=self._needed or found is not None)
        return out, lse, found

    def _largest(self, call: Prepared, link: Messages, q: Tensor, k: Tensor) -> Tensor:
        """Of all ranks' queries, fp32 ``[batch, heads]``: the forward program walked once more, without values. A sink
        is no key's logit."""
        made, nothing = replace(self, call=call, sinks=None, scores=self.scores.of_logits), k[..., :0]
        if call.seat.swap is None:
            _, rows = made._attend(q, k, nothing, None, made.scores)
        else:
            _, rows = made._attend_together(link, q, k, nothing)
        return of_all_ranks(link, by_head(rows), self.binding.rank, self.binding.world_size)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores) -> tuple[Tensor, Tensor]:
        """``out`` and ``lse`` of what this rank computes."""
        if not _together(q, k, v):
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = self._walk(loops.forward, (q, k, v, sinks), scores, (self.call.kind.dtype, self.call.wide))
        assert out is not None and lse is not None, "results are always wanted"
        return out, lse

    def _attend_together(self, link: Messages, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The same of this rank's tokens, whose heads are computed by its team, or by chunks."""
        homes = heads.homes_of_results(q, v, self.call.wide)
        for part in self.call.parts:
            assert part.seat.swap is not None, "heads are swapped in all parts"
            given = q, k, v, self.sinks, self.scores
            part.seat.swap.forward(link, given, replace(self, call=part)._attend, homes)
        return homes[0], heads.row(homes[1]).contiguous()

    def _differentiate_together(self, link: Messages, swap: heads.HeadSwap, saved: heads.Saved) -> Found:
        if saved[6] is None and self.call.kernels.call.dlse:  # other ranks' lse may have one, and all move the same
            saved = (*saved[:6], torch.zeros_like(saved[4]))
        homes = heads.homes_of_gradients(swap, saved[:3], self.call.wide, self.wanted)
        for part in self.call.parts:
            assert part.seat.swap is not None, "heads are swapped in all parts"
            differentiate = replace(self, call=part)._differentiate
            part.seat.swap.backward(link, saved, self.scores, differentiate, homes)
        return tuple(None if home is None else home.to(x.dtype) for home, x in zip(homes, saved[:3], strict=True))

    @property
    def wanted(self) -> Wanted:
        """The gradients for which ranks need each other."""
        return self.call.program.wanted

    @property
    def _needed(self) -> bool:
        """Whether some rank needs another in this call."""
        return self.call.seat.swap is not None or not self.call.program.alone

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
        wants_dsinks: bool,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """``dq, dk, dv``, those that are wanted, laid in memory as the inputs are; ``dbias`` where ``Scores.dbias`` is
        there to be added to; and ``dsinks``, where wanted."""
        with together(self.binding.link.transport, BACKWARD):
            link = self._begin(BACKWARD)
            dout = dout if dout.stride(-1) == 1 else dout.contiguous()
            swap, saved = self.call.seat.swap, (q, k, v, out, lse, dout, dlse)
            grads: Found = (None, None, None)
            if not any(self.wanted):
                pass  # those of sinks alone follow from the own rows
            elif swap is None:
                grads = self._differentiate(saved, self.scores, (self.call.kind.dtype,) * 3)
            else:
                grads = self._differentiate_together(link, swap, saved)
            dsinks = None
            if wants_dsinks and self.sinks is not None:
                dsinks = _sinks_gradient(self.sinks, lse, row_delta(dout.to(self.call.wide), out, dlse))
            bias, dbias = self.scores.bias, self.scores.dbias
            link.finish(q.device.type, needed=self._needed and any(self.wanted))
            return *grads, None if bias is None or dbias is None else dbias.to(bias.dtype), dsinks

    def _differentiate(self, saved: heads.Saved, scores: Scores, dtypes: Sequence[torch.dtype]) -> Found:
        """``dq, dk, dv`` in these dtypes of what this rank computes, those that are wanted."""
        q, k, v, *rest = saved
        if _together(q, k, v):
            return self._walk(loops.backward, saved, scores, dtypes)
        dense = q.contiguous(), k.contiguous(), v.contiguous()
        found = self._walk(loops.backward, (*dense, *rest), scores, dtypes)
        pairs = zip(found, (q, k, v), strict=True)
        return tuple(None if g is None else torch.empty_like(x, dtype=g.dtype).copy_(g) for g, x in pairs)

    def _walk(self, loop: Loop, inputs: Inputs, scores: Scores, dtypes: Sequence[torch.dtype]) -> Found:
        """What a loop finds, in these dtypes: the call's own tensors, whether it ran or a graph of it was replayed."""
        call, binding, replayed = self.call, self.binding, False
        walk, timeline = Walk(loop, inputs, call, scores), binding.link.timeline
        if timeline is not None:
            found = timeline.walk(walk)
        elif call.eager is None:
            found, replayed = binding.graphs.run(walk, must=binding.settings.options.graphs == "on")
        else:
            found = walk(binding.link)
        own = partial(Tensor.to, copy=True) if replayed else cast
        return tuple(None if x is None else own(x, dtype) for x, dtype in zip(found, dtypes, strict=True))

    def without_tensors(self) -> Execution:
        """What autograd may keep: tensors it keeps itself, watches over, and lets hooks move."""
        scores = self.scores
        if self.sinks is None and scores.bias is None and scores.rule is None:
            return self
        return replace(self, sinks=None, scores=replace(scores, bias=None, rule=None))

    def with_tensors(self, bias: Tensor | None, rule_params: Tensor | None, sinks: Tensor | None) -> Execution:
        """The same with the tensors that autograd has kept."""
        dbias = torch.zeros_like(bias, dtype=self.call.wide) if bias is not None and self.wanted.bias else None
        rule = None if rule_params is None else RULES[self.rule](rule_params)
        return replace(self, sinks=sinks, scores=replace(self.scores, bias=bias, dbias=dbias, rule=rule))

    def _begin(self, name: str) -> Link | Timeline:
        """Begins the call on all ranks, which compare what they are about to do; what it is made through."""
        binding, scores, device = self.binding, self.scores, self.call.kind.device.type
        link = binding.link.timeline or binding.link
        if link is binding.link and binding.world_size == 1:
            return link
        rule, bias, dropout, wanted = scores.rule, scores.bias, scores.dropout, self.wanted
        moves = self.call.seat.swap is not None or not any(wanted.inputs)  # the bias's gradient, or keys just for it
        own = {}
        if dropout is not None:
            own["this call's dropout"] = f"seed {dropout.seed}"
        if rule is not None and device == "cpu":  # reading values would wait for another device
            own["this call's bias rule"] = _in_words(rule)
        extras = Extras(
            None if rule is None else rule.name,
            None if bias is None else (bias.shape[0], bias.shape[1]),
            wanted.bias if bias is not None and moves else None,
            None if dropout is None else dropout.p,
            self.sinks is not None,
            self.grad,
            wanted.inputs,
            self.largest is not None,
        )
        link.begin(
            name, (binding.digest, self.call.signature, extras), partial(self._facts, extras), device, own,
            sort=(self.call.asked, extras), label=self.label,
        )  # fmt: skip
        return link

    def _facts(self, extras: Extras) -> dict[str, str]:
        kind, s, scores, program = self.call.asked, self.binding.settings, self.scores, self.call.program
        chunks = "" if s.options.head_chunks == 1 else f", heads in {s.options.head_chunks} chunks"
        travel = ", queries travel" if program.travel else ""
        layouts = self.binding.computed
        return {
            "mask": str(self.call.mask),
            "lengths": f"seqlen {s.seqlen}, kv_seqlen {s.kv_seqlen}, q_offset {s.q_offset}",
            "shapes": f"batch {kind.batch}, heads {kind.num_heads} over {kind.num_kv_heads}, head_dim {kind.head_dim}, "
            f"v_head_dim {kind.v_head_dim}, {kind.dtype} on {kind.device.type}",
            "ulysses": f"{s.ulysses}{chunks}",
            "logits": f"scale {scores.scale!r}, softcap {scores.softcap}",
            **self._brought(extras),
            "gradient": "wanted" if extras.grad else "not wanted",
            "gradients wanted of q, k and v": str(Wanted(*extras.wanted)),
            "kernel": self.call.kernels.name if s.ulysses == 1 else s.kernel,  # each by the heads that it computes
            "schedule": f"{program.schedule} (cut {program.cut}{travel})",
            "layout": f"{layouts.q.name} {layouts.q.digest}",
            "layout of the keys": f"{layouts.k.name} {layouts.k.digest}",
            "planned for": str(s.terms),
            "digest of the mask": self.call.mask.digest,
        }

    def _brought(self, extras: Extras) -> dict[str, str]:
        """What a call may have beside q, k and v, or be asked for beside out."""
        rule, wanted = self.scores.rule, {True: "wanted", False: "not wanted"}
        facts = {
            "bias": None if extras.bias is None else f"[{extras.bias[0]}, {extras.bias[1]}, ...]",
            "gradient of the bias": None if extras.dbias is None else wanted[extras.dbias],
            "bias rule": None if rule is None else _in_words(rule),
            "dropout": None if extras.dropout is None else f"p {extras.dropout}",
            "sinks": "given" if extras.sinks else None,
            "largest logits": "asked for" if extras.max_logit else None,
        }
        return {name: said for name, said in facts.items() if said is not None}


class Extras(NamedTuple):
    """What a call brings along, as far as ranks compare it once for all calls of a kind."""

    rule: str | None
    bias: tuple[int, int] | None
    dbias: bool | None  # where something moves for it
    dropout: float | None
    sinks: bool
    grad: bool
    wanted: tuple[bool, bool, bool]  # of q, k and v
    max_logit: bool


def _in_words(rule: Rule) -> str:
    return f"{rule.name} {rule.params.tolist()}"


def _together(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """What kernels ask for: contiguous last dims."""
    return bool(q.stride(-1) == k.stride(-1) == v.stride(-1) == 1)


def _sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """This rank's part. A sink is a key of value 0: its logit's gradient is `p * (0 - delta)`, summed over queries."""
    p = torch.exp(sinks.to(lse.dtype)[:, None] - lse).masked_fill_(lse == -torch.inf, 0.0)
    return -(p * delta).sum((0, 2)).to(sinks.dtype)


def _check_finite(binding: Binding, label: str, **tensors: Tensor) -> None:
    """Raises on every rank if any rank holds a value that is not finite, so that no rank waits for another. Before the
    call begins: ranks that do not check are then past this comparison, and are told."""
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    found = f"{' and '.join(bad)} {NOT_FINITE}" if bad else "all finite"
    transport, facts = binding.link.transport, {"call": FORWARD, "values of q, k and v": found}
    if transport.world_size > 1:
        transport.log.check_process()
        try:
            agree(transport, transport.log.ballot(), facts, "; ".join(filter(None, ("Options.check_nan", label))))
        except CallMismatch as error:
            if NOT_FINITE not in str(error):
                raise
            raise FloatingPointError(f"{error} (Options.check_nan)") from None
    if bad:
        raise FloatingPointError(f"{found} (Options.check_nan)")
