"""Profiles: what is written down of calls is what their programs say, in seconds that add up, and changes nothing."""

import json
import time
from collections import Counter
from itertools import pairwise

import pytest
import torch

import ringattn as ra
from ringattn.comm import PlanningRank
from ringattn.planning.program import Row
from ringattn.runtime.timeline import CudaClock
from ringattn.testing import SlowLinks
from tests.support.ring import S, tensors
from tests.support.tape import taped

MASK = ra.sliding_window(20) & ra.causal()
CASES = [(schedule, world) for world in (1, 2, 3, 4) for schedule in ("ring", "exchange", "gather")]
CASES += [("double_ring", 4)]
ROW = 2 * 2 * (8 + 8) * 8  # batch 2, two KV heads, K and V of 8, fp64; gradients are as wide


def context(transport, mask=MASK, **settings):
    nodes = ra.Options(topology=ra.Topology(ra.Link(1e9), ra.Link(1e8), 2))
    options = {"options": nodes} if settings.get("schedule") == "double_ring" else {}
    shape = ra.Shape(4, 2, 8, batch=2, dtype="float64")
    return ra.ContextParallel(transport, S, mask=mask, **{"shape": shape, **options, **settings})


def local(cp):
    """This rank's q, k, v, which want gradients, and dout."""
    q, k, v, dout = (cp.shard(t) for t in tensors()[:4])
    return [t.clone().requires_grad_() for t in (q, k, v)], dout


def step(cp):
    """out and the gradients of one call."""
    inputs, dout = local(cp)
    out = ra.attention(*inputs, cp=cp)
    out.backward(dout)
    return [out.detach(), *(t.grad for t in inputs)]


def moved(cp, before=(0, 0)):
    """Bytes sent and received, but for some before."""
    return tuple(sum(cp.traffic()[way].values()) - n for way, n in zip(("sent", "received"), before, strict=True))


def check_turns(call, turns, direction):
    """Those of the program, in its order, with its bytes."""
    assert [piece.turn for piece in call.turns] == list(turns)
    assert [piece.name for piece in call.turns] == [f"{direction} step {n + 1}" for n in range(len(turns))]
    for piece, turn in zip(call.turns, turns, strict=True):
        assert {p.buffer.row for p in (*turn.sends, *turn.recvs)} <= {Row.KV, Row.GRAD}
        assert piece.sent == ROW * sum(parcel.tokens for parcel in turn.sends)
        assert piece.received == ROW * sum(parcel.tokens for parcel in turn.recvs)
        assert bool(piece.sent or piece.received) == (piece.transfer > 0)


def check_seconds(call):
    for piece in call.pieces:
        parts = piece.copies, piece.post, piece.compute, piece.wait, piece.adds
        assert min(parts) >= 0 and sum(parts) == pytest.approx(piece.seconds)
        assert piece.wait <= piece.transfer <= piece.seconds or not (piece.sent or piece.received)
        assert piece.compute > 0 or piece.turn is None or not piece.turn.launches
    ends = [at for piece in call.pieces for s in piece.stretches for at in (s.start, s.stop)]
    assert ends == sorted(ends) and call.start <= ends[0] and ends[-1] <= call.stop
    assert call.between + sum(piece.seconds for piece in call.pieces) == pytest.approx(call.seconds)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_turns_are_those_of_the_program(case):
    schedule, world = case

    def one_rank(transport):
        cp = context(transport, schedule=schedule)
        plain, before = step(cp), moved(cp)
        start = time.perf_counter()
        with cp.profile() as profile:
            found = step(cp)
        wall = time.perf_counter() - start
        assert all(map(torch.equal, found, plain)), "bit for bit"
        program, calls = cp.program(MASK), profile.calls
        assert [call.name for call in calls] == ["attention forward", "attention backward"]
        for call, turns, way in zip(calls, (program.forward, program.backward), ("forward", "backward"), strict=True):
            check_turns(call, turns, way)
            check_seconds(call)
            assert [p.name for p in call.pieces] == ["begin", *(p.name for p in call.turns), "end"]
            assert call.facts["mask"] == str(MASK) and call.facts["schedule"].startswith(schedule)
        pieces = [piece for call in calls for piece in call.pieces]
        assert (sum(p.sent for p in pieces), sum(p.received for p in pieces)) == moved(cp, before)
        assert 0 < profile.seconds <= wall and 0 <= profile.exposed <= 1
        assert cp.link.timeline is None and step(cp) and len(profile.calls) == 2, "nothing of what follows"
        check_table(profile)

    ra.Loopback(world, timeout=20).run(one_rank)


