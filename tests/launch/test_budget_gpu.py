"""The same account on a GPU, against its allocator's own count. Never run yet."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.budget import step_of
from launch.config import ModelConfig, OptimizerConfig
from launch.memory import measured
from launch.processes import World
from launch.run import prepare, start
from tests.support.pretrain import tiny

pytestmark = pytest.mark.gpu
MODEL = ModelConfig(d_model=1024, num_layers=4, num_heads=16, num_kv_heads=4, head_dim=64, d_ff=2816)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("token_chunks", [1, 4])
def test_planned_and_counted_peaks_agree(recompute: bool, token_chunks: int, text: Path, tmp_path: Path) -> None:
    """Within 10 %, of a step behind one that has brought up what stays."""
    (text / "long.txt").write_bytes(b"abcdefgh" * 8192)
    config = tiny(text, seqlen=16_384, steps=2, model=MODEL, dtype="bfloat16", device="cuda", documents=False)
    config = replace(config, masks=("causal()",), optimizer=OptimizerConfig(lr=1e-3, warmup=1), recompute=recompute)
    config = replace(config, token_chunks=token_chunks)
    job = prepare(config, tmp_path / "run", False, True)
    trainer = start(job, World(device=torch.device("cuda", 0)))
    samples = job.samples(trainer.world)
    planned = step_of(config, job.language, trainer.context_for(samples[0])[0], 1).peak
    trainer.step(samples, 1e-3, False)
    trainer.engine.zero_grad()
    trainer.cp.link.workspace.clear()
    with measured(trainer.world.device, trainer.cp.link.workspace) as found:
        trainer.step(samples, 1e-3, False)
    assert planned.bytes == pytest.approx(found.peak, rel=0.1), planned.name
