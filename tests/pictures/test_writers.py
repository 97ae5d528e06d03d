"""Writers: what a scene says is in each file, whole and readable by others."""

import json
import re
import sys
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import ringattn
from ringattn.pictures import numbers
from ringattn.pictures.colours import of_ranks, written
from ringattn.pictures.page import page
from ringattn.pictures.picture import Picture
from ringattn.pictures.png import png
from ringattn.pictures.svg import png_of, svg
from ringattn.pictures.text import text

MASK, LENGTH = ringattn.longformer(7, 3), 100


@pytest.fixture(scope="module")
def picture() -> Picture:
    return ringattn.show(MASK, LENGTH, ranks=4, layout="zigzag")


def test_svg_is_one_element_with_lengths_area_and_ranks(picture: Picture) -> None:
    root = ElementTree.fromstring(svg(picture.scene))
    words = " ".join(root.itertext())
    assert root.tag.endswith("svg")
    assert f"{MASK.area(LENGTH, LENGTH):,} pairs attend of 10,000" in words
    assert "query position" in words and "key position" in words
    assert all(f"rank {rank}" in words for rank in range(4))
    fills = {element.get("fill") for element in root.iter()}
    assert {written(colour) for colour in of_ranks(4)} <= fills


def test_nothing_is_drawn_beyond_the_sheet(picture: Picture) -> None:
    root = ElementTree.fromstring(svg(picture.scene))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for element in root.iter():
        if element.tag.endswith("}text"):
            assert 0 <= float(element.get("x", -1)) <= width and 0 <= float(element.get("y", -1)) <= height


def test_headings_are_whole_and_on_the_sheet() -> None:
    mask = ringattn.documents(range(0, 101, 2)) & ringattn.causal()
    root = ElementTree.fromstring(svg(ringattn.show(mask, LENGTH).scene))
    heading = [element for element in root.iter() if element.get("x") == "20.00"]
    words = " ".join(element.text or "" for element in heading)
    assert f"mask documents({list(range(0, 101, 2))}) & causal()" in words
    widths = [len(element.text or "") * float(element.get("font-size", 0)) * 0.53 for element in heading]
    assert len(widths) < 10 and max(widths) < float(root.get("width", 0)) - 20


def test_text_names_owners_that_have_no_letter() -> None:
    lines = text(ringattn.show(ringattn.causal(), 1024, ranks=128, layout="contiguous").scene).splitlines()
    assert any(line.endswith("│ 4 ranks from 0 to 3") or line.endswith("│ ranks 0, 1, 2 and 3") for line in lines)
    assert not any("*" in line for line in lines)


def test_pixels_come_back_as_they_were() -> None:
    from matplotlib.image import imread

    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    assert (np.rint(imread(BytesIO(png_of(pixels))) * 255)[..., :3] == pixels).all()


def test_png_has_the_colours_of_the_ranks(picture: Picture) -> None:
    from matplotlib.image import imread

    pixels = np.rint(imread(BytesIO(png(picture.scene)))[..., :3] * 255).astype(int) @ (1 << 16, 1 << 8, 1)
    assert set((of_ranks(4).astype(int) @ (1 << 16, 1 << 8, 1)).tolist()) <= set(np.unique(pixels).tolist())


def test_png_without_matplotlib_names_the_remedy(picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'ringattn\[show\]', or write .svg or .html"):
        png(picture.scene)


def test_text_shows_owners_and_shares(picture: Picture) -> None:
    lines = text(picture.scene).splitlines()
    grid = [line.partition("│") for line in lines if "│" in line]
    owners = "".join(left[-1] for left, _, _ in grid)
    assert re.fullmatch("0+1+2+3+2+1+0+", owners)
    assert grid[0][2].startswith("█") or grid[0][2].startswith("▒") or grid[0][2].startswith("▓")
    assert all(right.strip() for _, _, right in grid), "every query sees itself"
    assert not any("  " + "█" in right[40:] for _, _, right in grid[:8]), "no query sees what comes later"


def test_page_needs_no_network_and_holds_exact_counts(picture: Picture) -> None:
    made = page(picture.scene)
    assert not re.search(r"(src|href)=\"(?!data:)", made)
    assert set(re.findall(r"https?://[^\"' )]+", made)) == {"http://www.w3.org/2000/svg"}
    data = json.loads(re.search(r'id="panels">(.*?)</script>', made, re.DOTALL).group(1))  # type: ignore[union-attr]
    runs = data[0]["cells"]["layers"][0]["runs"]
    assert sum(value * times for value, times in zip(runs[::2], runs[1::2], strict=True)) == MASK.area(LENGTH, LENGTH)
    assert len(data[0]["field"]["layouts"]) == 2


@pytest.mark.parametrize("ending", [".svg", ".html", ".png", ".txt"])
def test_files_are_what_their_names_say(picture: Picture, ending: str, tmp_path: Path) -> None:
    picture.save(tmp_path / f"x{ending}")
    head = {".svg": b"<svg", ".html": b"<!DOCTYPE html>", ".png": b"\x89PNG", ".txt": b"layout of"}[ending]
    assert (tmp_path / f"x{ending}").read_bytes().startswith(head)


def test_files_that_cannot_be(picture: Picture, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end with one of .svg, .html, .png, .txt"):
        picture.save(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match="is not there; make it first"):
        picture.save(tmp_path / "none" / "x.svg")
    (tmp_path / "x.svg").mkdir()
    with pytest.raises(ValueError, match="cannot be written"):
        picture.save(tmp_path / "x.svg")


@pytest.mark.parametrize(
    ("number", "word"), [(1 << 20, "1M"), (131072, "128K"), (0, "0"), (100_000, "100,000"), (1536, "1,536")]
)
def test_tokens_in_words(number: int, word: str) -> None:
    assert numbers.tokens(number) == word


def test_amounts_in_words() -> None:
    assert [numbers.amount(n, "B") for n in (0, 999, 999_999, 12_345_678)] == ["0 B", "999 B", "1 MB", "12.3 MB"]
    assert [numbers.seconds(n) for n in (0, 2e-6, 0.0123, 5.0, 78_476)] == ["0 s", "2 us", "12.3 ms", "5 s", "78,476 s"]
    assert numbers.share(1, 2) == "50 %" and numbers.share(99_999, 100_000) == "99.9 %"


@pytest.mark.parametrize("unit", ["tokens", "rank", "B", "s"])
@pytest.mark.parametrize("span", [(0, 1), (0, 8), (0, 100), (0, 1 << 20), (0, 1_000_000)])
def test_ticks_are_few_round_and_inside(unit: str, span: tuple[int, int]) -> None:
    found = numbers.ticks(*span, unit)
    assert 1 <= len(found) <= 8
    assert all(span[0] <= at <= span[1] for at in found)
    assert len({numbers.written(at, unit) for at in found}) == len(found), "no two ticks are written alike"
