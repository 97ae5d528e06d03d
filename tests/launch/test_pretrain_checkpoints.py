"""Checkpoints that are damaged, poisoned, foreign or hostile: the newest whole one is taken on every rank, in one line
each is said what is wrong with the others, and nothing in them ever runs."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import checkpoint, manifest, resume
from launch.board import Attempt
from launch.processes import World
from launch.run import _save, prepare, start, train
from launch.tables import dump
from ringattn.testing import run_processes
from tests.support.clock import patience
from tests.support.pretrain import StopAt, config_file, records_of, refusal, run_until, tiny, world_of


def trained(text: Path, run: Path, world_size: int = 1, **changes: Any) -> Any:
    """A run stopped after step 5 of 6, with checkpoints at 4 and 5."""
    config = tiny(text, save_every=2, **changes)
    if world_size == 1:
        run_until(0, 1, config, run, False, 4)
    else:
        run_processes(run_until, world_size, config, run, False, 4)
    assert names(run) == ["step-00000004", "step-00000005"]
    return config


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoint").iterdir())


def resumed_at(rank: int, world_size: int, config: Any, run: Path) -> int:
    job = prepare(config, run, go_on=True, overwrite=False)
    start(job, world_of(rank, world_size))
    return job.progress["step"]


# -- nothing runs ---------------------------------------------------------------------------------


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_nothing_in_a_run_is_unpickled(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, sprung = tmp_path / "run", tmp_path / "sprung"
    config = trained(text, run)
    trap = pickle.dumps(Trap(sprung))
    newest = run / "checkpoint" / "step-00000005"
    for place in (newest / "rank-00000.safetensors", newest / ".metadata", newest / "__0_0.distcp"):
        place.write_bytes(trap)
    foreign = run / "checkpoint" / "step-00000009"
    foreign.mkdir()
    for name in (".metadata", "manifest.json", "rank-00000.safetensors"):
        (foreign / name).write_bytes(trap)
    (run / "job.json").write_bytes(trap)

    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("a pickle was opened")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert resumed_at(0, 1, config, run) == 4
    assert not sprung.exists()


# -- what is damaged is named, and the one before is taken ----------------------------------------


def flip_a_bit(newest: Path) -> None:
    path = newest / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 0x40  # in the exponent of a weight
    path.write_bytes(data)


def cut_short(newest: Path) -> None:
    path = newest / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def edit_settings(newest: Path) -> None:
    path = newest / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


def rewrite(**parts: Any) -> Callable[[Path], None]:
    """A manifest with a checksum that fits, and something wrong in it."""

    def change(newest: Path) -> None:
        path = newest / "manifest.json"
        body = json.loads(path.read_text())["body"] | parts
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps({"sha256": digest, "body": body}))

    return change


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def change(newest: Path) -> None:
        (newest / name).write_bytes(data)

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda newest: (newest / name).unlink()


def make_pipe(newest: Path) -> None:
    (newest / "manifest.json").unlink()
    os.mkfifo(newest / "manifest.json")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (flip_a_bit, "its rank-00000.safetensors is damaged (its checksum does not fit)"),
    "cut short": (cut_short, "bytes"),
    "no tensors": (remove("rank-00000.safetensors"), "its rank-00000.safetensors is missing"),
    "no manifest": (remove("manifest.json"), "it has no manifest.json"),
    "pipe": (make_pipe, "it has no manifest.json"),
    "empty manifest": (write("manifest.json", b""), "its manifest.json is damaged"),
    "binary manifest": (write("manifest.json", bytes(range(256))), "its manifest.json is damaged"),
    "deep manifest": (write("manifest.json", b"[" * 100_000), "its manifest.json is damaged"),
    "a list": (write("manifest.json", b"[]"), "its manifest.json is damaged"),
    "edited": (edit_settings, "its checksum does not fit"),
    "other format": (rewrite(format=0), "its checksum does not fit"),
    "no progress": (rewrite(progress={}), "its manifest.json is damaged"),
    "negative step": (rewrite(progress={**checkpoint.NO_PROGRESS, "step": -1}), "-1 is no int"),
    "outside": (rewrite(files={"../../secret": [1, "0"]}), "is no name of a file"),
    "no files": (rewrite(files={}), "it names no file"),
}


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    kind: str, saved_run: tuple[Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = saved_run
    damage, said = DAMAGES[kind]
    damage(run / "checkpoint" / "step-00000005")
    begin = time.monotonic()
    assert resumed_at(0, 1, config, run) == 4
    assert time.monotonic() - begin < patience(1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert line.startswith(f"checkpoint {run}/checkpoint/step-00000005 is skipped: ") and said in line


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A run to copy."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "text.txt").write_bytes(bytes(97 + index * index % 23 for index in range(3000)))
    return trained(folder / "text.txt", folder / "run"), folder / "run"


@pytest.fixture
def saved_run(template: tuple[Any, Path], tmp_path: Path) -> tuple[Any, Path]:
    config, run = template
    shutil.copytree(run, tmp_path / "run")
    return config, tmp_path / "run"


def test_without_a_whole_checkpoint_the_job_says_why(saved_run: tuple[Any, Path]) -> None:
    _, run = saved_run
    for name in names(run):
        flip_a_bit(run / "checkpoint" / name)
    before = sorted(path for path in run.rglob("*"))
    said = refusal("--resume", run)
    assert "no whole checkpoint under" in said and said.count("checksum does not fit") == 2 and "--overwrite" in said
    assert sorted(path for path in run.rglob("*")) == before


def test_strays_are_named_and_left_alone(saved_run: tuple[Any, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config, run = saved_run
    for name in ("step-zzz", "step-00000099", "notes"):
        (run / "checkpoint" / name).mkdir()
    (run / "checkpoint" / "notes" / "mine.txt").write_text("keep")
    assert resumed_at(0, 1, config, run) == 5
    said = capsys.readouterr().out
    assert all(f"{name} is skipped" in said for name in ("step-zzz", "step-00000099", "notes"))
    run_until(0, 1, config, run, True, -1)
    assert {"notes", "step-zzz", "step-00000005", "step-00000006"} == set(names(run))  # 99 was none of any use
    checkpoint.discard(run)
    assert names(run) == ["notes", "step-zzz"]


@pytest.mark.parametrize("name", ["step-00000009", "step-٠٠٠٠٠٠٠٩"])
def test_a_checkpoint_under_another_name_is_none(
    name: str, saved_run: tuple[Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = saved_run
    shutil.copytree(run / "checkpoint" / "step-00000004", run / "checkpoint" / name)
    assert resumed_at(0, 1, config, run) == 5
    assert f"{name} is skipped" in capsys.readouterr().out
    (run / "checkpoint" / "step-00000005").rename(run / "checkpoint" / "step-00000006")
    run_until(0, 1, config, run, True, -1)
    assert resumed_at(0, 1, dataclasses.replace(config, steps=7), run) == 6


def occupy_by_file(path: Path) -> None:
    path.write_text("")


def occupy_by_link(path: Path) -> None:
    path.symlink_to("nowhere")


def occupy_by_folders(path: Path) -> None:
    (path / "manifest.json").mkdir(parents=True)


@pytest.mark.parametrize("occupy", [occupy_by_file, occupy_by_link, occupy_by_folders])
@pytest.mark.parametrize("name", ["step-00000006", "saving-00000006", "step-00000001"])
def test_what_lies_in_the_way_stops_no_save(
    occupy: Callable[[Path], None], name: str, saved_run: tuple[Any, Path]
) -> None:
    config, run = saved_run
    occupy(run / "checkpoint" / name)
    for planted in ("config.toml.partial", "metrics.jsonl.partial", "job.json.partial", "plot.png"):
        (run / planted).unlink(missing_ok=True)
        (run / planted).symlink_to(run / "precious")
    (run / "precious").write_text("keep")
    run_until(0, 1, config, run, True, -1)
    assert resumed_at(0, 1, dataclasses.replace(config, steps=7), run) == 6
    assert (run / "precious").read_text() == "keep"


def test_where_no_checkpoint_can_be_is_refused_at_the_start(saved_run: tuple[Any, Path]) -> None:
    _, run = saved_run
    shutil.rmtree(run / "checkpoint")
    (run / "checkpoint").symlink_to("nowhere")
    assert "move it away" in refusal("--config", run / "config.toml", "--out", run)


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_what_one_rank_finds_damaged_all_of_them_skip(engine: str, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = trained(text, run, 2, engine=engine)
    assert sorted(path.name for path in (run / "checkpoint" / "step-00000005").iterdir()) == [
        "manifest.json",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]
    path = run / "checkpoint" / "step-00000005" / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert run_processes(resumed_at, 2, config, run) == [4, 4]


def refused_alone(rank: int, world_size: int, config: Any, run: Path) -> list[str]:
    """What both ranks hear when something is refused on rank 1 only."""
    world, heard = world_of(rank, world_size), []

    def fail() -> None:
        if rank == 1:
            raise OSError(28, "No space left on device", "disk")

    try:
        world.together(fail)
    except OSError as error:
        heard.append(str(error))
    job = prepare(config, run, go_on=True, overwrite=False)
    trainer = start(job, world)
    write = checkpoint.write_durably
    if rank == 1:
        checkpoint.write_durably = lambda path, data: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    job.progress["step"] += 1
    try:
        _save(job, trainer)
    except OSError as error:
        heard.append(str(error))
    finally:
        checkpoint.write_durably = write
    return heard


def test_a_refusal_on_one_rank_is_one_on_all(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = trained(text, run, 2)
    first, second = run_processes(refused_alone, 2, config, run)
    assert first == second and len(first) == 2
    assert all("rank 1: [Errno 28] No space left" in said for said in first)
    assert checkpoint.latest(run) == run / "checkpoint" / "step-00000005"


# -- nothing is poisoned --------------------------------------------------------------------------


def overflowing(rank: int, world_size: int, config: Any, run: Path, what: str) -> str:
    """Trains with an update of step 3 that overflows on all ranks, or a moment that is no number on one."""
    job = prepare(config, run, go_on=False, overwrite=False)
    trainer = start(job, world_of(rank, world_size))
    step = trainer.engine.optimizer.step

    def poison(*arguments: Any, **named: Any) -> None:
        step(*arguments, **named)
        if job.progress["step"] == 3:
            parameter = trainer.model.layers[1].up.weight
            tensor = (
                parameter.detach() if what == "parameter" else trainer.engine.optimizer.state[parameter]["exp_avg_sq"]
            )
            local = getattr(tensor, "to_local", lambda: tensor)()
            if what == "parameter" or rank == world_size - 1:
                local.view(-1)[0] = float("inf")

    trainer.engine.optimizer.step = poison
    with pytest.raises(FloatingPointError, match="is not finite on rank") as caught:
        train(job, trainer, StopAt(job, world_of(rank, world_size), -1))
    return str(caught.value)


@pytest.mark.parametrize("what", ["parameter", "moment"])
def test_an_update_that_overflows_is_not_saved(what: str, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = overflowing(0, 1, tiny(text, save_every=2), run, what)
    assert "layers.1.up.weight" in said and "after 4 steps" in said and "step-00000002 is untouched" in said
    assert names(run) == ["step-00000002"]
    assert resumed_at(0, 1, tiny(text), run) == 2


def test_an_update_that_overflows_on_one_rank_is_saved_on_none(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = run_processes(overflowing, 2, tiny(text, save_every=2, engine="fsdp"), run, "moment")
    assert first == second and "on rank 1" in first
    assert names(run) == ["step-00000002"]


def test_the_first_save_of_a_poisoned_run_says_that_there_is_none(text: Path, tmp_path: Path) -> None:
    assert "there is no checkpoint yet" in overflowing(0, 1, tiny(text, save_every=4), tmp_path / "run", "parameter")


def test_a_save_cut_off_anywhere_leaves_a_whole_one(
    saved_run: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends at every call that touches the disk, one after another."""
    config, run = saved_run

    class Killed(BaseException):
        pass

    def at(count: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        left = [count]

        def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **named: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return call(*arguments, **named)

            return counted

        return wrap

    for count in range(40):
        copy = run.parent / f"copy-{count}"
        shutil.copytree(run, copy)
        job = prepare(config, copy, go_on=True, overwrite=False)
        trainer = start(job, World())
        job.progress["step"] = 6
        with monkeypatch.context() as patched:
            wrap = at(count)
            for owner, name in (
                (os, "fsync"),
                (os, "unlink"),
                (os, "rmdir"),
                (os, "mkdir"),
                (os, "replace"),
                (os, "rename"),
            ):
                patched.setattr(owner, name, wrap(getattr(owner, name)))
            try:
                _save(job, trainer)
                done = True
            except Killed:
                done = False
        found, _ = checkpoint.choose(copy, World())
        assert found is not None and found.progress["step"] in ((6,) if done else (5, 6))
        if done:
            break
    assert done and count > 5
    assert names(copy) == ["step-00000005", "step-00000006"]


# -- the settings a checkpoint was made with ------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("global_tokens(4)", "global_tokens(5)", "was made with masks = ["),
        ("seed = 0", "seed = 1", "was made with seed = 0, not 1"),
        ("documents = true", "documents = false", "was made with documents = True, not False"),
        ("rope_base = 10000.0", "rope_base = 500.0", "was made with model.rope_base = 10000.0, not 500.0"),
        ("documents = true", "documents = true\nlengths = {median = 9}", "was made with lengths = None, not {"),
    ],
)
def test_a_config_edited_in_the_run_is_noticed(before: str, after: str, said: str, saved_run: tuple[Any, Path]) -> None:
    _, run = saved_run
    file = run / "config.toml"
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))
    assert said in refusal("--resume", run)


