"""PyTorch's own shape of context parallel: code written for `torch.distributed.tensor.experimental` moves over by its
imports. It runs on CPUs too; on GPUs it should by construction, and has never been run.

with context_parallel(mesh["cp"], buffers=[x, y, freqs], buffer_seq_dims=[1, 1, 0]):
    loss = model(x, y, freqs)  # which calls F.scaled_dot_product_attention
    loss.backward()
"""

from ringattn.integrations.torch.region import local_attention
from ringattn.integrations.torch.sharding import (
    context_parallel,
    context_parallel_shard,
    context_parallel_unshard,
    set_rotate_method,
)
from ringattn.integrations.torch.style import RingAttention

__all__ = [
    "RingAttention",
    "context_parallel",
    "context_parallel_shard",
    "context_parallel_unshard",
    "local_attention",
    "set_rotate_method",
]
