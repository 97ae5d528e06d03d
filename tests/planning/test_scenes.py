"""Pictures of plans show the plan's own numbers: pairs, bytes, seconds, owners."""

import re

import numpy as np
import pytest

import ringattn
from ringattn.comm import PlanningRank
from ringattn.pictures import numbers
from ringattn.pictures.charts import Series, bars, matrix
from ringattn.pictures.scene import Arrow, Border, Cells, Field, Layer, Panel, Rect
from ringattn.pictures.svg import svg
from ringattn.pictures.text import text
from ringattn.planning.cost import costs
from ringattn.show import _loops, of_context
from tests.support.cases import ALL

MASK = ringattn.longformer(63, 8)
NODES = ringattn.Options(topology=ringattn.Topology(ringattn.Link(4e11), ringattn.Link(5e10), 4))


def context(world: int = 4, seqlen: int = 1000, **settings) -> ringattn.ContextParallel:  # type: ignore[no-untyped-def]
    rank = PlanningRank(0, world, device="NVIDIA H100")
    return ringattn.ContextParallel(rank, seqlen, **{"mask": MASK, "layout": "zigzag", "schedule": "ring"} | settings)


def heights(panel: Panel) -> np.ndarray:
    """The top of the bars of each rank."""
    rects = [mark for mark in panel.marks if isinstance(mark, Rect)]
    tops = np.zeros(int(panel.x.stop))
    for rect in rects:
        tops[int(rect.x0)] = max(tops[int(rect.x0)], rect.y1)
    return tops


def test_work_is_the_plans_bytes_the_programs_and_seconds_the_costs() -> None:
    cp = context()
    scene = of_context(cp, "work")
    pairs, moved, seconds = scene.panels
    assert (heights(pairs) == cp.plan.work).all()
    messages = np.concatenate([loop.messages for loop in _loops(cp)])
    assert (heights(moved) == np.bincount(messages[:, 2], messages[:, 3], 4)).all()
    terms = cp.binding.settings.terms
    assert heights(seconds).max() == pytest.approx(costs(cp.plan, ["ring"], terms)[0].seconds, rel=1e-12)
    slowest = int(heights(seconds).argmax())
    assert any(f"critical path: rank {slowest}" in getattr(mark, "name", "") for mark in seconds.marks)


def test_a_schedules_boxes_and_arrows_are_the_programs() -> None:
    cp = context(schedule="exchange")
    forward, backward, tiles, sent = of_context(cp, "schedule").panels
    for panel, loop in zip((forward, backward), _loops(cp), strict=True):
        boxes = {(int(m.y0), int(m.x0)): m for m in panel.marks if isinstance(m, Rect)}
        assert set(boxes) == {tuple(place) for place in np.argwhere(loop.pairs > 0).tolist()}
        assert all(f"{loop.pairs[place]:,} pairs" in box.note for place, box in boxes.items())
        arrows = [m for m in panel.marks if isinstance(m, Arrow)]
        told = sorted((int(a.x0), int(a.y0), int(a.y1), a.note.split("\n")[1].split()[0]) for a in arrows)
        assert told == sorted((t, src, dst, f"{size:,}") for t, src, dst, size in loop.messages.tolist())
    grid, matrix_ = tiles.grid, sent.grid
    assert isinstance(grid, Cells) and isinstance(matrix_, Cells)
    assert (grid.layers[0].values.sum(1) == cp.plan.work).all()
    assert matrix_.layers[0].values.sum() == sum(int(loop.messages[:, 3].sum()) for loop in _loops(cp))


def test_many_ranks_are_summed_exactly_and_said_to_be() -> None:
    cp = context(1024, 1 << 17, layout="contiguous", schedule="exchange")
    scene = of_context(cp, "schedule")
    by_turn, tiles, needed = (panel.grid for panel in scene.panels)
    assert isinstance(by_turn, Cells) and isinstance(tiles, Cells) and isinstance(needed, Cells)
    assert tiles.ink.shape == (128, 128) and scene.panels[1].together == "a cell sums 8 x 8"
    assert tiles.layers[0].values.sum() == by_turn.layers[0].values.sum() == cp.plan.work.sum()
    shape = cp.binding.settings.terms.shape
    token = shape.forward.token + shape.backward.token
    assert needed.layers[0].values.sum() == token * cp.plan.received.sum()
    assert any("programs were not compiled" in note for note in scene.notes)
    pairs = of_context(cp, "work").panels[0]
    assert pairs.together == "a bar is the most of 8 neighbours"
    assert heights(pairs).max() == cp.plan.work.max()


def test_layouts_have_the_costs_of_their_plans() -> None:
    cp = context()
    scene = of_context(cp, "layouts")
    balance = next(panel for panel in scene.panels if panel.title == "largest over mean work")
    for name in ("contiguous", "zigzag", "striped"):
        work = context(layout=name).plan.work
        word = f"{name}  {work.max() / work.mean():.3f}"
        assert any(getattr(m, "label", "").removesuffix(", auto") == word for m in balance.marks)
    assert [panel.title.split(",")[0] for panel in scene.rows[0]] == ["contiguous", "zigzag", "striped"]