def check_table(profile):
    lines = profile.table().splitlines()
    assert f"exposed wait {100 * profile.exposed:.1f} %" in lines[0] and "in 2 calls" in lines[0]
    for piece in (piece for call in profile.calls for piece in call.turns):
        (row,) = (line for line in lines if line.strip().startswith(piece.name))
        assert f" {1000 * piece.compute:.3f} ms" in row and row.endswith(f"{piece.received:,}")


@pytest.mark.parametrize(
    "settings", [{}, {"ulysses": 2}, {"ulysses": 2, "options": ra.Options(head_chunks=2)}], ids=str
)
def test_pieces_that_are_no_turns(settings):
    """All-to-alls, shards that are gathered or rolled, each with all of its bytes."""

    def one_rank(transport):
        cp = context(transport, **settings)
        inputs, _ = local(cp)
        before = moved(cp)
        with cp.profile() as profile:
            ra.roll(cp, cp.unshard(ra.attention(*inputs, cp=cp))[:, : cp.local_seqlen], 1).sum().backward()
        names = [call.name for call in profile.calls]
        assert names == ["attention forward", "unshard", "roll", "backward of roll", "attention backward"]
        chunks = settings["options"].head_chunks if "options" in settings else 1
        for call in (profile.calls[0], profile.calls[-1]):
            check_seconds(call)
            way = call.name.split()[1]
            program = getattr(cp.program(MASK), way)
            turns = [f"{way} step {n + 1}" for n in range(len(program))]
            expected = ["begin"]
            for n in range(chunks):
                of = f", chunk {n + 1} of {chunks}" if chunks > 1 else ""
                split = "ulysses" in settings
                expected += [f"{way} heads in{of}", *turns, f"{way} heads out{of}"] if split else turns
            assert [piece.name for piece in call.pieces] == [*expected, "end"]
            assert [piece.turn for piece in call.turns] == list(program) * chunks
            swaps = [piece for piece in call.pieces if "heads" in piece.name]
            assert all(p.sent > 0 < p.received and p.copies > 0 and p.compute == 0 for p in swaps)
        for call in profile.calls[1:4]:
            check_seconds(call)
            assert [piece.name for piece in call.pieces] == ["begin", call.name, "end"]
        assert profile.calls[1].pieces[1].sent > 0
        pieces = [piece for call in profile.calls for piece in call.pieces]
        assert (sum(p.sent for p in pieces), sum(p.received for p in pieces)) == moved(cp, before)
        of_heads = sum(count for kind, count in cp.traffic()["sent"].items() if "heads" in kind)
        assert sum(p.sent for p in pieces if "heads" in p.name) == of_heads

    ra.Loopback(4, timeout=20).run(one_rank)


def test_a_slow_link_is_a_wait_in_its_turn():
    def one_rank(transport):
        cp = context(SlowLinks(transport, ra.Topology(ra.Link(S / 2 * ROW / 0.2))), ra.full(), schedule="exchange")
        with cp.profile() as profile:
            step(cp)
        forward, backward = profile.calls
        (arriving, other), (keys, _, gradients) = forward.turns, backward.turns
        assert min(arriving.wait, keys.wait, gradients.wait) > 0.1
        assert arriving.wait > arriving.compute + other.compute and other.wait == other.transfer == 0
        assert profile.exposed > 0.5

    ra.Loopback(2, timeout=20).run(one_rank)


def test_seconds_are_those_of_the_clock():
    q = torch.randn(1, 1024, 4, 32, requires_grad=True)
    cp = ra.ContextParallel(None, 1024, mask=ra.full())
    ra.attention(q, q, q, cp=cp).sum().backward()
    out, before = ra.attention(q, q, q, cp=cp), time.time_ns()
    with cp.profile() as profile:
        start = time.perf_counter()
        out.sum().backward()  # of a forward before, in whatever thread
        ra.attention(q, q, q, cp=cp)
        wall = time.perf_counter() - start
    after = time.time_ns()
    assert [call.name for call in profile.calls] == ["attention backward", "attention forward"]
    assert 0.7 * wall < profile.seconds <= wall
    assert 0.7 * profile.seconds < sum(piece.compute for call in profile.calls for piece in call.turns)
    slack = 10_000_000  # by which clocks of one machine may be set while this runs
    assert before - slack < profile.calls[0].start < profile.calls[-1].stop < after + slack


