"""The main job: sharded training equals a single process, a run goes on where it stopped on any number of
ranks, and bad input is refused with a reason."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ringattn
from launch import checkpoint
from launch.config import CONFIGS, Config, OptimizerConfig, find_config, load
from launch.data import Sample, open_text
from launch.job import run_job
from launch.language import Inputs, Objective
from launch.mask_text import leaks, parse_mask
from launch.model import Decoder, rotate
from launch.processes import World
from launch.run import prepare, start, train
from launch.tables import dump
from launch.tasks import make_task
from launch.verify import verify
from ringattn.loss import IGNORED
from ringattn.testing import run_processes
from tests.support.clock import patience
from tests.support.pretrain import (
    NOWHERE,
    TINY,
    StopAt,
    config_file,
    largest_difference,
    records_of,
    refusal,
    run_until,
    tiny,
    world_of,
)

# -- settings, masks, text ------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_configs_load_and_survive_writing(path: Path, tmp_path: Path) -> None:
    config = load(path)
    assert config.name == path.stem
    assert all(isinstance(parse_mask(mask), ringattn.Mask) for mask in config.masks)
    assert not list(leaks(config.masks, config.seqlen))
    (tmp_path / "copy.toml").write_text(dump(config))
    assert load(tmp_path / "copy.toml") == config


def test_any_text_and_infinity_survive_writing(tmp_path: Path) -> None:
    optimizer = OptimizerConfig(lr=1e-5, warmup=1, clip=float("inf"))
    config = dataclasses.replace(TINY, optimizer=optimizer, data=('caf\u00e9 \U0001f600 \x7f "quoted" \\',))
    (tmp_path / "copy.toml").write_text(dump(config))
    assert load(tmp_path / "copy.toml") == config


def test_learning_rate_warms_up_and_falls_to_its_end() -> None:
    settings = OptimizerConfig(lr=1.0, warmup=4, final_lr=0.1)
    rates = [settings.lr_at(step, 20) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


def test_mask_texts_are_the_library_s_masks() -> None:
    parsed = parse_mask("(sliding_window(1023, right=0) | global_tokens([0, 7])) & causal() - chunked(5)")
    built = (ringattn.sliding_window(1023) | ringattn.global_tokens((0, 7))) & (ringattn.causal() - ringattn.chunked(5))
    assert torch.equal(parsed.dense(40, 40), built.dense(40, 40))


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ("causual()", "did you mean 'causal'"),
        ("documents([0, 5])", "set documents = true"),
        ("sliding_window(-3)", "-3"),
        ("sliding_window()", "sliding_window"),
        ("causal", "is no mask"),
        ("causal(", "does not parse"),
        ("__import__('os').system('true')", "is no mask"),
        ("causal() & 3", "is no mask"),
    ],
)
def test_mask_texts_that_are_refused(mask: str, reason: str) -> None:
    with pytest.raises(ValueError, match="mask ") as caught:
        parse_mask(mask)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("mask", "ahead"),
    [
        ("causal()", 0),
        ("bigbird(8, 3, 1, 1)", 0),
        ("(chunked(8) | global_tokens(2)) & causal()", 0),
        ("sliding_window(3, 1)", 39),
        ("prefix_lm(4)", 6),
        ("chunked(8)", 5 * 28),
    ],
)
def test_masks_that_let_a_token_see_its_target_are_found(mask: str, ahead: int) -> None:
    said = list(leaks([mask, mask], 40))
    assert len(said) == (ahead > 0)
    assert not ahead or (f"({ahead:,} of its " in said[0] and f"write '({mask}) & causal()'" in said[0])


def test_labels_are_shifted_within_documents(text: Path) -> None:
    data = open_text([str(text)], 257, seed=0)
    stream = b"".join(path.read_bytes() for path in data.files)
    borders = {0, *np.cumsum([path.stat().st_size for path in data.files]).tolist()}
    for position in (0, 257, 3400):  # the last one goes over the end and starts again
        sample = data.sample(position, 257)
        assert sample.tokens.shape == sample.labels.shape == (1, 257)
        assert bytes(sample.tokens[0].astype(np.uint8)) == (stream + stream)[position : position + 257]
        ends = {b + turn - position for b in borders for turn in (0, len(stream))} | {0, 257}
        assert sample.cu_seqlens == tuple(sorted(end for end in ends if 0 <= end <= 257))
        for i in range(257):
            last = i + 1 in sample.cu_seqlens
            assert sample.labels[0, i] == (IGNORED if last else sample.tokens[0, i + 1])


def test_the_text_is_the_same_each_time_and_the_seed_orders_it(text: Path) -> None:
    first, again, other = (open_text([str(text)], 257, seed) for seed in (0, 0, 1))
    assert first.digest == again.digest != other.digest
    assert np.array_equal(first.sample(99, 257).tokens, again.sample(99, 257).tokens)
    library = open_text([], 4096, seed=0)
    assert library.size > 1_000_000
    assert 2.5 < library.unigram_entropy(0, 1_000_000) < 4.0


def test_unigram_entropy_of_known_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abab" * 100)
    assert open_text([str(tmp_path / "a")], 10, 0).unigram_entropy(0, 400) == pytest.approx(np.log(2))


# -- model and loss -------------------------------------------------------------------------------


def test_rotation_depends_on_distance_alone() -> None:
    model = Decoder(TINY.model).double()
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind()

    def score(i: int, j: int) -> float:
        at = [model.rotation(torch.tensor([position])) for position in (i, j)]
        return float((rotate(q, at[0]) * rotate(k, at[1])).sum())

    assert score(5, 3) == pytest.approx(score(1_000_005, 1_000_003), abs=1e-8)
    assert abs(score(5, 3) - score(5, 4)) > 1e-3


@pytest.mark.parametrize("chunks", [1, 3])
def test_loss_is_the_mean_over_targets_and_guesses_are_counted(chunks: int, text: Path) -> None:
    config = tiny(text, documents=False)
    job = prepare(config, NOWHERE, go_on=False, overwrite=False)
    trainer = start(job, World())
    (sample,) = samples_of(config)[1:]
    tokens, labels = torch.from_numpy(sample.tokens), torch.from_numpy(sample.labels)
    count = (labels != IGNORED).sum()
    inputs = Inputs(tokens, labels, trainer.cp, job.language.masks, count)
    logits = job.language.head(job.language.hidden(inputs))[0]
    labels[0, 210:220] = logits[210:220].argmax(-1)
    share, right = Objective(job.language, chunks, guesses=True)(inputs)
    torch.testing.assert_close(share, F.cross_entropy(logits, labels[0], ignore_index=IGNORED), rtol=1e-13, atol=0)
    assert int(right) == int((logits.argmax(-1) == labels[0])[labels[0] != IGNORED].sum()) >= 10
    assert Objective(job.language, chunks, guesses=False)(inputs)[1] == 0


# -- sharded training equals a single process -----------------------------------------------------


def samples_of(config: Config) -> list[Sample]:
    """A sample of the text; and one whose first 200 tokens have no target, so that a shard has none."""
    sample = make_task(config).sample(0, config.seqlen)
    labels = sample.labels.copy()
    labels[:, :200] = IGNORED
    return [sample, dataclasses.replace(sample, labels=labels)]


def first_steps(rank: int, world_size: int, configs: list[Config]) -> list[tuple[float, dict[str, np.ndarray]]]:
    """Loss and gradients of every config and sample."""
    found = []
    for config in configs:
        job = prepare(config, NOWHERE, go_on=False, overwrite=False)
        trainer = start(job, world_of(rank, world_size))
        for sample in samples_of(config):
            trainer.model.zero_grad()
            loss = trainer.loss_and_gradients([sample]).loss
            gradients = {name: whole.numpy().copy() for name, whole in trainer.engine.gradients().items()}
            found.append((loss, gradients))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_loss_and_gradients_equal_a_single_process(world_size: int, text: Path) -> None:
    changes = [{}, {"documents": False, "layout": "zigzag"}, {"recompute": True}, {"engine": "fsdp", "recompute": True}]
    configs = [tiny(text, **change) for change in changes]
    expected = first_steps(0, 1, configs)
    for rank, found in enumerate(run_processes(first_steps, world_size, configs)):
        for (loss, gradients), (single_loss, single_gradients) in zip(found, expected, strict=True):
            assert loss == pytest.approx(single_loss, rel=1e-12), f"rank {rank}"
            assert largest_difference(gradients, single_gradients) < 1e-11, f"rank {rank}"


def check_the_checks(rank: int, world_size: int, config: Config) -> tuple[str, str, str]:
    """What `verify` says as it is, and with positions counted from the start of each shard, which is wrong; and
    what ranks hear whose configs differ."""
    job = prepare(config, NOWHERE, go_on=False, overwrite=False)
    world = world_of(rank, world_size)
    trainer = start(job, world)
    right = verify(job, trainer)
    local = property(lambda cp: torch.arange(cp.local_seqlen), lambda cp, ids: None)
    ringattn.ContextParallel.position_ids = local
    wrong = verify(job, trainer)
    assert right.passed and not wrong.passed
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    different = dataclasses.replace(config, seed=rank)
    with pytest.raises(ValueError, match=r"rank 0 has config .*, rank 1 has") as caught:
        start(prepare(different, NOWHERE, go_on=False, overwrite=False), world)
    return str(right), str(wrong), str(caught.value)


def test_verify_finds_wrong_positions_and_ranks_that_disagree_are_told_apart(text: Path) -> None:
    first, second = run_processes(check_the_checks, 2, tiny(text))
    assert first == second
    right, wrong, disagreement = first
    assert "sharded and single-rank step are equal, each sequence over 2 ranks" in right and "are DIFFERENT" in wrong
    assert "seed=0" in disagreement and "seed=1" in disagreement


def test_a_run_says_that_verify_has_nothing_to_compare_and_that_a_mask_sees_ahead(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(text, steps=1, masks=("causal()", "full()"))
    assert run_job(prepare(config, tmp_path / "run", go_on=False, overwrite=False), World(), check=True) == 0
    said = capsys.readouterr().out
    assert "verify: nothing is compared" in said and "are equal" not in said
    assert said.count("warning: mask ") == 1
    assert "warning: mask 'full()' lets tokens see later ones (32,896 of its 66,049 pairs)" in said


# -- stopping and going on ------------------------------------------------------------------------


def test_a_run_goes_on_over_another_number_of_ranks(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, whole, parts = tiny(text), tmp_path / "whole", tmp_path / "parts"
    assert run_until(0, 1, config, whole, False, -1)
    summary = capsys.readouterr().out
    for line in ("nats a target", "tokens/s", "GiB", "the masks require", "waiting for other ranks", "6/6"):
        assert line in summary
    assert [line.split()[1] for line in summary.splitlines() if "s left" in line] == [f"{n}/6" for n in range(1, 6)]

    assert run_processes(run_until, 2, config, parts, False, 1) == [False, False]
    assert len(records_of(parts)) == 2
    assert run_processes(run_until, 3, config, parts, True, 3) == [False, False, False]
    assert len(records_of(parts)) == 4
    assert load(parts / "config.toml") == config
    assert run_until(0, 1, config, parts, True, -1)

    expected, found = records_of(whole), records_of(parts)
    assert [record["step"] for record in found] == list(range(1, 7))
    assert [record["start"] for record in found] == [1, 1, 2, 2, 3, 3]
    for name in ("loss", "grad_norm", "lr", "position"):
        assert [r[name] for r in found] == pytest.approx([r[name] for r in expected], rel=1e-10), name
    assert found[-1]["loss"] < found[0]["loss"]
    kept = sorted(path.name for path in (parts / "checkpoint").iterdir())
    assert kept == ["step-00000004", "step-00000006"]  # the last two
    from matplotlib.image import imread

    picture = imread(parts / "plot.png")
    assert picture.shape[0] > 400 and len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 50


def threads_after_a_run(rank: int, world_size: int, config: Config, run: Path) -> tuple[set[str], set[str]]:
    job = prepare(config, run, go_on=False, overwrite=False)
    world = world_of(rank, world_size)
    train(job, start(job, world), StopAt(job, world, 1))
    before = thread_names()
    world.close()
    return before, thread_names()


def thread_names() -> set[str]:
    return {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed under /proc on Linux alone")
def test_no_thread_of_the_group_outlives_a_run(text: Path, tmp_path: Path) -> None:
    for before, after in run_processes(threads_after_a_run, 2, tiny(text), tmp_path / "run"):
        assert {name for name in before if "gloo" in name}
        assert not {name for name in after if "gloo" in name}


@pytest.mark.parametrize("first", [1, pytest.param(0, id="of an earlier version, which counted from 0")])
def test_metrics_after_the_checkpoint_are_dropped(first: int, text: Path, tmp_path: Path) -> None:
    config, run = tiny(text), tmp_path / "run"
    run_until(0, 1, config, run, False, 1)
    records = records_of(run)
    later = {**records[-1], "loss": 99.0}  # as by a run that died after two more steps
    lines = [json.dumps({**record, "step": first + i}) for i, record in enumerate([*records, later])]
    (run / "metrics.jsonl").write_text("\n".join(lines) + f'\n{{"step": {first + 3},')
    run_until(0, 1, config, run, True, -1)
    assert [record["step"] for record in records_of(run)] == list(range(1, 7))
    assert all(record["loss"] < 6 for record in records_of(run))


def test_a_gradient_that_is_no_number_leaves_the_parameters(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny(text, save_every=1)
    job = prepare(config, run, go_on=False, overwrite=False)
    trainer = start(job, World())

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (float("inf") if job.progress["step"] == 3 else 1)

    trainer.model.layers[1].up.weight.register_hook(overflow)
    with pytest.raises(FloatingPointError, match=r"step 4 is [0-9.]+, its gradient's norm (inf|nan)"):
        train(job, trainer, StopAt(job, World(), -1))
    assert checkpoint.latest(run) == run / "checkpoint" / "step-00000003"
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters())


def test_a_loss_that_is_no_number_leaves_the_checkpoint(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_until(0, 1, tiny(text), run, False, 1)
    job = prepare(tiny(text), run, go_on=True, overwrite=False)
    trainer = start(job, World())
    with torch.no_grad():
        trainer.model.head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 3 is nan"):
        train(job, trainer, StopAt(job, World(), -1))
    assert checkpoint.latest(run) == run / "checkpoint" / "step-00000002"


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("num_kv_heads", "num_kv_head", "unknown key model.num_kv_head (did you mean 'num_kv_heads'?)"),
        ("seqlen = 257\n", "", "missing key seqlen"),
        ("seqlen = 257", 'seqlen = "long"', "seqlen is 'long'; it must be int"),
        ("seqlen = 257", "seqlen = 1", "seqlen is 1; it must be a whole number from 2"),
        ("num_kv_heads = 2", "num_kv_heads = 3", "num_heads is 4, no multiple of model.num_kv_heads 3"),
        ("head_dim = 8", "head_dim = 7", "model.head_dim is 7; it must be a whole number from 2 to 1048576, even"),
        ('"float64"', '"float46"', "unknown dtype 'float46' (did you mean 'float64'?)"),
        ('"cpu"', '"cuda"', "want a GPU each"),
        ('"causal()"', '"casual()"', "did you mean 'causal'"),
        ("warmup = 2", "warmup = -1", "warmup is -1"),
        ("[model]", "[model", "changed.toml: "),
        ("seed = 0", "seed = -1", "seed is -1"),
        ("loss_chunks = 8", "loss_chunks = 300", "loss_chunks is 300 for 257 tokens"),
        ("lr = 0.01", "lr = nan", "optimizer.lr is nan; it must be a finite number, above 0"),
    ],
)
def test_bad_configs_are_refused(before: str, after: str, reason: str, tmp_path: Path) -> None:
    if after == '"cuda"' and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert reason in refusal("--config", config_file(tmp_path, before, after), "--out", tmp_path / "run")


def test_bad_arguments_are_refused(tmp_path: Path, text: Path) -> None:
    config = config_file(tmp_path, "steps = 6", "steps = 6")
    empty, missing, hollow = tmp_path / "empty.txt", tmp_path / "missing.txt", tmp_path / "hollow"
    empty.touch()
    hollow.mkdir()
    (hollow / "nothing.txt").touch()
    out = ("--config", config, "--out", tmp_path / "run")
    assert "did you mean 'cpu-128k'" in refusal("--config", "cpu-128", "--out", tmp_path / "run")
    assert "missing.txt' does not exist" in refusal(*out, "--data", missing)
    assert "empty.txt' is empty" in refusal(*out, "--data", empty)
    assert "hollow' holds no file" in refusal(*out, "--data", hollow)
    assert "has 40 bytes in 1 files, one sequence takes 257" in refusal(*out, "--data", text / "0.txt")
    assert "no config.toml" in refusal("--resume", tmp_path / "run")
    assert "leave out --out" in refusal("--resume", tmp_path / "run", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert f"{empty} is a file" in refusal("--config", config, "--data", text, "--out", empty)


def test_checkpoints_that_do_not_fit_are_refused_and_kept(tmp_path: Path, text: Path) -> None:
    config, run = tiny(text), tmp_path / "run"
    run_until(0, 1, config, run, False, 1)
    before = (run / "metrics.jsonl").read_text()
    same = config_file(tmp_path, "steps = 6", "steps = 6", config)
    assert "holds a checkpoint; go on with --resume" in refusal("--config", same, "--out", run)
    wider = config_file(tmp_path, "d_ff = 24", "d_ff = 32", config)
    said = refusal("--resume", run, "--config", wider)
    assert "layers.0.up.weight is [48, 16] there and [64, 16] in the model" in said
    deeper = config_file(tmp_path, "num_layers = 2", "num_layers = 3", config)
    assert "layers.2.qkv.weight is missing there" in refusal("--resume", run, "--config", deeper)
    assert "another text" not in said
    other = config_file(tmp_path, "head_dim = 8", "head_dim = 4", tiny(text))
    other.write_text(
        other.read_text().replace("num_heads = 4", "num_heads = 8").replace("kv_heads = 2", "kv_heads = 4")
    )
    assert "was made with model.num_heads = 4, not 8" in refusal("--resume", run, "--config", other)
    assert "text other than this one" in refusal("--resume", run, "--data", text / "6.txt")
    assert "is of step 2, and 2 are asked for" in refusal("--resume", run, "--steps", 2)
    traced = (run / "config.toml").read_text().replace("seed = 0", "seed = 0\nprofile = [2, 2]")
    (run / "config.toml").write_text(traced)
    assert "is of step 2, and 1 are asked for" in refusal("--resume", run, "--steps", 1)  # nothing of its profile
    for part in (run / "checkpoint").glob("*/*.safetensors"):
        part.write_bytes(part.read_bytes()[:100])
    assert "no whole checkpoint" in refusal("--resume", run)
    assert (run / "metrics.jsonl").read_text() == before
    assert (run / "checkpoint" / "step-00000002" / "manifest.json").exists()


# -- as it is really started ----------------------------------------------------------------------


def torchrun(*arguments: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, *(str(argument) for argument in arguments)]


def processes_naming(word: str) -> list[int]:
    """Processes whose command line holds `word`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue  # it has just ended
    return found