def test_what_may_change_is_said(saved_run: tuple[Any, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config, run = saved_run
    optimizer = dataclasses.replace(config.optimizer, lr=0.005)
    assert resumed_at(0, 1, dataclasses.replace(config, optimizer=optimizer), run) == 5
    assert capsys.readouterr().out.splitlines() == ["from here on: optimizer.lr = 0.005, not 0.01"]


def test_settings_in_a_checkpoint_are_json(saved_run: tuple[Any, Path]) -> None:
    config, run = saved_run
    found = manifest.load(run / "checkpoint" / "step-00000005")
    assert found.settings == resume.settings_of(config)
    assert found.progress["step"] == 5


# -- a job that the launcher begins anew ----------------------------------------------------------


def test_a_restarted_job_goes_on_with_what_it_began(text: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", tiny(text, save_every=2)

    def attempt(restarts: int, stop: int = -1, launch: str = "this job", overwrite: bool = False) -> tuple[int, bool]:
        job = prepare(config, run, False, overwrite, Attempt(launch, restarts))
        trainer = start(job, World())
        first = job.progress["step"]
        return first, train(job, trainer, StopAt(job, World(), stop))

    assert attempt(0, stop=1, launch="an earlier job") == (0, False)
    with pytest.raises(ValueError, match="holds a checkpoint"):  # died before it began: nothing there is its own
        attempt(1)
    assert attempt(1, overwrite=True, stop=3) == (0, False)
    assert attempt(1, overwrite=True, stop=4) == (4, False)  # what it began is not dropped again
    assert attempt(2) == (5, True)
    assert attempt(3) == (6, True)  # it died while it ended
    assert [record["step"] for record in records_of(run)] == list(range(1, 7))
    shutil.rmtree(run / "checkpoint")
    assert attempt(4) == (0, True)
    with pytest.raises(ValueError, match="holds a checkpoint"):
        attempt(0)


# -- names and places -----------------------------------------------------------------------------


def test_a_name_stays_in_the_output_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "escaped" / "checkpoint" / "step-00000001"
    outside.mkdir(parents=True)
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for name in (
        "../../escaped",
        "/tmp/x",
        "..",
        ".",
        "",
        ".hidden",
        "a/b",
        "a\\\\b",
        "new\\nline",
        "x" * 81,
        "nul\\u0000",
    ):
        path = config_file(tmp_path, 'name = "tiny"', f'name = "{name}"')
        said = refusal("--config", path, "--overwrite")
        assert "name is " in said and "it must be 1 to 80 printable characters" in said
    assert outside.exists() and not list((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("go_on", [True, False])
def test_two_jobs_in_one_place_are_refused(go_on: bool, saved_run: tuple[Any, Path]) -> None:
    config, run = saved_run
    held = resume.lock(run)  # as a job does
    job = prepare(config, run, go_on, overwrite=not go_on)
    with pytest.raises(ValueError, match=r"another job is at work in .*; wait for its end, or set --out"):
        start(job, world_of(0, 1))
    assert names(run) == ["step-00000004", "step-00000005"]
    held.release()
    start(job, world_of(0, 1))


def test_overwrite_removes_checkpoints_and_nothing_else(saved_run: tuple[Any, Path]) -> None:
    config, run = saved_run
    (run / "checkpoint" / "thesis").mkdir()
    (run / "checkpoint" / "saving-00000007").mkdir()
    start(prepare(config, run, go_on=False, overwrite=True), World())
    assert names(run) == ["thesis"]


def test_a_config_cut_off_while_it_is_written_is_not_left(
    saved_run: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = saved_run
    before = (run / "config.toml").read_text()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_durably(run / "config.toml", b"half")
    assert (run / "config.toml").read_text() == before == dump(config)
