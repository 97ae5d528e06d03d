"""`ringattn.show`, what notebooks show by themselves, and the command `ringattn show`."""

import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

import ringattn
from ringattn.cli.main import app
from ringattn.comm import PlanningRank
from ringattn.show import VIEWS
from tests.support.pages import ROOT, blocks

MASK = ringattn.longformer(15, 4)
NODES = ringattn.Options(topology=ringattn.Topology(ringattn.Link(4e11), ringattn.Link(5e10), 4))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("settings", [{}, {"ranks": 4, "ulysses": 2}, {"ranks": 2, "kv_seqlen": 99, "q_offset": 5}])
def test_every_view_of_a_mask(view: str, settings: dict[str, int]) -> None:
    settings = {name: value for name, value in settings.items() if view != "mask" or name in ("kv_seqlen", "q_offset")}
    picture = ringattn.show(MASK, 64, view=view, **settings)  # type: ignore[arg-type]
    ElementTree.fromstring(picture._repr_html_())
    area = MASK.area(64, settings.get("kv_seqlen", 64), settings.get("q_offset", 0))
    assert f"{area:,} pairs attend" in str(picture)


def test_a_context_is_shown_as_it_is() -> None:
    cp = ringattn.ContextParallel(PlanningRank(1, 3), 100, mask=MASK, layout="striped", schedule="exchange")
    assert "layout striped, schedule exchange" in str(ringattn.show(cp, view="work"))
    assert "layout striped over 3 ranks" in str(ringattn.show(cp, view="layout"))
    assert str(ringattn.show(cp.plan)) == str(ringattn.show(cp)) == str(cp.plan)


def test_what_notebooks_show_by_themselves() -> None:
    cp = ringattn.ContextParallel(PlanningRank(0, 4), 256, mask=MASK)
    assert "drawn at 256 tokens" in MASK._repr_html_()
    assert cp.plan._repr_html_().startswith("<svg") and "plan of" in cp.plan._repr_html_()
    assert "<details>" in cp._repr_html_() and "ringattn: 256 tokens" in cp._repr_html_()
    assert repr(cp.plan).startswith("Plan(") and "\n" not in repr(cp.plan)


@pytest.mark.parametrize(
    ("mask", "length"),
    [
        (ringattn.causal(), "256"),
        (ringattn.longformer(1023, 64), "16,384"),
        (ringattn.documents([0, 40, 1000]) & ringattn.causal(), "1,000"),
        (ringattn.bigbird(64, 3, 1, 2, seed=10**9), "1,024"),
        (ringattn.global_tokens([5, 700]), "1,024"),
        (ringattn.sliding_window(1 << 30), "1,048,576"),
    ],
)
def test_a_mask_alone_takes_a_length_that_suits_it(mask: ringattn.Mask, length: str) -> None:
    assert f"drawn at {length} tokens" in mask._repr_html_()


def test_a_mask_that_fits_no_length_is_written() -> None:
    mask = ringattn.documents([0, 5]) & ringattn.documents([0, 6])
    assert mask._repr_html_() == "<code>(documents((0, 5)) &amp; documents((0, 6)))</code>"


@pytest.mark.parametrize(
    ("arguments", "settings", "text"),
    [
        ((MASK,), {}, "seqlen=None: a mask alone has no length"),
        ((MASK, 0), {}, "seqlen=0: must be at least 1"),
        ((MASK, 64), {"view": "shedule"}, "did you mean 'schedule'"),
        ((MASK, 64), {"layuot": "zigzag"}, "did you mean 'layout'"),
        ((MASK, 64), {"view": "mask", "ranks": 4}, "view='mask' with ranks=4: shows no ranks"),
        ((MASK, 64), {"view": "layouts", "layout": "zigzag"}, "view='layouts' with layout='zigzag': shows all"),
        ((MASK, 64), {"ranks": 8, "ranks_per_node": 3}, "ranks_per_node=3: 8 ranks are not whole nodes of 3"),
        ((MASK, 64), {"ranks_per_node": 4, "options": NODES}, "ranks_per_node=4 beside Options.topology"),
        ((MASK, 64), {"ranks": 0}, "ranks=0: must be at least 1"),
        ((MASK, 64), {"device": "H300"}, "device='H300': figures are known of cpu, H100"),
        ((MASK, 4), {"ranks": 8}, "more ranks than tokens"),
        (("causal",), {}, "must be a mask, a ContextParallel or a plan"),
    ],
)
def test_what_cannot_be_shown(arguments, settings, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        ringattn.show(*arguments, **settings)


def test_a_context_and_a_plan_have_their_own_length() -> None:
    cp = ringattn.ContextParallel(None, 64)
    with pytest.raises(ValueError, match="seqlen, device, layout: a ContextParallel has its own"):
        ringattn.show(cp, 64, layout="zigzag", device="cpu")
    with pytest.raises(ValueError, match="of a plan, which knows no schedule"):
        ringattn.show(cp.plan, view="schedule")


def test_the_block_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("README.md")["Pictures"]
    monkeypatch.chdir(tmp_path)
    cp = ringattn.ContextParallel(PlanningRank(0, 4), 512, mask=MASK)
    exec(code, {"ringattn": ringattn, "mask": MASK, "cp": cp})
    assert "pairs attend" in (tmp_path / "work.html").read_text()


@pytest.mark.parametrize("name", ["layout", "schedule"])
def test_pictures_of_the_docs_are_what_the_readmes_commands_draw(name: str, tmp_path: Path) -> None:
    lines = [
        line for line in (ROOT / "README.md").read_text().splitlines() if f"--out docs/pictures/{name}.svg" in line
    ]
    arguments = shlex.split(lines[0])[2:-1]
    assert run(*arguments, str(tmp_path / "x.svg"))[0] == 0
    made, kept = (path.read_text() for path in (tmp_path / "x.svg", ROOT / "docs" / "pictures" / f"{name}.svg"))
    pixels = re.compile(r"base64,[^\"]*")  # compressed by whatever zlib there is
    assert pixels.sub("", made) == pixels.sub("", kept)


def run(*arguments: str) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, ["show", *arguments])
    return found.exit_code, found.stdout, found.stderr


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    code, out, _ = run("longformer(15, 4)", "--seqlen", "1K")
    assert code == 0 and f"1,024 tokens: {MASK.area(1024, 1024):,} pairs attend" in out
    asked = ("causal()", "--seqlen", "128", "--ranks", "4", "--layout", "zigzag", "--schedule", "ring")
    code, out, _ = run(*asked, "--view", "schedule", "--heads", "8,2,64", "--device", "cpu")
    assert code == 0 and "8 heads over 2 of 64" in out and "layout zigzag, schedule ring" in out and "CPU" in out
    for ending in ("svg", "html"):
        assert run(*asked, "--view", "work", "--out", str(tmp_path / f"x.{ending}"))[0] == 0
        assert (tmp_path / f"x.{ending}").stat().st_size > 1000


