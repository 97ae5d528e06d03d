"""What Transformers' path costs: a step of a Llama whose layers attend by the registered function, beside the same
model with layers that call ``ringattn.attention()`` directly, with nothing checked or translated.

``step``: two processes of one thread, forward + backward, in turns. ``layer``: what one call takes longer, in
microseconds, at a length where attention itself takes next to nothing.

    python -m benchmarks.transformers
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

import ringattn
from benchmarks.common import interleaved, medians, on_processes, ratio, write
from ringattn.integrations.transformers import register

SIZES: dict[str, Any] = dict(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1 << 20,
)


def model_in(cp: ringattn.ContextParallel, direct: bool) -> nn.Module:
    """The same weights on every rank."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    if not direct:
        register(cp, model)
        return model

    for layer in model.model.layers:
        layer.self_attn.cp = cp
    AttentionInterface.register("direct", attend)
    AttentionMaskInterface.register("direct", lambda *args, **kwargs: None)
    model.set_attn_implementation("direct")
    return model


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **others: Any) -> Any:
    rows = (x.transpose(1, 2) for x in (q, k, v))
    return ringattn.attention(*rows, cp=module.cp, mask=module.cp.masks[0], scale=scaling), None


def step_of(cp: ringattn.ContextParallel, direct: bool, backward: bool) -> Callable[[], object]:
    """Forward of this rank's tokens, and the backward of their sum; one cu_seq_lens a step, as a collator gives."""
    model = model_in(cp, direct)
    tokens = cp.shard(torch.randint(1024, (1, cp.seqlen), generator=torch.Generator().manual_seed(1)))

    def run() -> None:
        positions = cp.position_ids[None].clone()
        bounds = torch.tensor([0, cp.seqlen], dtype=torch.int32)
        told = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        with torch.set_grad_enabled(backward):
            out = model(input_ids=tokens, position_ids=positions, use_cache=False, **told).logits
        if backward:
            model.zero_grad()
            out.sum().backward()

    return run


def steps(rank: int, seqlen: int, rounds: int) -> dict[str, Any]:
    cp = ringattn.ContextParallel(dist.group.WORLD, seqlen)
    seconds = interleaved({"registered": step_of(cp, False, True), "direct": step_of(cp, True, True)}, rounds)
    return {
        "seqlen": seqlen,
        "rounds": rounds,
        "seconds": medians(seconds),
        "registered_over_direct": ratio(seconds, "registered", "direct"),
    }


def layer_microseconds(rank: int, rounds: int = 200) -> float:
    """How much longer a layer takes at 64 tokens a rank, median of the differences of forwards in turns."""
    cp = ringattn.ContextParallel(dist.group.WORLD, 64 * dist.get_world_size())
    runs = [step_of(cp, direct, False) for direct in (False, True)]
    differences = []
    for number in range(rounds + 10):
        spent = []
        for run in runs if number % 2 else runs[::-1]:
            dist.barrier()
            start = time.perf_counter()
            run()
            spent.append(time.perf_counter() - start)
        differences.append((spent[0] - spent[1]) * (1 if number % 2 else -1))
    return 1e6 * statistics.median(differences[10:]) / SIZES["num_hidden_layers"]


def main(json: str = "transformers-cpu") -> None:
    """Measure, print and write JSON."""
    cases = []
    for seqlen, rounds in ((2048, 40), (8192, 15), (16384, 9)):
        cases.append(on_processes(steps, 2, seqlen, rounds))
        print(f"{seqlen:>6} tokens: a step takes {100 * (cases[-1]['registered_over_direct'] - 1):+.2f} % longer")
    layer = on_processes(layer_microseconds, 2)
    print(f"a layer takes {layer:.0f} microseconds longer")
    write(json, {"cases": cases, "layer_microseconds": layer})


if __name__ == "__main__":
    typer.run(main)
