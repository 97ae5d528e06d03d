"""What is put away between forward and backward: the same gradients, memory that falls, and no file that stays."""

import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock, call

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ringattn as ra
from ringattn.comm import Transport
from ringattn.runtime import offload
from ringattn.runtime.offload import LEAST, PinnedCopy
from ringattn.testing import run_processes

HEADS, DIM = 4, 64


def files_in(folder: Path) -> int:
    """How many files of a folder this process has open, with or without a name."""
    links = (os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())
    return sum(link.startswith(f"{folder}/") for link in links)


def attended(transport: Transport | None, where: str | bool, tokens: int) -> tuple[list[Tensor], int]:
    """The result and the gradients of two layers of attention, and how many files there were between."""
    options = ra.Options(offload=where)
    cp = ra.ContextParallel(transport, tokens, mask=ra.sliding_window(99), options=options)
    drawn = torch.Generator().manual_seed(2)
    whole = (torch.randn(1, tokens, heads, DIM, dtype=torch.float64, generator=drawn) for heads in (HEADS, 2, 2))
    leaves = [cp.shard(x).requires_grad_() for x in whole]
    q, k, v = (x * 1 for x in leaves)
    out = ra.attention(ra.attention(q, k, v, cp=cp), k, v, cp=cp)
    files = 0 if isinstance(where, bool) else files_in(Path(where))
    out.sin().sum().backward()
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)], files


def test_conjugates_and_negatives_are_what_they_were(tmp_path: Path) -> None:
    """They share a storage, offsets and strides with what they are conjugates of."""

    def gradient() -> Tensor:
        x = torch.randn(100, 256, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)).requires_grad_()
        h = x * 1
        products = (h * h).real, ((h.conj() * h) * h).imag, h.conj().imag * h.real
        sum(y.sum() for y in products).backward()  # type: ignore[union-attr]
        assert x.grad is not None
        return x.grad

    with ra.offloaded(str(tmp_path)):
        found = gradient()
    assert torch.equal(found, gradient())


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_attention_has_the_same_gradients_from_a_directory(world: int, tmp_path: Path) -> None:
    """The same bits on one rank; on several, sums come in the order in which messages do."""
    tokens = 1021

    def one_rank(transport: Transport) -> list[float]:
        (found, files), (plain, _) = (attended(transport, where, tokens) for where in (str(tmp_path), False))
        assert files >= 5
        return [float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, plain, strict=True)]

    bound = 0 if world == 1 else 100 * torch.finfo(torch.float64).eps  # of sums over windows of 100
    for errors in ra.Loopback(world, timeout=20).run(one_rank):
        assert len(errors) == 4 and max(errors) <= bound
    assert files_in(tmp_path) == 0 == len(os.listdir(tmp_path))


def test_what_attention_saves_is_in_files_once(tmp_path: Path) -> None:
    """q, k, v, out and lse of the first call; the second's q is the first's out, and its k and v are known."""
    assert 8 * HEADS * 2100 > LEAST  # of lse
    assert attended(None, str(tmp_path), 2100)[1] == 7


def mlp_loss(where: str | bool, x: Tensor, weight: nn.Parameter, layer: Callable[[Tensor], Tensor]) -> Tensor:
    with ra.offloaded(where):
        y = layer(x * 1)
        return (y @ weight).relu().square().sum()


def test_a_block_has_the_same_bits_and_leaves_no_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 300, 64, requires_grad=True), nn.Parameter(torch.randn(64, 256))

    def layer(y: Tensor) -> Tensor:
        return y.transpose(0, 1).exp().add(y[:, :, ::2].mean()).transpose(0, 1)

    def checkpointed(y: Tensor) -> Tensor:
        found = checkpoint(layer, y, use_reentrant=False)
        assert isinstance(found, Tensor)
        return found

    for how in (layer, checkpointed):
        grads = []
        for where in (False, str(tmp_path)):
            loss = mlp_loss(where, x, weight, how)
            assert files_in(tmp_path) == (0 if where is False else 3)  # what the layer saves, and the two behind it
            grads.append(torch.autograd.grad(loss, (x, weight)))
            del loss
            assert files_in(tmp_path) == 0 == len(os.listdir(tmp_path))
        assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_what_is_changed_in_place_is_another_tensor(tmp_path: Path) -> None:
    x = torch.rand(LEAST, dtype=torch.float64, requires_grad=True)
    with ra.offloaded(tmp_path):
        y = x.sin()
        z = y.square()  # saves y
        with torch.no_grad():
            y.mul_(2)
        w = y.cos().sum() + z.sum()  # saves y again
    (found,) = torch.autograd.grad(w, x)
    with torch.no_grad():
        expected = (-(2 * x.sin()).sin() + 2 * x.sin()) * x.cos()
    torch.testing.assert_close(found, expected)


def test_a_call_that_is_dropped_or_fails_leaves_no_file(tmp_path: Path) -> None:
    x = torch.rand(LEAST, requires_grad=True)
    with ra.offloaded(tmp_path):
        y = (x * 1).exp()
    assert files_in(tmp_path) == 1
    del y
    assert files_in(tmp_path) == 0
    with pytest.raises(ZeroDivisionError), ra.offloaded(tmp_path):
        y = (x * 1).exp()
        1 / 0  # noqa: B018
    del y
    assert files_in(tmp_path) == 0 == len(os.listdir(tmp_path))


