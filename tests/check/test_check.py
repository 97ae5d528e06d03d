"""`ringattn check`: right models pass, and each planted fault is found and named in words."""

import functools
import itertools
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ringattn
from ringattn.check import CheckError, Settings, check
from ringattn.check.gradients import compare_gradients
from ringattn.check.influence import compare_influence, reach
from ringattn.check.measure import assemble
from ringattn.check.observe import observe_sharded, observe_single
from ringattn.check.processes import run_processes
from ringattn.check.subject import settle_weights, stack_of
from tests.support import planted
from tests.support.grids import mostly_slow

SUBJECTS = "tests.support.planted"
INFLUENCE = {"documents stay apart", "no future tokens", "reach of the masks", "no lost context"}
QUESTIONS = INFLUENCE | {"masks of the layers", "outputs", "layers of the step", "loss", "gradients"}


@functools.cache  # a report is the same for all that read it
def report(name, **settings):
    return check(Settings(f"{SUBJECTS}:{name}", timeout=60.0, **settings))


def failed(found):
    return {f.question for f in found.findings if not f.ok}


# -- right models ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("correct", {}),
        ("own_right", {"ranks": 3, "seqlen": 61, "documents": 2, "batch": 2, "layout": "zigzag"}),
        ("windowed", {"documents": 1}),
        ("short_sighted", {"ranks": 4, "seqlen": 63, "layout": "striped"}),
        ("correct", {"dtype": "float32"}),
        pytest.param("correct", {"ulysses": 2}, marks=pytest.mark.slow),
    ],
)
def test_right_models_pass(name, settings):
    found = report(name, **settings)
    assert found.ok, str(found)
    assert {f.question for f in found.findings} == QUESTIONS


@pytest.mark.parametrize(
    ("name", "documents"),
    [
        ("mistral", 3),
        ("registered", 3),
        pytest.param("registered", 1, marks=pytest.mark.slow),
        pytest.param("llama", 1, marks=pytest.mark.slow),
        pytest.param("llama", 3, marks=pytest.mark.slow),
        pytest.param("mistral", 1, marks=pytest.mark.slow),
        pytest.param("qwen3", 1, marks=pytest.mark.slow),
        pytest.param("qwen3", 3, marks=pytest.mark.slow),
        pytest.param("gpt_oss", 1, marks=pytest.mark.slow),
        pytest.param("gpt_oss", 3, marks=pytest.mark.slow),
    ],
)
def test_right_hugging_face_models_pass(name, documents):
    pytest.importorskip("transformers")
    found = report(name, documents=documents)
    assert found.ok, str(found)
    assert found.reference == "Transformers' own attention"


# -- planted faults: what fails, no more, and the words -----------------------------------------

MASKS, APART = "masks of the layers", "documents stay apart"
REST = {"outputs", "layers of the step", "loss", "gradients"}
FAULTS = [
    ("dropped_window", {}, {"reach of the masks", MASKS}, "reach of the masks", "ignores its window"),
    ("dropped_window_of_one", {}, {MASKS}, MASKS, "pass attention(mask=) of that layer"),
    ("three_layers", {}, {MASKS}, MASKS, "holds each mask once"),
    (
        "ignored_documents",
        {},
        {"documents stay apart", MASKS},
        "documents stay apart",
        "does not know of the documents",
    ),
    ("zero_output", {}, {APART, MASKS}, APART, "does not know of the documents"),
    ("ignored_causality", {}, {"no future tokens", MASKS}, "no future tokens", "tokens to come"),
    ("cut_ring", {"documents": 1}, {"no lost context", *REST}, "no lost context", "the ring is cut"),
    ("local_positions", {}, REST, "layers of the step", "positions restart at 0"),
    ("local_positions", {"layout": "striped"}, REST, "layers of the step", "positions restart at 0"),
    ("step_positions", {}, REST - {"outputs"}, "layers of the step", "restart at 0 on rank 1"),
    ("shift_in_shard", {"documents": 1}, REST, "layers of the step", "where shards meet"),
    ("late_labels", {}, {"loss", "gradients"}, "loss", "shifted after they were sharded"),
    ("mean_of_means", {}, {"loss", "gradients"}, "loss", "a mean over each rank's own targets"),
    ("share_reported", {}, {"loss"}, "loss", "sum it over the ranks"),
    ("doubled", {}, {"gradients"}, "gradients", "divide by 2"),
    ("averaged", {}, {"gradients"}, "gradients", "averaged over the 2 ranks"),
    ("odd_factor", {}, {"gradients"}, "gradients", "look for a factor"),
    ("unreduced_head", {}, {"gradients"}, "gradients", "sum them after backward"),
    ("unreduced", {}, {"gradients"}, "gradients", "sum them after backward"),
    ("detached", {}, {"gradients"}, "gradients", "backward is not"),
]
FIRST = list({fault[3]: fault for fault in reversed(FAULTS)}.values())  # of each question


