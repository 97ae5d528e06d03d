"""What an optimizer takes while it updates parameters, beside its states and the gradients.

AdamW and SGD with PyTorch's fused kernels, and 8-bit AdamW's (bitsandbytes), update in place. PyTorch's default on a
GPU works on lists of tensors and holds the square roots of all second moments at once (torch/optim/adam.py,
`_multi_tensor_adam`). Muon makes a matrix at a time orthogonal by Newton-Schulz iterations (torch/optim/_muon.py,
after Keller Jordan's): of the matrix X, its shorter side first, in bfloat16, there are X, X X^T, the polynomial of
that, and the next X; beside them the momentum's update in fp32 that it comes from.
"""

from __future__ import annotations

from collections.abc import Iterator

from ringattn.budget.amounts import named
from ringattn.budget.model_shape import LayerShape
from ringattn.budget.setup import Setup, Shard
from ringattn.budget.tape import Tensor

UPDATES = "optimizer's temporaries"


def updating(setup: Setup, shard: Shard) -> tuple[Tensor, ...]:
    """Of a rank. Where states are on the host, so is the update."""
    if setup.offload_states != "none":
        return ()
    if setup.optimizer == "adamw_foreach":
        roots = named("parameters", setup.model.parameters) * named("bytes", 4)
        ranks = named("ranks", setup.world)
        return (
            Tensor(UPDATES, "roots of second moments", roots if shard.moments_whole else roots.over(ranks), grad=None),
        )
    return tuple(_muon(setup, shard)) if setup.optimizer == "muon" else ()


def _muon(setup: Setup, shard: Shard) -> Iterator[Tensor]:
    """Of the largest matrix. One whose gradient lies in parts is brought together for it, in fp32."""
    rows, columns = largest_matrix(setup)
    short, long, half = named("shorter side", rows), named("longer side", columns), named("bytes in bfloat16", 2)
    matrix, wide = short * long, named("bytes in fp32", 4)
    yield Tensor(UPDATES, "Newton-Schulz: X and the next", 2 * matrix * half, grad=None)
    yield Tensor(UPDATES, "Newton-Schulz: X X^T and its polynomial", 2 * short * short * half, grad=None)
    yield Tensor(UPDATES, "momentum's update", matrix * wide, grad=None)
    if not shard.moments_whole:
        yield Tensor(UPDATES, "a gradient brought together", matrix * wide, grad=None)


def largest_matrix(setup: Setup) -> tuple[int, int]:
    """The sides of the largest matrix inside of the layers, the shorter first."""
    width, fused = setup.model.width, setup.code == "decoder"
    sides = [(min(width, other), max(width, other)) for layer in setup.model.kinds for other in _sides(layer, fused)]
    return max(sides, key=lambda pair: pair[0] * pair[1])


def _sides(layer: LayerShape, fused: bool) -> tuple[int, ...]:
    """Of matrices whose other side is the model's width; ``fused``: q, k and v are one, and gate and value."""
    a, mlp = layer.attention, layer.mlp
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * (a.head_dim + a.v_head_dim)
    inner = max(mlp.inner, mlp.shared_inner)
    return queries + keys if fused else queries, a.num_heads * a.v_head_dim, inner * (2 if fused and mlp.gated else 1)


__all__ = ["updating"]
