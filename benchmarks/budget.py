"""What steps of the pretraining job allocate, against what `ringattn.budget` says of them before: a table of
configurations, each rank's peak above what lay there before the step, and where the account finds it.

    python -m benchmarks.budget
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import typer

from benchmarks.common import write
from launch.budget import step_of
from launch.config import Config, DeepspeedConfig, ModelConfig, OptimizerConfig
from launch.memory import measured
from launch.processes import World
from launch.run import prepare, start
from ringattn.testing import run_processes

WIDE = ModelConfig(d_model=128, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32, d_ff=320)
HEAVY = ModelConfig(d_model=256, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64, d_ff=1024)
OPTIMIZER = OptimizerConfig(lr=1e-3, warmup=1)
BASE = Config(name="budget", seqlen=4096, steps=1, masks=("causal()",), model=WIDE, optimizer=OPTIMIZER)
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 320,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 32, "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 96, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
ZERO: dict[str, Any] = {"engine": "deepspeed", "model": HEAVY, "seqlen": 1024}
HF: dict[str, Any] = {"model": None, "masks": (), "hf": "llama.json"}
# the name of a configuration, how many ranks, and what it has otherwise than BASE; "hf" and "offload" are made in a
# directory of the run
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "short, whole logits": (1, {"seqlen": 1536, "loss_chunks": 1, "model": replace(WIDE, d_ff=160)}),
    "recompute, documents": (1, {"recompute": True, "documents": True}),
    "bfloat16": (1, {"dtype": "bfloat16"}),
    "token_chunks": (1, {"token_chunks": 4}),
    "offload": (1, {"recompute": True, "token_chunks": 4, "offload": "files", "dtype": "bfloat16"}),
    "Llama": (1, {**HF}),
    "Llama, recompute": (1, {**HF, "recompute": True}),
    "Qwen3 with experts": (1, {**HF, "hf": "moe.json"}),
    "Qwen3 with experts, recompute": (1, {**HF, "hf": "moe.json", "recompute": True}),
    "2 ranks, ddp": (2, {}),
    "2 ranks, fsdp": (2, {"engine": "fsdp", "model": HEAVY, "seqlen": 1024}),
    "2 ranks, heads split": (2, {"ulysses": 2, "recompute": True}),
    "2 ranks, Llama, fsdp, bfloat16": (2, {**HF, "engine": "fsdp", "recompute": True, "dtype": "bfloat16"}),
    "2 ranks, ZeRO 1": (2, {**ZERO, "deepspeed": DeepspeedConfig(1)}),
    "2 ranks, ZeRO 2": (2, {**ZERO, "deepspeed": DeepspeedConfig(2)}),
    "2 ranks, ZeRO 3": (2, {**ZERO, "deepspeed": DeepspeedConfig(3)}),
    "4 ranks, fsdp, documents": (4, {"engine": "fsdp", "recompute": True, "token_chunks": 2, "documents": True}),
    "4 ranks, 2 x 2": (4, {"data_parallel": 2, "accumulate": 2}),
}


def prepare_folder(folder: Path) -> None:
    """The text, Transformers configs, and a directory to offload to."""
    text = np.random.default_rng(0).integers(97, 110, 40_000, dtype=np.uint8).tobytes()
    (folder / "text").mkdir()
    for index, at in enumerate(range(0, len(text), 1900)):
        (folder / "text" / f"{index:03}.txt").write_bytes(text[at : at + 1900])
    (folder / "llama.json").write_text(json.dumps(LLAMA))
    (folder / "moe.json").write_text(json.dumps(MOE))
    (folder / "files").mkdir()


def rank_of(rank: int, world: int, names: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """One rank's rows, of one configuration after the other."""
    torch.set_num_threads(1)
    group = dist.group.WORLD if world > 1 else None
    return [_row(name, World(rank, world, torch.device("cpu"), group), folder) for name in names]


def _row(name: str, world: World, folder: Path) -> dict[str, Any]:
    changes = dict(CASES[name][1])
    changes |= {key: str(folder / changes[key]) for key in ("hf", "offload") if key in changes}
    config = replace(BASE, data=(str(folder / "text"),), **changes)
    job = prepare(config, folder / f"run{world.rank}", False, True)
    trainer = start(job, world)
    samples = job.samples(world)
    for _ in range(trainer.engine.settles):
        trainer.step(samples, 1e-3, False)
    # what the row before has left, and the profiler would see go
    gc.collect()
    planned = max(
        (step_of(config, job.language, trainer.context_for(s)[0], world.size, len(s.tokens)).peak for s in samples),
        key=lambda moment: moment.bytes,
    )
    with measured(world.device, trainer.cp.link.workspace) as found:
        trainer.step(samples, 1e-3, False)
    job.locks.close()
    return {"name": name, "ranks": world.size, "planned": planned.bytes, "measured": found.peak, "at": planned.name}


def rows() -> list[dict[str, Any]]:
    """Of every configuration the rank whose plan is furthest off."""
    found: list[dict[str, Any]] = []
    alone = [name for name, (ranks, _) in CASES.items() if ranks == 1]
    # groups keep memory of theirs, which the profiler would see go later: several ranks have processes of their own
    for names in (alone, *([name] for name in CASES if name not in alone)):
        world = CASES[names[0]][0]
        with tempfile.TemporaryDirectory() as folder:
            prepare_folder(Path(folder))
            if world == 1:
                ranks = [rank_of(0, 1, names, Path(folder))]
            else:
                ranks = run_processes(rank_of, world, names, Path(folder), timeout=100)
        found += [max(of, key=lambda row: abs(row["planned"] / row["measured"] - 1)) for of in zip(*ranks, strict=True)]
    return found


def line(row: dict[str, Any]) -> str:
    """A row, readable."""
    return (
        f"{row['name']:32} planned {row['planned'] / 2**20:7.2f} MiB, measured {row['measured'] / 2**20:7.2f} MiB, "
        f"{100 * (row['planned'] / row['measured'] - 1):+5.1f} %  {row['at']}"
    )


def main(output: str = "budget-cpu") -> None:
    """Measure, print and write JSON."""
    found = rows()
    for row in found:
        print(line(row))
    result = [{**row, "ratio": row["planned"] / row["measured"]} for row in found]
    write(output, {"base": str(BASE), "rows": result})


if __name__ == "__main__":
    typer.run(main)
