"""Trains a small Llama of Transformers, with random weights, every sequence sharded over all processes (needs
`pip install '.[hf]'`). Any number of them prints the same losses:

    torchrun --standalone --nproc-per-node 2 examples/llama.py
    torchrun --standalone --nproc-per-node 1 examples/llama.py
"""

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

import ringattn
from ringattn.integrations.transformers import masks_of, register, shape_of, shard_batch

SEQLEN = 512


def main(steps: int = 10) -> list[float]:
    """The losses, in nats a token."""
    group = dist.group.WORLD
    torch.manual_seed(0)  # the same weights on all ranks
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=SEQLEN,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    cp = ringattn.ContextParallel(group, SEQLEN, mask=masks_of(config), shape=shape_of(config, dtype=model.dtype))
    register(cp, model)  # without it each rank would attend to its own tokens alone
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(64, (1, 32)).repeat(1, SEQLEN // 32)  # the same sequence on all ranks, of a period of 32
    losses = []
    for step in range(steps):
        batch = shard_batch(cp, {"input_ids": ids, "labels": ids})  # labels are shifted, then sharded
        count = ringattn.loss.count_targets(batch["shift_labels"], group)
        share = model(**batch, use_cache=False, num_items_in_batch=count).loss  # this rank's part of the mean
        optimizer.zero_grad()
        share.backward()
        ringattn.loss.sum_gradients(model.parameters(), group)
        optimizer.step()
        losses.append(float(ringattn.loss.sum_over(share.detach(), group)))
        if cp.rank == 0:
            print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)
    return losses


if __name__ == "__main__":
    dist.init_process_group("gloo")  # nccl on GPUs, and everything on them
    main()
    dist.destroy_process_group()
