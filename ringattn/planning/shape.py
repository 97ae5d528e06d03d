"""What an attention call computes with: heads, their sizes, and the FLOP and bytes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ringattn.arguments.values import integer, shown
from ringattn.planning.wanted import Wanted

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Pass:
    """What a forward or a backward pass takes. ``flop``: of an attending pair. ``token``: bytes that travel for a K/V
    token, gradients included. ``query``: bytes that travel for a query that goes to its keys, there and back. ``row``:
    elements of a query row's result that are merged with others. ``copied``: elements that move where a token's K/V
    are copied into a buffer, and their gradients out."""

    flop: float
    token: int
    query: int
    row: int
    copied: int


@dataclass(frozen=True)
class Shape:
    """The shape of attention calls, as far as their cost follows from it.

    num_heads, num_kv_heads: of the queries, and of keys and values.
    head_dim: of queries and keys; v_head_dim: of values, where theirs is another.
    batch: rows of a call.
    dtype: of q, k and v, by name or a ``torch.dtype``: float16, bfloat16, float32 or float64.
    gradients: the letters of those of q, k and v whose gradients are wanted: "qv" where nothing below k is trained, ""
        where there is no backward pass.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    batch: int = 1
    dtype: str = "bfloat16"
    gradients: str = "qkv"

    def __post_init__(self) -> None:
        plain = {name: integer(f"Shape.{name}", getattr(self, name), 1, 1 << 20) for name in _NUMBERS}
        v = self.v_head_dim
        plain["v_head_dim"] = plain["head_dim"] if v is None else integer("Shape.v_head_dim", v, 1, 1 << 20)
        if plain["num_heads"] % plain["num_kv_heads"]:
            raise ValueError(
                f"Shape: {plain['num_heads']} heads over {plain['num_kv_heads']} KV heads: num_kv_heads must divide "
                "num_heads"
            )
        dtype = str(self.dtype).removeprefix("torch.")
        if dtype not in BYTES:
            raise ValueError(f"Shape.dtype={shown(self.dtype)}: must be one of {', '.join(BYTES)}")
        names = self.gradients
        if not isinstance(names, str) or len(set(names) & set("qkv")) < len(names):
            raise ValueError(f"Shape.gradients={shown(names)}: must be letters of 'qkv', each at most once")
        gradients = "".join(sorted(names, key="qkv".index))
        for name, value in {**plain, "dtype": dtype, "gradients": gradients}.items():
            object.__setattr__(self, name, value)  # as plain values: equal shapes have one digest on all ranks

    @property
    def values(self) -> int:
        """The head size of values."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's K and V of one head, of all batch rows."""
        return self.batch * (self.head_dim + self.values) * BYTES[self.dtype]

    @property
    def wide(self) -> int:
        """Bytes of an element of running results and of gradients."""
        return 8 if self.dtype == "float64" else 4

    @cached_property
    def forward(self) -> Pass:
        """q goes to its keys and (out, lse) comes home, its lse as two numbers."""
        rows, d, v = self.batch * self.num_heads, self.head_dim, self.values
        query = rows * (d * BYTES[self.dtype] + (v + 2) * self.wide)
        kv = self.batch * self.num_kv_heads * (d + v)
        return Pass(2.0 * rows * (d + v), kv * BYTES[self.dtype], query, rows * v, kv)

    @cached_property
    def backward(self) -> Pass:
        """Five matrix products for two, whichever gradients are wanted: fused kernels compute all of them. Gradients of
        K/V are wide; q, dout, out, lse, delta and dlse go to the keys and dq comes home."""
        if not self.gradients:
            return Pass(0.0, 0, 0, 0, 0)
        rows, d, v, wanted = self.batch * self.num_heads, self.head_dim, self.values, Wanted.of(self.gradients)
        query = rows * (d + 2 * v + 3 + wanted.q * d) * self.wide
        heads = self.batch * self.num_kv_heads
        kv, grads = heads * (d + v), heads * wanted.key_columns(d, v)
        token = kv * BYTES[self.dtype] + grads * self.wide
        return Pass(2.0 * rows * (3 * d + 2 * v), token, query, rows * d * wanted.q, kv + grads)

    @property
    def passes(self) -> int:
        """Forward, and backward where some gradient is wanted."""
        return 2 if self.gradients else 1

    @property
    def thin(self) -> int:
        """K/V tokens whose bytes are those of one travelling query, at least, over both passes."""
        query, token = (getattr(self.forward, name) + getattr(self.backward, name) for name in ("query", "token"))
        return max(-(-query // token), 1)


_NUMBERS = ("num_heads", "num_kv_heads", "head_dim", "batch")

# Assumed while nothing is known of a call: the attention of an 8B Llama 3.
TYPICAL = Shape(32, 8, 128)