def test_the_command_draws_a_double_ring_over_nodes() -> None:
    asked = ("causal()", "--seqlen", "1K", "--schedule", "double_ring", "--view", "schedule")
    code, out, _ = run(*asked, "--ranks-per-node", "4")
    assert (
        code == 0
        and "schedule double_ring of causal()" in out
        and "4 of these ranks share a node" in out
        and "kv to 4*" in out
    )
    code, _, error = run(*asked)
    assert code == 2 and "say how many neighbours share a node with --ranks-per-node, or" in error


def test_a_title_can_be_given_to_the_command() -> None:
    mask = "bigbird(8, 3, 1, 2, seed=5) | documents([0, 5, 9, 20, 21, 22, 23, 30, 64])"
    code, out, _ = run(mask, "--seqlen", "64")
    title = out.splitlines()[0].removeprefix("mask ")
    assert code == 0 and title == mask and run(title, "--seqlen", "64")[1] == out


def test_what_the_library_says_is_said_in_options() -> None:
    assert "(a guess: tell with --heads 32,8,128)" in run("causal()", "--seqlen", "64", "--view", "work")[1]
    mask = "documents([0, 20, 64]) & sliding_window(3)"
    code, out, _ = run(mask, "--seqlen", "64", "--view", "layouts", "--ranks", "2")
    assert code == 0 and f"layouts of {mask}" in out and "\nauto takes" in out


def test_a_terminal_without_blocks_is_told_so() -> None:
    found = CliRunner(charset="ascii").invoke(app, ["show", "causal()", "--seqlen", "64"])
    assert found.exit_code == 2 and "this terminal writes ascii" in found.stderr and "--out" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("causl()", "--seqlen", "16"), "did you mean 'causal'"),
        (("causal()",), "--seqlen is missing"),
        (("causal()", "--seqlen", "16X"), "--seqlen='16X': must be a positive whole number"),
        (("causal()", "--seqlen", "0.3K"), "--seqlen='0.3K': must be a positive whole number"),
        (("causal()", "--seqlen", "16", "--ranks", "32"), "more ranks than tokens"),
        (("causal()", "--seqlen", "16", "--ranks", "8", "--ulysses", "3"), "does not divide the 8 ranks"),
        (("causal()", "--seqlen", "16", "--layout", "zigzg"), "did you mean 'zigzag'"),
        (("causal()", "--seqlen", "16", "--view", "lay"), "did you mean 'layout'"),
        (("causal()", "--seqlen", "16", "--heads", "8x2"), "--heads 8x2: must be query heads"),
        (("causal()", "--seqlen", "16", "--heads", "8,3,64"), "--heads 8,3,64: 8 heads over 3 KV heads"),
        (
            ("causal()", "--seqlen", "16", "--ulysses", "auto"),
            "--ulysses='auto' splits heads by cost: tell them with --heads",
        ),
        (("causal()", "--seqlen", "16", "--view", "mask", "--heads", "8,2,64"), "--view='mask' with --heads: shows no"),
        (("causal()", "--seqlen", "16", "--device", "H300"), "GB200; name the nearest\n"),
        (("causal()", "--seqlen", "16", "--kv-layout", "zag"), "--kv-layout='zag' is unknown"),
        (("documents([0, 5])", "--seqlen", "8"), "append 8"),
        (("causal()", "--seqlen", "16", "--out", "x.jpg"), "must end with one of"),
        (("causal()", "--seqlen", "99999G"), "must be at most"),
    ],
)
def test_the_command_refuses_in_one_line(arguments: tuple[str, ...], text: str) -> None:
    code, out, error = run(*arguments)
    assert code == 2 and text in error and len(error.splitlines()) == 1 and not out
