"""How layers are computed where memory is short, and what of the devices' peak a run makes use of."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ringattn
from launch.config import CONFIGS, Config, load
from launch.flop import peak
from launch.mask_text import parse_mask
from launch.processes import World
from launch.run import prepare, start, train
from launch.training import Trainer
from ringattn.runtime.offload import Shelf
from ringattn.testing import run_processes
from tests.support.grids import mostly_slow
from tests.support.pretrain import NOWHERE, TINY, StopAt, largest_difference, tiny, world_of


def first_step(rank: int, world_size: int, config: Config) -> tuple[float, dict[str, np.ndarray], int]:
    """Its loss and gradients, and the FLOP that this rank counts."""
    job = prepare(config, NOWHERE, go_on=False, overwrite=False)
    world = world_of(rank, world_size)
    trainer = start(job, world)
    loss = trainer.loss_and_gradients(job.samples(world)).loss
    gradients = {name: whole.numpy().copy() for name, whole in trainer.engine.gradients().items()}
    return loss, gradients, trainer.counters().flop


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_in_chunks_are_layers(recompute: bool, text: Path) -> None:
    """Of 257 tokens, which 5 does not divide."""
    loss, gradients, _ = first_step(0, 1, tiny(text))
    found, found_gradients, _ = first_step(0, 1, tiny(text, token_chunks=5, recompute=recompute))
    assert found == pytest.approx(loss, rel=1e-14)
    assert largest_difference(found_gradients, gradients) < 1e-13


@pytest.mark.parametrize("chunks", [1, 5])
def test_layers_that_are_put_away_are_layers(chunks: int, text: Path, tmp_path: Path) -> None:
    """With `recompute` all that layers keep passes by, and nothing of it stays in memory."""
    kept, plain = [], first_step(0, 1, tiny(text))
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def put(shelf: Shelf, x: torch.Tensor) -> torch.Tensor:
        kept.append(x.shape)
        return x.detach()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shelf, "put", put)
        first_step(0, 1, tiny(text, token_chunks=chunks, recompute=True, offload=str(scratch)))
    heads = TINY.model.num_heads, TINY.model.head_dim
    assert sum(shape[2:] == heads for shape in kept) >= 2 * TINY.model.num_layers  # q and out
    found = first_step(0, 1, tiny(text, token_chunks=chunks, recompute=True, offload=str(scratch)))
    assert found[0] == pytest.approx(plain[0], rel=1e-14)
    assert largest_difference(found[1], plain[1]) < 1e-13
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("engine", mostly_slow(["ddp", "fsdp"], ["fsdp"]))
def test_layers_in_chunks_on_ranks(engine: str, text: Path) -> None:
    loss, gradients, flop = first_step(0, 1, tiny(text))
    config = tiny(text, token_chunks=3, recompute=True, engine=engine)
    ranks = run_processes(first_step, 2, config)
    for found, found_gradients, _ in ranks:
        assert found == pytest.approx(loss, rel=1e-12)
        assert largest_difference(found_gradients, gradients) < 1e-11
    assert sum(counted for *_, counted in ranks) == flop


def trainer_of(config: Config) -> tuple[Trainer, Any]:
    job = prepare(config, NOWHERE, go_on=False, overwrite=False)
    return start(job, World()), job.samples(World())


def kept_by(config: Config) -> int:
    """Numbers that the layers keep for backward."""
    trainer, samples = trainer_of(config)
    kept = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        trainer.loss_and_gradients(samples)
    return sum(kept)


def test_layers_in_chunks_keep_none_of_their_inner_widths(text: Path) -> None:
    inner = 2 * TINY.seqlen * 3 * TINY.model.d_ff  # of both layers: the MLP's two halves and their product
    assert kept_by(tiny(text)) - kept_by(tiny(text, token_chunks=4)) > inner


def test_the_residual_stream_has_the_dtype_that_is_asked_for(text: Path) -> None:
    seen = []
    for residual in ("float32", "bfloat16"):
        trainer, samples = trainer_of(tiny(text, dtype="bfloat16", residual=residual))
        trainer.model.layers[1].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].dtype))
        loss = trainer.loss_and_gradients(samples).loss
        assert loss == pytest.approx(first_step(0, 1, tiny(text))[0], rel=1e-2)
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"residual": "bfloat16"}, "residual is 'bfloat16' with dtype 'float64'"),
        ({"residual": "float16", "dtype": "bfloat16"}, "unknown residual 'float16'"),
        ({"token_chunks": 0}, "token_chunks is 0"),
        ({"share_gpus": True}, "share_gpus is set with device 'cpu'"),
        ({"offload": True}, "offload is true with device 'cpu'"),
        ({"token_chunks": 300}, "token_chunks is 300 for 257 tokens"),
        ({"token_chunks": 2, "hf": "x.json", "model": None, "masks": ()}, "has layers of its own"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("name", ["gpu-1", "gpu-1-8b-layers", "gpu-8", "llama3-8b-1m"])
def test_configs_for_gpus_train_when_they_are_small(name: str, text: Path) -> None:
    config = load(CONFIGS / f"{name}.toml")
    assert config.device == "cuda" and config.model is not None
    layers, sizes = min(config.model.num_layers, 4), {"d_model": 16, "num_heads": 2, "num_kv_heads": 1, "d_ff": 24}
    small = dataclasses.replace(config.model, num_layers=layers, head_dim=8, **sizes)
    here: dict[str, Any] = {"device": "cpu", "data_parallel": 1, "ulysses": 1, "offload": False}
    config = dataclasses.replace(config, **here, seqlen=192, data=(str(text),), model=small)
    trainer, samples = trainer_of(config)
    losses = [trainer.step(samples, 1e-2, stop=False).loss for _ in range(2)]
    assert losses[1] < losses[0] < 6


def test_flop_are_counted_from_the_linear_maps_and_the_areas_of_the_masks(text: Path) -> None:
    config = tiny(text)
    trainer, samples = trainer_of(config)
    trainer.loss_and_gradients(samples)
    weights = sum(m.weight.numel() for m in trainer.model.modules() if isinstance(m, nn.Linear))
    documents = ringattn.documents(samples[0].cu_seqlens).dense(config.seqlen, config.seqlen)
    dense = [parse_mask(mask).dense(config.seqlen, config.seqlen) & documents for mask in config.masks]
    pairs = sum(int(mask.sum()) for mask in dense)
    shape = config.model
    expected = 6 * weights * config.seqlen + 12 * shape.num_heads * shape.head_dim * pairs
    assert trainer.counters().flop == expected
    before = trainer.counters()
    trainer.loss_and_gradients(samples)
    assert trainer.counters().since(before).flop == expected


def test_peaks_are_known_by_the_device_s_name() -> None:
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"):
        assert peak(name) == 989e12
    assert peak("NVIDIA A100-SXM4-80GB") == 312e12 and peak("NVIDIA B200") == 2250e12
    assert not any(map(peak, ("cpu", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GB200", "NVIDIA L40S")))


@pytest.mark.parametrize(
    ("device", "dtype", "printed"),
    [("NVIDIA H200", "bfloat16", True), ("NVIDIA H200", "float32", False), ("cpu", "bfloat16", False)],
)
def test_the_utilisation_is_printed_where_the_peak_is_known(
    device: str, dtype: str, printed: bool, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(World, "device_name", device)
    job = prepare(tiny(text, dtype=dtype, steps=1), tmp_path / "run", go_on=False, overwrite=False)
    world = World()
    assert train(job, start(job, world), StopAt(job, world, -1))
    said = capsys.readouterr().out
    assert ("model FLOP utilisation" in said) == printed
    assert ("TFLOP/s of 989 a device" in said) == printed
