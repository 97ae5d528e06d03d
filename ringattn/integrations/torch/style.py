"""Ring attention as a plan of PyTorch's `parallelize_module`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from ringattn.geometry.layouts import named
from ringattn.integrations.torch.sharding import latest_region


class RingAttention(ParallelStyle):
    """``parallelize_module(model, mesh["cp"], {"layers.*.attention.inner": RingAttention()})``: what PyTorch has as
    `_ContextParallel`. The module attends over the shards of :func:`context_parallel_shard`, or of the region it is
    called in, over the same mesh.

    Args:
        replaces: None: the module calls `F.scaled_dot_product_attention`, and those calls attend over all shards.
            ``"bshd"`` or ``"bhsd"``: it computes attention in another way, and is left out: ``forward(q, k, v)`` is
            attention itself, of tensors ``[batch, tokens, heads, head_dim]`` or ``[batch, heads, tokens, head_dim]``,
            with the keywords of `F.scaled_dot_product_attention` and no others. Without ``is_causal`` it sees what the
            context's first mask allows: ``mask``, or what is causal.
    """

    def __init__(self, replaces: Literal["bshd", "bhsd"] | None = None) -> None:
        super().__init__()
        self.replaces = None if replaces is None else named("replaces", replaces, ["bshd", "bhsd"])

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        forward = self._routed if self.replaces is None else self._replaced
        module.forward = partial(forward, device_mesh, module.forward)
        return module

    def _routed(self, mesh: DeviceMesh, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with latest_region(mesh):
            return forward(*args, **kwargs)

    def _replaced(self, mesh: DeviceMesh, _: object, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        region, turned = latest_region(mesh), self.replaces == "bshd"
        keywords.setdefault("is_causal", region.cp.masks[0] == region.masks[1])
        q, k, v = (x.transpose(1, 2) if turned else x for x in (q, k, v))
        out = region.attend(q, k, v, **keywords)
        return out.transpose(1, 2) if turned else out