@pytest.mark.parametrize("fault", mostly_slow(FAULTS, FIRST), ids=lambda fault: f"{fault[3]}-{fault[0]}")
def test_faults_are_found_and_named(fault):
    name, settings, fails, question, words = fault
    found = report(name, **settings)
    assert failed(found) == fails, str(found)
    assert words in found[question].remedy


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("doubled", "all gradients are 2.000x"),
        ("odd_factor", "all gradients are 1.700x"),
        ("unreduced_head", "gradients of decoder.head.weight are not summed"),
        ("detached", "gradients of decoder.embedding.weight differ"),
    ],
)
def test_gradients_are_named_and_their_factor(name, what):
    assert what in report(name)["gradients"].what


def test_the_first_layer_is_named_and_the_last_that_agrees():
    what = report("local_positions")["layers of the step"].what
    assert what.startswith("decoder.layers.0.output differs")
    assert what.endswith("the first after decoder.layers.0.qkv, which agrees")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layer", "words"),
    [
        ("qwen3_dropped_window", "model.layers.0.self_attn.o_proj", "ignores its own mask"),
        ("llama_without_positions", "model.rotary_emb", "no position ids"),
    ],
)
def test_hugging_face_faults_are_named(name, layer, words):
    pytest.importorskip("transformers")
    found = report(name)["layers of the step"]
    assert found.what.startswith(layer)
    assert words in found.remedy


# -- what cannot be run -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises_on_one", "this rank is out of luck"),
        ("dies_on_one", "rank 1 of 2: the process died"),
        ("not_a_model", "must be an nn.Module"),
        ("unstated_mask", r"^mask sliding_window\(\d+, 0\) is not one of.*documents.*\)\)\. .*make\.masks = \["),
        ("nosuch", f"^--model {SUBJECTS}:nosuch: {SUBJECTS} has no function 'nosuch'"),
    ],
)
def test_a_failing_rank_is_told_and_nothing_is_left(name, words):
    with pytest.raises(CheckError, match=words):
        report(name)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_waiting_rank_ends_at_the_deadline():
    with pytest.raises(CheckError, match=r"of 2: no answer within 6 s.*--timeout"):
        check(Settings(f"{SUBJECTS}:waits_on_one", timeout=6.0))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "planted"}, {"ranks": 1}, {"documents": 0}, {"batch": 0}, {"vocab": 1}, {"seqlen": 11},
        {"dtype": "bfloat16"}, {"timeout": 0.0}, {"layout": "zigzg"},
    ],
)  # fmt: skip
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=f"--{next(iter(wrong))}.*must|choose|did you mean"):
        Settings(**{"model": f"{SUBJECTS}:correct", **wrong})