def test_interrupt_saves_and_leaves_no_process(tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    config = config_file(tmp_path, "steps = 6", "steps = 100000", tiny(text))
    command = torchrun("launch/pretrain.py", "--config", config, "--out", run, "--verify")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "are equal" in said and "the masks require" in said and f"go on with --resume {run}" in said
    assert not processes_naming(str(run))
    steps = len(records_of(run))
    assert checkpoint.latest(run) == run / "checkpoint" / f"step-{steps:08d}"
    assert (run / "plot.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"), [(["--data", "missing.txt"], "missing.txt' does not exist"), (["--stepz", "3"], "--steps")]
)
def test_bad_input_is_said_once_however_many_ranks_there_are(arguments: list[str], words: str, tmp_path: Path) -> None:
    command = torchrun("-m", "launch.pretrain", *arguments, "--out", tmp_path / "run")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and words in said[0]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("config", ["cpu-128k", pytest.param("causal-32k", marks=pytest.mark.soak)])
def test_shipped_configs_train(config: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = torchrun("-m", "launch.pretrain", "--config", config, "--steps", 2, "--verify", "--out", run)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "are equal" in done.stdout
    losses = [record["loss"] for record in records_of(run)]
    assert losses[0] == pytest.approx(np.log(256), abs=0.1)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seqlen", [1024, pytest.param(8192, marks=pytest.mark.soak)])
def test_recall_within_five_minutes(seqlen: int, tmp_path: Path) -> None:
    """From scratch, over two processes: the questions on rank 1 are answered from the pairs on rank 0."""
    config, run = tmp_path / "recall.toml", tmp_path / "run"
    config.write_text(dump(dataclasses.replace(load(find_config("recall-8k")), seqlen=seqlen)))
    command = torchrun("-m", "launch.pretrain", "--config", config, "--out", run)
    begin = time.monotonic()
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < patience(300)
    asked = rf"(recall at {seqlen:,} tokens|the same with the ring cut) *│ ([\d.]+) % of \d+"
    whole, cut = (float(share) for _, share in re.findall(asked, done.stdout))
    assert whole > 95
    assert cut < 15  # a guess among 16 values: 6.25
    assert {record["seqlen"] for record in records_of(run)} == {16 << n for n in range((seqlen // 16).bit_length())}
