"""The page in a browser: what it says of a place, drawn or magnified, is the mask's and the plan's."""

import html
import re
from pathlib import Path

import numpy as np
import pytest

import ringattn
from ringattn.geometry.regular import regular
from ringattn.pictures.raster import counted
from tests.support.chromium import document_of, needs_chromium

LENGTH = 1 << 20


def said(page: Path, fragment: str) -> list[str]:
    """The lines of what the page says."""
    return said_in(document_of(page, fragment))


def said_in(document: str) -> list[str]:
    found = re.search(r'<div id="said"[^>]*>(.*?)</div>', document, re.DOTALL)
    assert found is not None
    return html.unescape(found.group(1)).split("\n")


@needs_chromium
def test_magnified_a_page_counts_tokens(tmp_path: Path) -> None:
    """A million tokens on 1,024 ranks, down to single pairs."""
    draw = np.random.default_rng(1)
    bounds = [0, *sorted((draw.choice(LENGTH - 1, 4999, replace=False) + 1).tolist()), LENGTH]
    mask = (ringattn.sliding_window(1023) | ringattn.global_tokens([5, 300_010])) & ringattn.documents(bounds)
    picture = ringattn.show(mask, LENGTH, ranks=1024, layout="zigzag")
    picture.save(tmp_path / "x.html")
    first = 300_000
    view = f"view=0,{first},{first + 2048},{first},{first + 2048}"
    document = document_of(tmp_path / "x.html", f"{view}&at=0,{first + 1003.5},{first + 1043.5}")
    lines = said_in(document)
    queries, keys = (re.match(r".* ([\d,]+) to ([\d,]+), (?:of|held by) (.*)", line) for line in lines[:2])
    assert queries and keys
    (q0, q1), (k0, k1) = ([int(n.replace(",", "")) for n in found.groups()[:2]] for found in (queries, keys))
    assert q0 <= first + 1043 <= q1 and k0 <= first + 1003 <= k1 and q1 - q0 == 7
    bound = mask.bind(LENGTH, LENGTH).bands(q0, q1 + 1)
    expected = int(counted(regular(bound), np.array([q0, q1 + 1]), np.array([k0, k1 + 1]))[0, 0])
    assert lines[2] == f"pairs: {expected:,}"
    seen = f"query position {first:,} to {first + 2047:,}, key position {first:,} to {first + 2047:,}"
    title, name = (re.search(f"<{kind}.*?>(.*?)</", document) for kind in ("title", 'g class="name"><text'))
    assert title and title[1].endswith(f"pairs by the rank that holds the query: {seen}")
    assert name and name[1] == f"{seen}; a cell is 8 x 8 tokens"
    half = LENGTH // 2048
    assert queries.group(3) == keys.group(3) == f"rank {q0 // half}"


@needs_chromium
@pytest.mark.slow
def test_a_page_says_what_boxes_arrows_and_cells_are(tmp_path: Path) -> None:
    picture = ringattn.show(ringattn.causal(), 4096, ranks=4, layout="zigzag", schedule="ring", view="schedule")
    picture.save(tmp_path / "x.html")
    pairs = 4096 * 4097 // 2
    box = said(tmp_path / "x.html", "at=0,0.2,1.5")
    assert box[0] == "turn 0, rank 1, with keys of rank 1" and re.fullmatch(r"[\d,]+ pairs in 1 kernel call", box[1])
    cell = said(tmp_path / "x.html", "at=2,0.5,3.5")
    cut = int(picture.scene.notes[-1].split()[-1])  # hops of a turn
    assert cell[:2] == ["rank 3", "owner of the keys 0"] and cell[3] == f"turn: {-(-3 // cut)}"
    assert 0 < int(cell[2].removeprefix("pairs: ").replace(",", "")) < pairs
    sent = said(tmp_path / "x.html", "at=3,2.5,1.5")
    assert sent[:2] == ["from rank 1", "to rank 2"] and sent[2].endswith(" bytes")


@needs_chromium
@pytest.mark.slow
def test_single_pairs_and_whole_pictures(tmp_path: Path) -> None:
    ringattn.show(ringattn.bigbird(8, 3, 1, 2), 100, ranks=8, layout="striped").save(tmp_path / "x.html")
    dense = ringattn.bigbird(8, 3, 1, 2).dense(100, 100)
    for q, k in ((50, 50), (58, 44)):
        word = "attends" if dense[q, k] else "does not attend"
        lines = said(tmp_path / "x.html", f"view=0,{k - 3},{k + 17},{q - 10},{q + 10}&at=0,{k + 0.5},{q + 0.5}")
        assert lines == [f"query {q}, of rank {q % 8}", f"key {k}, held by rank {k % 8}", word]
        whole = said(tmp_path / "x.html", f"at=0,{k + 0.5},{q + 0.5}")
        assert whole[2] == f"pairs: {int(dense[q, k])}"