def test_the_trace_is_well_formed(tmp_path):
    def one_rank(transport):
        cp = context(transport, ulysses=2, schedule="ring", layout="zigzag")
        with cp.profile() as profile:
            cp.unshard(step(cp)[0])
        return profile, profile.save(tmp_path / "trace.json")

    for rank, (profile, path) in enumerate(ra.Loopback(4, timeout=20).run(one_rank)):
        assert path == tmp_path / f"trace.rank{rank}.json"
        events = json.loads(path.read_text())["traceEvents"]
        assert {event["pid"] for event in events} == {rank} and {event["ph"] for event in events} == {"M", "X"}
        lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
        assert list(lanes.values()) == ["calls", "compute", "wait", "copies", "messages"]
        timed = [event for event in events if event["ph"] == "X"]
        for lane, name in lanes.items():
            own = [event for event in timed if event["tid"] == lane]
            assert own and all(e["dur"] >= 0 for e in own), name
            assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(own)), f"{name} overlaps"
        calls = [event for event in timed if event["tid"] == 0]
        assert [event["name"] for event in calls] == [call.name for call in profile.calls]
        within = [
            e for e in timed if any(c["ts"] <= e["ts"] and e["ts"] + e["dur"] <= c["ts"] + c["dur"] for c in calls)
        ]
        assert within == timed
        turn = profile.calls[0].turns[0]
        (event,) = (e for e in timed if e["name"] == turn.name and e["cat"] == "compute")
        assert abs(event["dur"] - 1e6 * turn.compute) <= 1
        own = ra.ContextParallel(PlanningRank(rank // 2, 2), S, layout="zigzag").position_ids
        spans = [range(*map(int, text.split(":"))) for text in event["args"]["keys"].split(", ")]
        assert [at for span in spans for at in span] == own.tolist(), "a ring's first turn is over its own keys"
        assert event["args"]["sent bytes"] == turn.sent and event["args"]["received bytes"] == turn.received


def test_what_is_refused_and_what_is_left_behind():
    cp = ra.ContextParallel(None, S, options=ra.Options(check_nan=True))
    inputs, _ = local(cp)
    with cp.profile() as profile:
        for other in (cp, cp.replace(mask=ra.full())):
            with pytest.raises(ValueError, match="leave its `with` first"), other.profile():
                pass
        with pytest.raises(RuntimeError, match="still open"):
            _ = profile.calls
        with pytest.raises(FloatingPointError):
            ra.attention(inputs[0] * torch.nan, *inputs[1:], cp=cp)
        ra.attention(*inputs, cp=cp.replace(mask=ra.full()))
    assert [call.facts["mask"] for call in profile.calls] == ["full()"], "a call that failed is not kept"
    with pytest.raises(ArithmeticError), cp.profile() as profile:
        raise ArithmeticError
    assert profile.calls == () and profile.exposed == 0.0 and cp.link.timeline is None
    assert "0.0 % of 0.000 ms in 0 calls" in profile.table()


def test_what_one_rank_refuses_the_others_hear():
    def one_rank(transport):
        cp = context(transport)
        inputs, _ = local(cp)
        if transport.rank == 0:  # the others need no profile
            with cp.profile() as profile:
                with pytest.raises(ValueError, match="leave its `with` first"), cp.profile():
                    pass
                ra.attention(*inputs, cp=cp)
            return len(profile.calls)
        with pytest.raises(ValueError, match=r"rank 0.*profile"):
            ra.attention(*inputs, cp=cp)
        return ra.attention(*inputs, cp=cp).isfinite().all()

    assert all(ra.Loopback(3, timeout=20).run(one_rank))


def test_calls_of_subsets_are_in_the_profile_of_all(tmp_path):
    def one_rank(transport):
        cp = context(transport)
        some = cp.on({0: (0, 2), 1: (1,), 2: (0, 2)}[transport.rank])
        moved = []
        for asked in (cp, some):
            before = Counter(cp.traffic()["received"])
            with asked.profile() as found:
                step(some)
                step(cp)
                step(some)
            moved.append(sum((Counter(cp.traffic()["received"]) - before).values()))
            assert sum(piece.received for call in found.calls for piece in call.pieces) == moved[-1]
            names = [call.name for call in found.calls]
            assert names == (["attention forward", "attention backward"] * 3 if some.world_size > 1 else names)
            turns = [[piece.turn for piece in call.turns] for call in found.calls]
            for program in (some.program(MASK), cp.program(MASK)):
                assert list(program.forward) in turns and list(program.backward) in turns
        return found.save(tmp_path / "part.json").name

    assert ra.Loopback(3, timeout=20).run(one_rank) == [f"part.rank{rank}.json" for rank in range(3)]


def test_calls_run_eagerly_between_replays():
    cp = taped(context(None, kernel="reference", options=ra.Options(graphs="on")))
    plain, _, _ = (step(cp) for _ in range(3))
    device = cp.binding.graphs.device
    replays = device.replays
    assert replays > 0
    with cp.profile() as profile:
        assert all(map(torch.equal, step(cp), plain))
    assert device.replays == replays and all(call.turns for call in profile.calls)
    assert all(map(torch.equal, step(cp), plain)) and device.replays > replays


class Event:
    """As CUDA's: it happens when the device comes to it, and knows how long after others that was."""

    ticks = iter(())

    def __init__(self, enable_timing):
        assert enable_timing
        self.at = None

    def record(self):
        self.at = next(self.ticks)

    def synchronize(self):
        assert self.at is not None

    def elapsed_time(self, later):
        return float(torch.tensor(1000 * (later.at - self.at), dtype=torch.float32))  # milliseconds


def test_a_clock_of_a_device_is_exact_after_hours(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    ticks = [0.0, *(7200 * n / 100 + 1e-6 * n for n in range(1, 101))]  # seconds
    Event.ticks = iter(ticks)
    before, clock, after = time.time_ns(), CudaClock(), time.time_ns()
    found = clock.nanoseconds([clock.read() for _ in ticks[1:]])
    assert before + 1e9 * ticks[1] - 1e5 <= found[0] <= after + 1e9 * ticks[1] + 1e5
    steps = [b - a for a, b in pairwise(found)]
    assert all(abs(step - 1e9 * (72 + 1e-6)) < 1e4 for step in steps)


@pytest.mark.slow
def test_calls_of_a_compiled_graph():
    torch._dynamo.reset()
    cp = ra.ContextParallel(None, S, mask=MASK)
    (q, k, v), dout = local(cp)
    attend = torch.compile(lambda q, k, v, cp: ra.attention(q, k, v, cp=cp).sin(), fullgraph=True, backend="aot_eager")
    attend(q, k, v, cp)
    with cp.profile() as profile:
        attend(q, k, v, cp).backward(dout)
    for call, way in zip(profile.calls, ("forward", "backward"), strict=True):
        check_turns(call, getattr(cp.program(MASK), way), way)
        check_seconds(call)


@pytest.mark.gpu
def test_seconds_on_a_gpu_are_those_of_its_stream():
    q = torch.randn(1, 8192, 8, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    cp = ra.ContextParallel(None, 8192, mask=ra.causal(), options=ra.Options(graphs="on"))
    for _ in range(4):
        plain = ra.attention(q, q, q, cp=cp)
        plain.sum().backward()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with cp.profile() as profile:
        start.record()
        for _ in range(5):
            out = ra.attention(q, q, q, cp=cp)
            out.sum().backward()
        stop.record()
    assert torch.equal(out, plain)
    assert len(profile.calls) == 10
    for call in profile.calls:
        check_seconds(call)
    wall = start.elapsed_time(stop) / 1000
    assert 0.5 * wall < profile.seconds <= 1.01 * wall
    graph = torch.cuda.CUDAGraph()
    with cp.profile(), pytest.raises(NotImplementedError, match="graph of your own"), torch.cuda.graph(graph):
        ra.attention(q.detach(), q.detach(), q.detach(), cp=cp)