@pytest.mark.parametrize("name", ["causal", "global_scattered", "documents_causal"])
@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_a_plans_cells_are_of_their_owners(name: str, layout: str) -> None:
    mask, seqlen = ALL[name][0], 29
    plan = context(3, seqlen, mask=mask, layout=layout).plan
    grid = ringattn.show(plan).scene.panels[0].grid
    assert isinstance(grid, Field)
    cells, dense = grid.cells(), mask.dense(seqlen, seqlen).numpy()
    assert (cells.layers[0].values == dense).all()
    for rank in range(3):
        for position in plan.q_frame(rank).positions().tolist():
            assert cells.words(position, 0)[0] == f"query {position}, of rank {rank}"
            assert cells.words(0, position)[1] == f"key {position}, held by rank {rank}"


def test_layouts_mark_the_one_that_auto_takes() -> None:
    """In every writer: of a window the contiguous one, of a causal mask zigzag."""
    for mask, name in ((MASK, "contiguous"), (ringattn.causal(), "zigzag")):
        cp = context(mask=mask, seqlen=1 << 17, layout="striped", schedule="auto")
        assert context(mask=mask, seqlen=1 << 17, layout="auto", schedule="auto").plan.q_layout.name == name
        scene = of_context(cp, "layouts")
        taken = [panel for panel in scene.panels if panel.taken]
        assert len(taken) == 1 and taken[0].title.startswith(f"{name}, ") and taken[0].title.endswith("(auto)")
        assert sum(line.endswith(" <- auto") for line in text(scene).splitlines()) == 3
        assert svg(scene).count('stroke="#222222" stroke-width="3"') == 1
        assert any(f"auto takes {name}, schedule " in note for note in scene.notes)


def test_a_layout_that_comes_out_as_another_is_drawn_once() -> None:
    scene = of_context(context(mask=ringattn.causal(), seqlen=1 << 17), "layouts")
    assert any("balanced comes out as zigzag here" in note for note in scene.notes)
    assert [panel.title.split(",")[0] for panel in scene.rows[0]] == ["contiguous", "zigzag", "striped"]


def test_messages_to_a_rank_are_summed_in_text() -> None:
    """Of a gather over zigzag, whose shards are two spans: no rank is told of twice."""
    scene = of_context(context(4, 1024, mask=ringattn.causal(), layout="zigzag", schedule="gather"), "schedule")
    lines = [line.split("sends ")[1] for line in text(scene).splitlines() if "sends " in line and "more" not in line]
    for told in lines:
        heads = [re.sub(r"^[\d.]+ \w+ ", "", one) for one in told.split(", ")]
        assert len(heads) == len(set(heads)), told
    assert "at most" in scene.panels[0].legend_title and "thicker" in scene.panels[0].legend_title


def test_legends_name_every_colour_and_stroke() -> None:
    scene = of_context(context(8, 1024, schedule="double_ring", options=NODES), "schedule")
    for panel in scene.panels[:2]:
        legend = {(entry.colour, entry.kind) for entry in panel.legend}
        assert {(m.fill, "box") for m in panel.marks if isinstance(m, Rect)} <= legend
        assert {(m.colour, "solid") for m in panel.marks if isinstance(m, Arrow)} <= legend
        assert {"inside of a node", "between nodes"} <= {entry.name for entry in panel.legend}
    assert all(panel.legend for panel in scene.panels)
    assert of_context(context(8), "layouts").rows[0][-1].legend


def test_messages_take_the_link_that_the_nodes_say() -> None:
    """Of a double ring over two nodes of four: dashed between nodes, and bytes of either link add up to all."""
    cp = context(8, 1024, mask=ringattn.causal(), schedule="double_ring", options=NODES)
    scene = of_context(cp, "schedule")
    between = 0
    for panel, loop in zip(scene.panels, _loops(cp), strict=False):
        arrows = [m for m in panel.marks if isinstance(m, Arrow)]
        assert len(arrows) == len(loop.messages)
        for arrow, (_, src, dst, size) in zip(arrows, loop.messages.tolist(), strict=True):
            crosses = src // 4 != dst // 4
            between += size * crosses
            assert arrow.dashed == crosses and ("between nodes" in arrow.note) == crosses
        assert [m.at for m in panel.marks if isinstance(m, Border)] == [4]
    assert between and any(note.endswith(f"{numbers.amount(between, 'B')} between nodes") for note in scene.notes)
    assert text(scene).count("*") - 2 == sum(
        m.dashed for p in scene.panels[:2] for m in p.marks if isinstance(m, Arrow)
    )


def test_cells_of_many_have_the_turn_of_the_largest() -> None:
    pairs, tint = np.zeros((256, 256), np.int64), np.zeros((256, 256, 3), np.uint8)
    pairs[3, 5], tint[3, 5] = 7, 99
    grid = matrix("x", "a", "b", [Layer("x", pairs)], tint=tint).grid
    assert isinstance(grid, Cells) and grid.colours.shape == (128, 128, 3)
    assert (grid.colours[1, 2] == 99).all() and (np.delete(grid.colours.reshape(-1, 3), 130, 0) == 255).all()


def test_bars_and_matrices_of_nothing() -> None:
    nothing = np.zeros(3, np.int64)
    assert not [mark for mark in bars("x", "pairs", [Series("x", "#000000", nothing)]).marks if isinstance(mark, Rect)]
    grid = matrix("x", "a", "b", [Layer("x", np.zeros((2, 2), np.int64))]).grid
    assert isinstance(grid, Cells) and (grid.colours == 255).all()