def resident() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def held_between(rank: int, world_size: int, folder: str) -> list[int]:
    """Bytes that a process holds for a backward to come, without and with a folder for them, of 40 MiB tensors."""
    x = torch.zeros(10 << 20, requires_grad=True)
    held = []
    for where in (False, folder):
        before = resident()
        with ra.offloaded(where):
            y = (x * 1).exp().exp().exp()
        held.append(resident() - before - y.nbytes)
        y.sum().backward()
        del y
        x.grad = None
    return held


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's status of a process")
def test_the_resident_set_falls(tmp_path: Path) -> None:
    """In a process of its own, whose allocator has nothing in hand."""
    ((without, with_folder),) = run_processes(held_between, 1, str(tmp_path))
    assert without > 1.9 * (40 << 20) and with_folder < 0.1 * (40 << 20)


@pytest.mark.slow
def test_nothing_is_left_of_a_killed_process(tmp_path: Path) -> None:
    code = f"""
        import os, time, torch, ringattn
        x = torch.rand(1 << 20, requires_grad=True)
        with ringattn.offloaded({str(tmp_path)!r}):
            y = (x * 1).exp()
        print("saved", flush=True)
        time.sleep(60)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "saved\n"
    used = [os.readlink(entry) for entry in Path(f"/proc/{child.pid}/fd").iterdir()]
    assert any(link.startswith(str(tmp_path)) for link in used)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not os.listdir(tmp_path)


def without_room(rank: int, world: int, folder: str) -> tuple[str, float]:
    """Files on the last rank may have a megabyte, which the result does not fit in."""
    cp = ra.ContextParallel(torch.distributed.group.WORLD, 4096, options=ra.Options(offload=folder))
    x = [torch.randn(1, 2048, 4, 64, requires_grad=True) * 1 for _ in range(3)]
    ra.attention(x[0], x[1], x[2], cp=cp).sum().backward()  # brings up the memory that messages go through
    if rank == world - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    start = time.monotonic()
    try:
        ra.attention(x[0], x[1], x[2], cp=cp).sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "nothing", 0.0


@pytest.mark.slow
def test_a_full_disk_is_told_on_every_rank(tmp_path: Path) -> None:
    other, own = run_processes(without_room, 2, str(tmp_path))
    assert "OSError" in own[0] and "name a directory with room" in own[0] and "2,097,152 bytes" in own[0]
    assert "rank 1 failed" in other[0] and "name a directory with room" in other[0]
    assert max(own[1], other[1]) < 30


def test_refusals(tmp_path: Path) -> None:
    for where, said in (
        (str(tmp_path / "none"), "must be a directory that this process may write to"),
        (3, "must be False, True, or the path of a directory"),
        (None, "must be False, True, or the path of a directory"),
    ):
        with pytest.raises(ValueError, match=said):
            ra.Options(offload=where)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=said):
            ra.offloaded(where)  # type: ignore[arg-type]

    def on_a_cpu(transport: Transport) -> str:
        with pytest.raises(ValueError, match="pass a directory") as found:
            attended(transport, True, 64)
        return str(found.value)

    assert all("this tensor is on cpu" in text for text in ra.Loopback(2, timeout=20).run(on_a_cpu))
    with pytest.raises(ValueError, match="pass a directory"), ra.offloaded(True):
        (torch.rand(LEAST, requires_grad=True) * 1).exp()


def test_a_compiled_graph_refuses_the_option_and_takes_the_block(tmp_path: Path) -> None:
    x = torch.randn(1, 512, HEADS, DIM, requires_grad=True)
    grads = []
    for option, where in ((str(tmp_path), False), (False, str(tmp_path)), (False, False)):
        cp = ra.ContextParallel(None, 512, options=ra.Options(offload=option))
        compiled = torch.compile(lambda x, cp=cp: ra.attention(x, x, x, cp=cp), fullgraph=True, backend="aot_eager")
        with ra.offloaded(where):
            if option:
                with pytest.raises(NotImplementedError, match=r"leave the option out, and run .* ringattn.offloaded"):
                    compiled(x)
                continue
            out = compiled(x)
            assert (files_in(tmp_path) > 0) == bool(where)
        grads += torch.autograd.grad(out.sum(), x)
    assert torch.equal(*grads)


def test_copies_to_the_host_are_ordered_behind_and_before_the_work_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With stand-ins for the streams, as the order of what they are given is all that can be wrong."""
    fake = MagicMock()
    monkeypatch.setattr(offload, "torch", fake)
    current, x, copies = fake.cuda.current_stream.return_value, MagicMock(), MagicMock()
    host, back = fake.empty_like.side_effect = [MagicMock(), MagicMock()]
    log = MagicMock()
    for name, thing in {"copies": copies, "x": x, "host": host, "back": back, "cuda": fake.cuda}.items():
        log.attach_mock(thing, name)
    copied = PinnedCopy(x, copies)
    out = [
        call.copies.wait_stream(current),
        call.cuda.stream(copies),
        call.cuda.stream().__enter__(),
        call.host.copy_(x.detach.return_value, non_blocking=True),
        call.cuda.stream().__exit__(None, None, None),
        call.x.record_stream(copies),
    ]
    assert [one for one in log.mock_calls if one in out] == out
    log.reset_mock()
    copied.fetch()
    copied.fetch()
    assert copied.take() is back
    home = [
        call.copies.wait_stream(current),
        call.cuda.stream(copies),
        call.cuda.stream().__enter__(),
        call.back.copy_(host, non_blocking=True),
        call.copies.record_event(),
        call.cuda.stream().__exit__(None, None, None),
        call.back.record_stream(copies),
        call.cuda.current_stream().wait_event(copies.record_event.return_value),
    ]
    assert [one for one in log.mock_calls if one in home] == home