@pytest.mark.parametrize(
    ("name", "code"),
    [
        pytest.param("correct", 0, marks=pytest.mark.slow),
        pytest.param("ignored_documents", 1, marks=pytest.mark.slow),
        ("not_a_model", 2),
    ],
)
def test_exit_codes(name, code):
    pytest.importorskip("typer")
    root = Path(__file__).parents[2]
    path = os.pathsep.join((str(root), os.environ.get("PYTHONPATH", "")))
    run = subprocess.run(
        [sys.executable, "-m", "ringattn.cli", "check", "--model", f"{SUBJECTS}:{name}"],
        cwd=root, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert run.returncode == code, run.stdout + run.stderr
    assert {0: "agree", 1: "does not know of the documents", 2: "must be an nn.Module"}[code] in " ".join(
        run.stdout.split()
    )


# -- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_reach_of_a_stack_of_windows_is_their_sum(layers):
    window = ringattn.sliding_window(4).dense(30, 30)
    assert torch.equal(reach([window] * layers, True), ringattn.sliding_window(4 * layers).dense(30, 30))


def test_reach_of_one_mask_for_all_layers_is_its_closure():
    window = ringattn.sliding_window(4) & ringattn.documents([0, 13, 30])
    expected = ringattn.causal() & ringattn.documents([0, 13, 30])
    assert torch.equal(reach([window.dense(30, 30)], False), expected.dense(30, 30))


@pytest.mark.parametrize("seqlen", [24, 96, 101])
@pytest.mark.parametrize("documents", [1, 2, 3, 5])
def test_documents_cover_the_row_unevenly(seqlen, documents):
    bounds = Settings("a:b", seqlen=seqlen, documents=documents).cu_seqlens
    assert bounds[0] == 0 and bounds[-1] == seqlen and len(bounds) == documents + 1
    assert min(b - a for a, b in itertools.pairwise(bounds)) >= 1


def test_assemble_finds_the_dim_of_the_tokens():
    whole = torch.randn(2, 3, 5, dtype=torch.float64)
    at = [torch.tensor([0, 4, 2]), torch.tensor([3, 1])]
    assert torch.equal(assemble([whole[..., a] for a in at], at, whole), whole)
    assert assemble([whole, whole], at, whole) is None


def test_memory_that_nobody_initialised_gets_numbers():
    model = torch.nn.Linear(3, 3)
    with torch.no_grad():
        model.weight[0], model.weight[1] = torch.nan, 1e30
    settle_weights(model, 0)
    assert model.weight.abs().max() < 10


def test_masks_are_those_that_the_factory_states():
    assert stack_of(planted.windowed, torch.nn.Linear(2, 2)).masks == tuple(planted.windowed.masks)
    assert stack_of(planted.correct, torch.nn.Linear(2, 2)).masks == (ringattn.causal(),)


@pytest.fixture(scope="module")
def seen():
    """Settings, truth and views of a right model on three ranks."""
    settings = Settings(f"{SUBJECTS}:correct", ranks=3, seqlen=60)
    (truth,) = run_processes(observe_single, 1, settings, timeout=60.0)
    views = run_processes(observe_sharded, 3, settings, truth.stack, truth.vocab, truth.weights, timeout=60.0)
    return settings, truth, views


def test_every_rank_s_gradient_is_compared(seen):
    settings, truth, views = seen
    assert compare_gradients(settings, truth, views, False).ok
    for rank, view in enumerate(views):
        step = view.step
        for name, grad in step.gradients.items():
            off = replace(view, step=replace(step, gradients={**step.gradients, name: grad * (1 + 1e-8)}))
            found = compare_gradients(settings, truth, [*views[:rank], off, *views[rank + 1 :]], False)
            assert not found.ok and name in found.what


def test_a_leak_of_one_pair_is_seen(seen):
    settings, truth, views = seen
    view = views[0]
    first, last = view.positions.argmin(), len(settings.probes) - 1
    moved = view.moved.clone()
    assert moved[last, first] == 0
    moved[last, first] = 1e-10
    found = compare_influence(settings, truth, [replace(view, moved=moved), *views[1:]])
    assert [f.ok for f in found] == [False, True, True, True]


def test_a_run_in_which_no_rank_needs_another_does_not_pass(seen):
    settings, truth, views = seen
    still = replace(truth, view=replace(truth.view, moved=torch.zeros_like(truth.view.moved)))
    found = compare_influence(settings, still, views)[-1]
    assert not found.ok and "--layout zigzag" in found.remedy


@pytest.mark.slow
def test_heads_are_split_as_asked():
    with pytest.raises(CheckError, match="ulysses"):
        report("correct", ranks=5, ulysses=5)  # of a model with four heads
