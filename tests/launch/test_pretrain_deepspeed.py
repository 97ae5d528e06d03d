"""The main job under DeepSpeed: a run that goes from engine to engine is the run of one process."""

import dataclasses
from pathlib import Path

import pytest

from launch.config import DeepspeedConfig
from ringattn.testing import run_processes
from tests.support.hf_models import hf_file
from tests.support.pretrain import config_file, records_of, refusal, run_until, tiny

pytestmark = pytest.mark.timeout(300)
# ranks, replicas, engine, ZeRO's stage, and the step in which it is told to stop
RELAY = [(3, 1, "deepspeed", 3, 1), (2, 2, "deepspeed", 1, 2), (2, 1, "fsdp", None, 3), (2, 1, "deepspeed", 3, 4)]


@pytest.mark.slow
def test_a_run_goes_from_engine_to_engine(text: Path, tmp_path: Path) -> None:
    alone = tiny(text, accumulate=2, dtype="float32")
    assert run_until(0, 1, alone, tmp_path / "whole", False, -1)
    assert run_until(0, 1, dataclasses.replace(alone, dtype="float64"), tmp_path / "exact", False, -1)
    for ranks, replicas, engine, stage, step in RELAY:
        table = None if stage is None else DeepspeedConfig(stage)
        config = dataclasses.replace(
            alone, accumulate=2 // replicas, data_parallel=replicas, engine=engine, deepspeed=table
        )
        done = run_processes(run_until, ranks, config, tmp_path / "parts", step > 1, step, timeout=280)
        assert done == [False] * ranks
    assert run_until(0, 1, alone, tmp_path / "parts", True, -1)
    exact, whole, parts = (records_of(tmp_path / name) for name in ("exact", "whole", "parts"))
    for name in ("loss", "grad_norm", "lr"):
        rounding = max(abs(a[name] - b[name]) / b[name] for a, b in zip(whole, exact, strict=True))  # of fp32
        expected = pytest.approx([record[name] for record in exact], rel=4 * rounding + 1e-12)
        assert [record[name] for record in parts] == expected, name


@pytest.mark.slow
def test_tied_embeddings_go_on_too(text: Path, tmp_path: Path) -> None:
    file = hf_file("llama", tmp_path, tie_word_embeddings=True)
    alone = tiny(text, model=None, masks=(), hf=file, steps=4, dtype="float32")
    assert run_until(0, 1, alone, tmp_path / "whole", False, -1)
    sharded = dataclasses.replace(alone, engine="deepspeed", deepspeed=DeepspeedConfig(2))
    assert run_until(0, 1, alone, tmp_path / "parts", False, 1) is False
    assert run_processes(run_until, 2, sharded, tmp_path / "parts", True, 2, timeout=280) == [False] * 2
    assert run_until(0, 1, alone, tmp_path / "parts", True, -1)
    expected, found = records_of(tmp_path / "whole"), records_of(tmp_path / "parts")
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=2e-6)


def test_what_zero_cannot_is_refused(tmp_path: Path) -> None:
    said = refusal("--config", config_file(tmp_path, 'engine = "ddp"', 'engine = "deepspeed"'))
    assert "float64" in said and 'set dtype = "float32"' in said
    said = refusal("--config", config_file(tmp_path, "\n[model]", "\n[deepspeed]\nstage = 0\n\n[model]"))
    assert "deepspeed.stage is 0; it must be a whole number from 1 to 3" in said
