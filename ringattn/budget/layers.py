"""What a layer computes, operation by operation, as two codes do: the decoder of the pretraining job (`decoder`: q, k
and v of one product, gate and value of one, RoPE on complex pairs) and Transformers' Llama and those like it
(`transformers`: a product each). What they keep for backward was read in their source and in PyTorch's formulas of
derivatives (tools/autograd/derivatives.yaml)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ringattn.budget.amounts import NOTHING, Amount, named
from ringattn.budget.model_shape import LayerShape
from ringattn.budget.tape import Tape, Tensor

INPUT, NORMS, QKV, OUT, INNER, RESIDUAL, CASTS, WEIGHTS = (
    "inputs of layers", "norms", "q k v", "attention out + lse", "MLP inner", "residual stream", "weights cast",
    "gradients",
)  # fmt: skip
SCRATCH, ACCUMULATORS = "kernel scratch", "attention accumulators"


@dataclass(frozen=True, slots=True)
class Numerics:
    """Bytes of a number: of parameters, of what products take, of what is held of a token between layers, of running
    results. ``autocast``: products cast what they take, parameters included. ``fused``: a norm is one kernel, which
    keeps its input and a number a token, as on GPUs."""

    weight: Amount
    compute: Amount
    residual: Amount
    wide: Amount
    autocast: bool = False
    fused: bool = False

    @staticmethod
    def of(weight: int, compute: int, residual: int, autocast: bool, fused: bool) -> Numerics:
        """From plain numbers."""
        names = ("bytes of a weight", "bytes", "bytes of the residual")
        sizes = [named(name, x) for name, x in zip(names, (weight, compute, residual), strict=True)]
        wide = named("bytes of an accumulator", 8 if compute == 8 else 4)
        return Numerics(sizes[0], sizes[1], sizes[2], wide, autocast, fused)


@dataclass(frozen=True, slots=True)
class Scratch:
    """What a kernel takes of its own in a forward and in a backward call, beside its results; whether ``out`` and the
    gradients are gathered in accumulators of their own, which are cast at the end."""

    forward: tuple[Tensor, ...] = ()
    backward: tuple[Tensor, ...] = ()
    gathered: bool = True


@dataclass(slots=True)
class LayerCode:
    """A layer of a model as ``code`` computes it. ``tokens``: of this rank, all rows; ``width`` of the hidden state."""

    code: str
    layer: LayerShape
    width: Amount
    numerics: Numerics
    scratch: Scratch = field(default_factory=Scratch)

    # -- the parts ----------------------------------------------------------------------------

    def input(self, tokens: Amount, size: Amount | None = None) -> Tensor:
        """What a layer is given."""
        return Tensor(INPUT, "layer's input", tokens * self.width * (size or self.numerics.residual))

    def whole(self, tokens: Amount) -> Tape:
        """All of it, at once."""
        x = self.input(tokens)
        tape = Tape((x,))
        q, k, v = self.project(tape, x, tokens)
        out = self.attend(tape, q, k, v, tokens)
        tape.results = (self.conclude(tape, x, out, tokens),)
        return tape

    def projection(self, tokens: Amount) -> Tape:
        """The part before attention, by itself."""
        x = self.input(tokens)
        tape = Tape((x,))
        tape.results = self.project(tape, x, tokens)
        return tape

    def attention(self, tokens: Amount) -> Tape:
        """Attention by itself, of q, k and v that lie apart."""
        q, k, v = (Tensor(QKV, name, size) for name, size in zip("qkv", self.qkv(tokens), strict=True))
        tape = Tape((q, k, v))
        tape.results = (self.attend(tape, q, k, v, tokens),)
        return tape

    def conclusion(self, tokens: Amount) -> Tape:
        """The part behind attention, by itself."""
        x, out = self.input(tokens), Tensor(OUT, "out", self.out_size(tokens))
        tape = Tape((x, out))
        tape.results = (self.conclude(tape, x, out, tokens),)
        return tape

    # -- sizes --------------------------------------------------------------------------------

    def heads(self) -> tuple[Amount, Amount, Amount, Amount]:
        """Query heads, KV heads, the size of a key and of a value."""
        shape = self.layer.attention
        size = named("head size", shape.head_dim)
        values = size if shape.v_head_dim == shape.head_dim else named("value size", shape.v_head_dim)
        return named("heads", shape.num_heads), named("KV heads", shape.num_kv_heads), size, values

    def qkv(self, tokens: Amount) -> tuple[Amount, Amount, Amount]:
        """Bytes of q, k and v."""
        heads, kv_heads, dim, v_dim = self.heads()
        c = self.numerics.compute
        return tokens * heads * dim * c, tokens * kv_heads * dim * c, tokens * kv_heads * v_dim * c

    def out_size(self, tokens: Amount) -> Amount:
        """Bytes of attention's result."""
        heads, _, _, v_dim = self.heads()
        return tokens * heads * v_dim * self.numerics.compute

    # -- operations ---------------------------------------------------------------------------

    def norm(self, tape: Tape, x: Tensor, tokens: Amount) -> Tensor:
        """An RMSNorm of the hidden state, computed in the dtype of its weight (decoder), or in fp32 (Transformers)."""
        n, entries = self.numerics, tokens * self.width
        wide = n.weight if self.code == "decoder" else n.wide
        source = self.cast(tape, x, n.residual, wide, entries, "norm's input in fp32", NORMS)
        rest = Tensor(NORMS, "reciprocal root of a token", tokens * n.wide, grad=None)
        scaled = Tensor(NORMS, "normed before the weight", entries * (wide if self.code == "decoder" else n.residual))
        result = Tensor(NORMS, "normed", scaled.size)
        weight = (Tensor(WEIGHTS, "norm's weight", self.width * n.weight),)
        if n.fused and self.code == "decoder":
            tape.run("norm", (source,), (rest, result), keeps=(source, rest), weights=weight)
            return result
        if wide.value != scaled.size.value // max(entries.value, 1):  # Transformers casts back before the weight
            normed = Tensor(NORMS, "normed in fp32", entries * wide)
            tape.run("norm", (source,), (rest, normed), keeps=(source, rest))
            tape.run("cast", (normed,), (scaled,))
        else:
            tape.run("norm", (source,), (rest, scaled), keeps=(source, rest))
        tape.run("norm's weight", (scaled,), (result,), keeps=(scaled,), weights=weight)
        return result

    def cast(
        self, tape: Tape, x: Tensor, have: Amount, want: Amount, entries: Amount, name: str, kind: str
    ) -> Tensor:  # fmt: skip
        """x in numbers of another size, a copy, or itself."""
        if have.value == want.value:
            return x
        made = Tensor(kind, name, entries * want)
        tape.run("cast", (x,), (made,))
        return made

    def linear(
        self, tape: Tape, x: Tensor, tokens: Amount, inner: Amount, outer: Amount, name: str, kind: str,
        cast_from: Amount | None = None, bias: bool = False,
    ) -> Tensor:  # fmt: skip
        """A product with a matrix ``[outer, inner]``. ``cast_from``: bytes of a number of x where autocast casts it."""
        n = self.numerics
        have = cast_from or n.compute
        x = self.cast(tape, x, have, n.compute, tokens * inner, f"input of {name}, cast", x.kind)
        size = outer * inner + (outer if bias else NOTHING)
        weight = Tensor(WEIGHTS, f"weight of {name}", size * n.weight)
        result = Tensor(kind, name, tokens * outer * n.compute)
        keeps: tuple[Tensor, ...] = (x,)
        scratch: tuple[Tensor, ...] = ()
        if n.autocast:
            copied = Tensor(CASTS, f"weight of {name}, cast", outer * inner * n.compute, grad=None)
            tape.run("cast", (), (copied,))
            keeps, scratch = (x, copied), (Tensor(WEIGHTS, f"weight of {name}, before it is cast", copied.size),)
        tape.run(f"product {name}", (x,), (result,), keeps=keeps, weights=(weight,), backward_scratch=scratch)
        return result

    def project(self, tape: Tape, x: Tensor, tokens: Amount) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v."""
        normed = self.norm(tape, x, tokens)
        if self.layer.attention.latent is not None:
            return self._latent(tape, normed, tokens)
        return self._fused_qkv(tape, normed, tokens) if self.code == "decoder" else self._qkv(tape, normed, tokens)

    def _fused_qkv(self, tape: Tape, normed: Tensor, tokens: Amount) -> tuple[Tensor, Tensor, Tensor]:
        n, (heads, kv_heads, dim, _) = self.numerics, self.heads()
        sizes = self.qkv(tokens)
        qkv = self.linear(tape, normed, tokens, self.width, (heads + 2 * kv_heads) * dim, "q k v", QKV, self.normed)
        qk_entries = tokens * (heads + kv_heads) * dim
        qk = Tensor(QKV, "q and k", NOTHING, qkv, qk_entries * n.compute)
        v = Tensor(QKV, "v", NOTHING, qkv, sizes[2])
        tape.run("split", (qkv,), (qk, v))
        source = self.cast(tape, qk, n.compute, n.wide, qk_entries, "q and k in fp32", QKV)
        rotated = Tensor(QKV, "q and k rotated", qk_entries * n.wide)
        tape.run("rotation", (source,), (rotated,))
        rotated = self.cast(tape, rotated, n.wide, n.compute, qk_entries, "q and k rotated, cast", QKV)
        q, k = Tensor(QKV, "q", NOTHING, rotated, sizes[0]), Tensor(QKV, "k", NOTHING, rotated, sizes[1])
        tape.run("split", (rotated,), (q, k))
        return q, k, v

    def _qkv(self, tape: Tape, normed: Tensor, tokens: Amount) -> tuple[Tensor, Tensor, Tensor]:
        shape, (heads, kv_heads, dim, v_dim) = self.layer.attention, self.heads()
        widths = ("q", heads * dim), ("k", kv_heads * dim), ("v", kv_heads * v_dim)
        q, k, v = (
            self.linear(tape, normed, tokens, self.width, wide, name, QKV, self.normed, shape.bias)
            for name, wide in widths
        )
        if shape.norms is not None:
            q, k = (self._head_norm(tape, x, tokens * rows) for x, rows in ((q, heads), (k, kv_heads)))
        return self._rotated(tape, q), self._rotated(tape, k), v

    def _head_norm(self, tape: Tape, x: Tensor, rows: Amount) -> Tensor:
        """Transformers' norm of queries or keys."""
        n, (_, _, dim, _) = self.numerics, self.heads()
        source = self.cast(tape, x, n.compute, n.wide, rows * dim, f"{x.name} in fp32", NORMS)
        rest = Tensor(NORMS, f"reciprocal root of {x.name}", rows * n.wide, grad=None)
        scaled, result = (Tensor(NORMS, f"{x.name} normed", x.size) for _ in range(2))
        tape.run("norm", (source,), (rest, scaled), keeps=(source, rest))
        tape.run(
            "norm's weight", (scaled,), (result,), keeps=(scaled,), weights=(Tensor(WEIGHTS, "norm", dim * n.weight),)
        )
        return result

    def _rotated(self, tape: Tape, x: Tensor) -> Tensor:
        """`x * cos + rotate_half(x) * sin`."""
        rotated, half = Tensor(QKV, f"{x.name} rotated", x.size), Tensor(QKV, f"{x.name} times sin", x.size, grad=None)
        tape.run("rotation", (x,), (rotated,), scratch=(half, half), backward_scratch=(half, half))
        return rotated

    def _latent(self, tape: Tape, normed: Tensor, tokens: Amount) -> tuple[Tensor, Tensor, Tensor]:
        """DeepSeek's: down to a latent, a norm, and up to all heads; a key's rotary entries are those of all heads."""
        shape, (heads, _, dim, v_dim) = self.layer.attention, self.heads()
        assert shape.latent is not None
        low = named("KV rank", shape.latent.kv_rank) + named("rotary size", shape.latent.rope_dim)
        source, inner = normed, self.width
        if shape.latent.q_rank is not None:
            inner = named("query rank", shape.latent.q_rank)
            source = self.linear(tape, normed, tokens, self.width, inner, "query latent", QKV)
        q = self.linear(tape, source, tokens, inner, heads * dim, "q", QKV)
        latent = self.linear(tape, normed, tokens, self.width, low, "KV latent", QKV)
        nope = named("head size without rotary", shape.head_dim - shape.latent.rope_dim)
        both = self.linear(
            tape, latent, tokens, named("KV rank", shape.latent.kv_rank), heads * (nope + v_dim), "k and v", QKV
        )
        k, v = Tensor(QKV, "k", self.qkv(tokens)[1]), Tensor(QKV, "v", NOTHING, both, self.qkv(tokens)[2])
        tape.run("keys", (both,), (k, v))
        return self._rotated(tape, q), k, v

    @property
    def normed(self) -> Amount:
        """Bytes of a number of a norm's result."""
        n = self.numerics
        return n.weight if self.code == "decoder" and n.autocast else n.residual

    def attend(self, tape: Tape, q: Tensor, k: Tensor, v: Tensor, tokens: Amount) -> Tensor:
        """Attention: the result is gathered in an accumulator, which is it where dtypes agree; lse is fp32."""
        n, (heads, _, _, v_dim) = self.numerics, self.heads()
        out = Tensor(OUT, "out", self.out_size(tokens))
        lse = Tensor(OUT, "lse", tokens * heads * n.wide, grad=None)
        apart = self.scratch.gathered and n.wide.value != n.compute.value
        running = (Tensor(ACCUMULATORS, "running out", tokens * heads * v_dim * n.wide),) if apart else ()
        sums = tuple(
            Tensor(ACCUMULATORS, f"d{x.name[0]} added up", x.gradient * n.wide.over(n.compute)) for x in (q, k, v)
        )
        tape.run(
            "attention", (q, k, v), (out, lse), keeps=(q, k, v, out, lse),
            scratch=(*running, *self.scratch.forward),
            backward_scratch=self.scratch.backward, sums=sums if apart else (),
        )  # fmt: skip
        return out

    def conclude(self, tape: Tape, x: Tensor, out: Tensor, tokens: Amount) -> Tensor:
        """The map of attention's result, a norm and the MLP, each added to the residual stream."""
        shape, n, (heads, _, _, v_dim) = self.layer.attention, self.numerics, self.heads()
        y = self.linear(
            tape, out, tokens, heads * v_dim, self.width, "attention's output", RESIDUAL, bias=shape.output_bias
        )
        middle = Tensor(RESIDUAL, "x + attention", tokens * self.width * n.residual)
        tape.run("sum", (x, y), (middle,), passes=True)
        normed = self.norm(tape, middle, tokens)
        z = (
            self._experts(tape, normed, tokens)
            if self.layer.mlp.experts
            else self._mlp(tape, normed, tokens, self.layer.mlp.inner)
        )
        result = Tensor(INPUT, "layer's result", tokens * self.width * n.residual)
        tape.run("sum", (middle, z), (result,), passes=True)
        return result

    def _mlp(self, tape: Tape, normed: Tensor, tokens: Amount, wide: int, name: str = "inner width") -> Tensor:
        n, mlp, inner = self.numerics, self.layer.mlp, named(name, wide)
        size = tokens * inner * n.compute
        if not mlp.gated:
            up = self.linear(tape, normed, tokens, self.width, inner, "up", INNER, self.normed, mlp.bias)
            active = Tensor(INNER, "activation", size)
            tape.run("activation", (up,), (active,), keeps=(up,))
            return self.linear(tape, active, tokens, inner, self.width, "down", RESIDUAL, bias=mlp.bias)
        if self.code == "decoder":
            both = self.linear(tape, normed, tokens, self.width, 2 * inner, "gate and value", INNER, self.normed)
            gate, value = (Tensor(INNER, name, NOTHING, both, size) for name in ("gate", "value"))
            tape.run("chunk", (both,), (gate, value))
        else:
            gate = self.linear(tape, normed, tokens, self.width, inner, "gate", INNER, self.normed, mlp.bias)
        silu = Tensor(INNER, "silu of the gate", size)
        tape.run("silu", (gate,), (silu,), keeps=(gate,))
        if self.code != "decoder":
            value = self.linear(tape, normed, tokens, self.width, inner, "up", INNER, self.normed, mlp.bias)
        product = Tensor(INNER, "gated", size)
        tape.run("gate x value", (silu, value), (product,), keeps=(silu, value))
        return self.linear(tape, product, tokens, inner, self.width, "down", RESIDUAL, bias=mlp.bias)

    def _routed(self, tape: Tape, normed: Tensor, tokens: Amount, rows: Amount) -> tuple[Tensor, Tensor]:
        """The router: each row's share, and the rows' order by expert."""
        n, experts, index = self.numerics, named("experts", self.layer.mlp.experts), named("bytes of an index", 8)
        weight = Tensor(WEIGHTS, "router", experts * self.width * n.weight)
        logits = Tensor(INNER, "router's logits", tokens * experts * n.compute)
        tape.run("router", (normed,), (logits,), keeps=(normed,), weights=(weight,))
        odds = Tensor(INNER, "router's probabilities", tokens * experts * n.wide)
        tape.run("router's softmax", (logits,), (odds,), keeps=(odds,))
        shares, chosen, order = (
            Tensor(INNER, "shares of experts", rows * n.wide),
            Tensor(INNER, "chosen experts", rows * index, grad=None),
            Tensor(INNER, "order by expert", rows * index, grad=None),
        )
        tape.run("choice of experts", (odds,), (shares, chosen, order), keeps=(chosen, shares))
        return shares, order

    def _experts(self, tape: Tape, normed: Tensor, tokens: Amount) -> Tensor:
        """Rows of tokens for each expert that computes them, grouped products, and a weighted sum, as Transformers'
        `grouped_mm_experts_forward` does; the experts' parameters make one gradient each."""
        n, mlp = self.numerics, self.layer.mlp
        rows, inner = tokens * named("active experts", mlp.active), named("expert's inner width", mlp.inner)
        experts, size = named("experts", mlp.experts), rows * self.width * n.compute
        shares, order = self._routed(tape, normed, tokens, rows)
        sorted_ = Tensor(INNER, "tokens by expert", size)
        tape.run("sort by expert", (normed,), (sorted_,), keeps=(order,))
        both = Tensor(INNER, "gate and up of experts", rows * (2 * inner) * n.compute)
        of_up = Tensor(WEIGHTS, "experts' gate and up", experts * self.width * (2 * inner) * n.weight)
        tape.run("experts' up", (sorted_,), (both,), keeps=(sorted_,), weights=(of_up,))
        gate, up = (
            Tensor(INNER, f"{name} of experts", NOTHING, both, rows * inner * n.compute) for name in ("gate", "up")
        )
        tape.run("chunk", (both,), (gate, up))
        gated, silu = (
            Tensor(INNER, name, rows * inner * n.compute) for name in ("gated of experts", "silu of experts")
        )
        tape.run("silu", (gate,), (silu,), keeps=(gate,))
        tape.run("gate x value", (silu, up), (gated,), keeps=(silu, up))
        down = Tensor(INNER, "results of experts", size)
        of_down = Tensor(WEIGHTS, "experts' down", experts * inner * self.width * n.weight)
        tape.run("experts' down", (gated,), (down,), keeps=(gated,), weights=(of_down,))
        weighted, back = Tensor(INNER, "results times shares", size), Tensor(INNER, "in the tokens' order", size)
        product = Tensor(SCRATCH, "results times their gradient", size)  # of which the shares' gradient is the sum
        tape.run("shares", (down, shares), (weighted,), keeps=(down, shares), backward_scratch=(product,))
        again = Tensor(INNER, "order back", order.size, grad=None)
        tape.run("order of tokens", (weighted,), (back, again), keeps=(again,))
        result = Tensor(RESIDUAL, "sum over experts", tokens * self.width * n.compute)
        tape.run("sum over experts", (back,), (result,), passes=True)  # whose gradient is a view
        if not mlp.shared_inner:
            return result
        shared = self._mlp(tape, normed, tokens, mlp.shared_inner, "shared inner width")
        both_ = Tensor(RESIDUAL, "experts and the shared one", result.size)
        tape.run("sum", (result, shared), (both_,), passes=True)
        return both_
