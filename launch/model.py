"""A decoder over bytes: RMSNorm, grouped-query attention with RoPE on global positions, SwiGLU. It knows
nothing of ranks: tokens and positions are those of one shard, and `attend` is whatever gives each layer its
attention."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ringattn
from launch.config import Config, ModelConfig
from launch.data import VOCABULARY
from launch.language import Inputs, Language, Masks, check_memory
from ringattn.integrations.checkpointing import keep_attention

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q, k, v -> out, all [batch, tokens, heads, dim]


class Decoder(nn.Module):
    """`model(tokens, position_ids, attend)` gives what the head takes, [batch, local_seqlen, d_model]. `recompute`
    drops each layer's activations but attention's and computes them again in backward. `chunks`: see `Layer`.
    `residual` is the dtype of what is held of a token between layers; None is that of the embedding's weights."""

    def __init__(
        self, config: ModelConfig, recompute: bool = False, chunks: int = 0, residual: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute, self.residual = recompute, residual
        self.embedding = nn.Embedding(VOCABULARY, config.d_model)
        self.layers = nn.ModuleList(Layer(config, index, chunks) for index in range(config.num_layers))
        self.norm = Norm(config.d_model, eps=1e-6)
        self.head = nn.Linear(config.d_model, VOCABULARY, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Unit embeddings, 1/sqrt(fan-in) weights; the two branches of each layer are scaled down by the
        depth, and the head by ten, so that the loss starts near ln 256 and no gradient is zero."""
        scales = {
            "head": 0.1,
            "output": (2 * len(self.layers)) ** -0.5,
            "down": (2 * len(self.layers)) ** -0.5,
        }
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                scale = scales.get(name.rpartition(".")[2], 1.0)
                nn.init.normal_(module.weight, std=scale * module.in_features**-0.5)

    def forward(self, tokens: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        rotation = self.rotation(position_ids)
        x = self.embedding(tokens)
        if self.residual is not None:
            x = x.to(self.residual)
        for layer in self.layers:
            if self.recompute:
                x = checkpoint(layer, x, rotation, attend, use_reentrant=False, context_fn=keep_attention())
            else:
                x = layer(x, rotation, attend)
        return self.norm(x)

    def rotation(self, position_ids: Tensor) -> Tensor:
        """Complex unit numbers [1, local_seqlen, 1, head_dim / 2], one turn per position and pair. The angles
        are taken in fp64: at a million tokens fp32 angles would be off by a twentieth of a radian."""
        dim = self.config.head_dim
        pairs = torch.arange(0, dim, 2, dtype=torch.float64, device=position_ids.device)
        angles = position_ids.double()[None, :, None, None] * self.config.rope_base ** (-pairs / dim)
        rotation = torch.polar(torch.ones_like(angles), angles)
        return rotation if self.head.weight.dtype == torch.float64 else rotation.to(torch.complex64)


class Norm(nn.RMSNorm):
    """In the dtype of its weight, whatever that of x."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x)).

    All but attention works on each token alone. With `chunks` it is computed in so many pieces of the tokens, and again
    in backward piece by piece: then the inner widths are never held of all tokens at once. 0: at once, and held."""

    def __init__(self, config: ModelConfig, index: int, chunks: int = 0) -> None:
        super().__init__()
        self.index, self.chunks = index, chunks
        self.heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        heads, kv_heads, dim = self.heads
        self.attention_norm = Norm(config.d_model, eps=1e-6)
        self.qkv = nn.Linear(config.d_model, (heads + 2 * kv_heads) * dim, bias=False)
        self.output = nn.Linear(heads * dim, config.d_model, bias=False)
        self.mlp_norm = Norm(config.d_model, eps=1e-6)
        self.up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, attend: Attend) -> Tensor:
        if not self.chunks:
            return self.conclude(x, attend(self.index, *self.project(x, rotation)))
        q, k, v = ringattn.tiled(self.project, x, rotation, tiles=self.chunks)
        concluded: Tensor = ringattn.tiled(self.conclude, x, attend(self.index, q, k, v), tiles=self.chunks)
        return concluded

    def project(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attends: q, k and v."""
        heads, kv_heads, dim = self.heads
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (heads + 2 * kv_heads, dim))
        # split, not slices: its backward is one concatenation
        qk, v = qkv.split((heads + kv_heads, kv_heads), dim=2)
        q, k = rotate(qk, rotation).split((heads, kv_heads), dim=2)
        return q, k, v

    def conclude(self, x: Tensor, attended: Tensor) -> Tensor:
        """What attention's result and the MLP make of x."""
        x = x + self.output(attended.flatten(2))
        gate, value = self.up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """RoPE on neighbouring pairs of x [batch, tokens, heads, dim] (Su et al., 2021, equation 34)."""
    pairs = torch.view_as_complex(x.to(rotation.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def decoder(job: Config, config: ModelConfig, masks: Masks) -> Language:
    """A fresh decoder as the job sees it; `masks` are repeated over the depth."""
    check_memory(_parameters(config))
    residual = torch.bfloat16 if job.residual == "bfloat16" else None
    chunks, recompute = job.token_chunks if job.token_chunks > 1 else 0, job.recompute
    if recompute and job.offload:  # what checkpointing keeps of attention would stay; pieces hold nothing of their own
        chunks, recompute = job.token_chunks, False
    model = Decoder(config, recompute, chunks, residual)

    def hidden(inputs: Inputs) -> Tensor:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cp, mask, label = inputs.cp, inputs.masks[layer], f"layer {layer}"
            if inputs.largest is None:
                return ringattn.attention(q, k, v, cp=cp, mask=mask, label=label)
            out, largest = ringattn.attention(q, k, v, cp=cp, mask=mask, return_max_logit=True, label=label)
            inputs.largest.append(largest)
            return out

        return model(inputs.tokens, inputs.cp.position_ids.to(inputs.tokens.device), attend)

    of_layers = tuple(masks[layer % len(masks)] for layer in range(config.num_layers))
    shape = ringattn.Shape(config.num_heads, config.num_kv_heads, config.head_dim)
    distinct = tuple(dict.fromkeys(of_layers))
    matmuls = _matmuls(config)
    return Language(model, list(model.layers), hidden, model.head, of_layers, distinct, shape, VOCABULARY, matmuls)


def _matmuls(config: ModelConfig) -> int:
    """Parameters of the linear maps, the head among them."""
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return config.d_model * (config.num_layers * (attention + 3 * config.d_ff) + VOCABULARY)


def _parameters(config: ModelConfig) -> int:
    """How many there will be: beside the maps' those of the embedding and the norms."""
    return _matmuls(config) + config.d_model * (VOCABULARY + 2 * config.num_layers + 1)
