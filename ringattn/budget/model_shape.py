"""A decoder's shape: what its parameters, activations and FLOP follow from. Integers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-AI, 2024, arXiv:2405.04434): queries are made of ``q_rank`` numbers a token
    (None: of the hidden state), keys and values of all heads of ``kv_rank``, and ``rope_dim`` of a key's entries, which
    all heads share, carry its position."""

    q_rank: int | None
    kv_rank: int
    rope_dim: int


@dataclass(frozen=True)
class AttentionShape:
    """A layer's attention.

    num_heads, num_kv_heads: of the queries, and of keys and values as attention is given them.
    head_dim, v_head_dim: entries of a query or key, and of a value, of one head.
    window: keys that a query sees, itself included; None: all before it.
    bias, output_bias: whether the maps to q, k and v have one, and the map of the result.
    norms: of queries and keys: None, "head" (a weight for each entry of a head, which all heads share), or "width" (a
        weight for each entry of all heads).
    sinks: a logit a head that no key has.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None = None
    bias: bool = False
    output_bias: bool = False
    norms: str | None = None
    sinks: bool = False
    latent: Latent | None = None

    def matmuls(self, width: int) -> int:
        """Entries of the matrices that a token's hidden state goes through."""
        q, out = self.num_heads * self.head_dim, self.num_heads * self.v_head_dim * width
        if self.latent is None:
            return width * q + width * self.num_kv_heads * (self.head_dim + self.v_head_dim) + out
        low = self.latent
        queries = width * q if low.q_rank is None else low.q_rank * (width + q)
        keys = self.num_heads * (self.head_dim - low.rope_dim + self.v_head_dim)
        return queries + width * (low.kv_rank + low.rope_dim) + low.kv_rank * keys + out

    def parameters(self, width: int) -> int:
        """Those matrices, biases, norms and sinks."""
        vectors = self._biases() * self.bias + width * self.output_bias + self.num_heads * self.sinks
        return self.matmuls(width) + vectors + self._norms()

    def _biases(self) -> int:
        """Of a latent attention only what leads down has biases."""
        if self.latent is None:
            return self.num_heads * self.head_dim + self.num_kv_heads * (self.head_dim + self.v_head_dim)
        return (self.latent.q_rank or 0) + self.latent.kv_rank + self.latent.rope_dim

    def _norms(self) -> int:
        if self.latent is not None:
            return (self.latent.q_rank or 0) + self.latent.kv_rank
        heads = {None: 0, "head": 2, "width": self.num_heads + self.num_kv_heads}[self.norms]
        return heads * self.head_dim


@dataclass(frozen=True)
class MLPShape:
    """What follows attention in a layer.

    inner: its inner width; where there are experts, that of one of them.
    gated: two maps up, of which one is the other's gate.
    experts, active: how many there are, and how many compute a token; 0: none, one MLP for all tokens.
    shared_inner: the inner width of what computes every token beside the experts.
    bias: of all of its maps, the router's included.
    """

    inner: int
    gated: bool = True
    experts: int = 0
    active: int = 0
    shared_inner: int = 0
    bias: bool = False

    def matmuls(self, width: int) -> int:
        """Entries of the matrices that a token goes through: of the experts, of those that compute it."""
        one = self._maps * width * self.inner
        return (
            one * self.active + self._maps * width * self.shared_inner + width * self.experts if self.experts else one
        )

    def expert(self, width: int) -> int:
        """Parameters of one expert, or of the one MLP."""
        return self._sized(width, self.inner)

    def experts_parameters(self, width: int) -> int:
        """Of all experts."""
        return self.experts * self.expert(width)

    def parameters(self, width: int) -> int:
        if not self.experts:
            return self.expert(width)
        shared = self._sized(width, self.shared_inner) if self.shared_inner else 0
        return self.experts_parameters(width) + shared + self.experts * (width + self.bias)

    def idle(self, width: int) -> int:
        """Parameters of the experts that do not compute a token."""
        return (self.experts - self.active) * self.expert(width)

    @property
    def _maps(self) -> int:
        return 3 if self.gated else 2

    def _sized(self, width: int, inner: int) -> int:
        return self._maps * width * inner + self.bias * ((self._maps - 1) * inner + width)


@dataclass(frozen=True)
class LayerShape:
    attention: AttentionShape
    mlp: MLPShape


@dataclass(frozen=True)
class ModelShape:
    """A decoder: an embedding, layers, a norm, a head.

    name: of the model, for texts.
    width: entries of a token's hidden state.
    vocabulary: rows of the embedding and of the head; ``tied``: one matrix is both.
    layers: in order; equal ones are one object.
    layer_norms: norms of a layer beside those of queries and keys, each ``width`` weights.
    max_positions: that the model is made for; None: not known.
    rope: its rotary parameters as a config has them, as far as their reach follows from them (`reach`).
    """

    name: str
    width: int
    vocabulary: int
    layers: tuple[LayerShape, ...]
    tied: bool = False
    layer_norms: int = 2
    max_positions: int | None = None
    rope: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @cached_property
    def kinds(self) -> dict[LayerShape, int]:
        """Layers that differ, and how many there are of each, in order of their first."""
        return dict(Counter(self.layers))

    @property
    def embedding(self) -> int:
        """Parameters of the embedding."""
        return self.vocabulary * self.width

    @property
    def head(self) -> int:
        """Parameters of the head that are not the embedding's."""
        return 0 if self.tied else self.embedding

    def layer(self, shape: LayerShape) -> int:
        """Parameters of a layer of this model."""
        norms = self.layer_norms * self.width
        return shape.attention.parameters(self.width) + shape.mlp.parameters(self.width) + norms

    @cached_property
    def parts(self) -> dict[str, int]:
        """Parameters by what they are of; their sum is ``parameters``. ``mlp`` is without experts and with routers."""
        found = dict.fromkeys(("embedding", "head", "attention", "mlp", "experts", "norms"), 0)
        found |= {"embedding": self.embedding, "head": self.head}
        for kind, count in self.kinds.items():
            experts = kind.mlp.experts_parameters(self.width)
            found["attention"] += count * kind.attention.parameters(self.width)
            found["experts"] += count * experts
            found["mlp"] += count * (kind.mlp.parameters(self.width) - experts)
        found["norms"] = (self.layer_norms * len(self.layers) + 1) * self.width
        return found

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())

    @cached_property
    def active_parameters(self) -> int:
        """Without the experts that do not compute a token."""
        return self.parameters - sum(count * kind.mlp.idle(self.width) for kind, count in self.kinds.items())

    @cached_property
    def matmuls(self) -> int:
        """Parameters that a token is multiplied with: the head's, where it is the embedding too, and not the
        embedding's, which is looked up."""
        layers = (
            count * (kind.attention.matmuls(self.width) + kind.mlp.matmuls(self.width))
            for kind, count in self.kinds.items()
        )
        return self.embedding + sum(layers)
