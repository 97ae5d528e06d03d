"""Transformers models over shards: loss, logits and every gradient of a single process, and a reason wherever that
cannot be kept."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

import ringattn
from ringattn.integrations.transformers import Ring, ShardingCollator, masks_of, register, shape_of, shard_batch
from ringattn.loss import IGNORED
from tests.support.hf_models import FAMILIES, VOCABULARY, WINDOW, build, configs

SEQLEN = 53
# Transformers takes the softmax and the loss of its own attention in fp32, whatever the model's dtype.
ROUNDING = 2e-6


def tokens(rows: int = 2, seqlen: int = SEQLEN, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, seqlen), generator=generator)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def single(model: nn.Module, **batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, logits and gradients of Transformers' own attention."""
    out = model(**batch, use_cache=False)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), gradients(model)


def sharded(
    config: Any, world_size: int, batch: dict[str, Tensor], count: int, masks: Any = None, layout: str = "auto"
) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """The same of every rank: its share of the loss, the whole logits, its part of the gradients."""
    models = [build(config) for _ in range(world_size)]
    seqlen = batch["input_ids"].shape[1]

    def one_rank(transport: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        cp = ringattn.ContextParallel(
            transport, seqlen, mask=masks_of(config) if masks is None else masks, layout=layout
        )
        model = models[transport.rank]
        register(cp, model)
        local = shard_batch(cp, batch)
        out = model(**local, use_cache=False, num_items_in_batch=count)
        out.loss.backward()
        whole = cp.replace(seqlen=int(local["cu_seq_lens_q"][-1]))
        logits = out.logits.detach()
        return out.loss.detach(), whole.unshard(logits) if whole.seqlen == seqlen else logits, gradients(model)

    return ringattn.Loopback(world_size).run(one_rank)


def check_equal(found: list[tuple[Tensor, Tensor, dict[str, Tensor]]], loss: Tensor, grads: dict[str, Tensor]) -> None:
    assert float(sum(share for share, _, _ in found)) == pytest.approx(float(loss), rel=ROUNDING)
    for name, expected in grads.items():
        total = sum(part[name] for _, _, part in found if name in part)
        assert isinstance(total, Tensor), name
        torch.testing.assert_close(total, expected, rtol=0, atol=ROUNDING * float(expected.abs().max()) + 1e-12)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_a_single_process(family: str, world_size: int) -> None:
    config, ids = configs()[family], tokens()
    loss, logits, grads = single(build(config), input_ids=ids, labels=ids)
    found = sharded(config, world_size, {"input_ids": ids, "labels": ids}, count=2 * (SEQLEN - 1))
    check_equal(found, loss, grads)
    for _, whole, _ in found:
        torch.testing.assert_close(whole, logits, rtol=0, atol=ROUNDING * float(logits.abs().max()))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": WINDOW + 1}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 8}),
        ("gemma3", {"layer_types": ["full_attention", "full_attention"]}),
        ("gpt-oss", {"layer_types": ["full_attention", "full_attention"]}),
    ],
)
def test_every_feature_of_the_models_shows(family: str, change: dict[str, Any]) -> None:
    """Were it dropped, the comparison above would fail."""
    config, ids = configs()[family], tokens()
    _, logits, _ = single(build(config), input_ids=ids, labels=ids)
    for name, value in change.items():
        setattr(config, name, value)
    _, without, _ = single(build(config), input_ids=ids, labels=ids)
    assert (without - logits).abs().max() > 1e3 * ROUNDING * logits.abs().max()


def test_a_stack_has_one_layout_and_the_masks_of_its_layers() -> None:
    config = configs()["gemma3"]
    assert masks_of(config) == (ringattn.causal(), ringattn.sliding_window(WINDOW - 1))
    assert masks_of(configs()["mistral"]) == (ringattn.sliding_window(WINDOW - 1),)
    assert masks_of(configs()["llama"]) == (ringattn.causal(),)
    base = ringattn.prefix_lm(9)
    assert masks_of(config, base)[0] == base
    assert masks_of(config, base)[1].area(SEQLEN, SEQLEN) < masks_of(config, base)[0].area(SEQLEN, SEQLEN)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt-oss", "deepseek-v3"])
def test_the_shape_of_a_models_calls_is_the_one_they_have(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = configs()[name], set()

    def noted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: object) -> object:
        found.add(ringattn.Shape(q.shape[2], k.shape[2], q.shape[3], v.shape[3], len(q), q.dtype))
        return ringattn.attention(q, k, v, **settings)

    monkeypatch.setattr("ringattn.integrations.transformers.attention.attention", noted)
    model = build(config)
    register(ringattn.ContextParallel(None, SEQLEN, mask=masks_of(config), shape=shape_of(config)), model)
    with torch.no_grad():
        model(input_ids=tokens(2), position_ids=torch.arange(SEQLEN)[None], use_cache=False)
    assert found == {shape_of(config, batch=2, dtype=torch.float64)}


def test_a_shape_of_what_has_none_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear: no one shape"):
        shape_of(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped", "balanced"])
def test_a_window_the_context_did_not_name_keeps_the_layout(layout: str) -> None:
    config, ids = configs()["gemma3"], tokens(1)
    loss, _, grads = single(build(config), input_ids=ids, labels=ids)
    found = sharded(config, 3, {"input_ids": ids, "labels": ids}, SEQLEN - 1, masks=ringattn.causal(), layout=layout)
    check_equal(found, loss, grads)


# -- documents and padding ------------------------------------------------------------------------

BOUNDS = (0, 11, 12, 30, SEQLEN)


def of_each_document(config: Any, ids: Tensor, bounds: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor], int]:
    """The truth: every document alone, summed over targets."""
    model, total, count = build(config), torch.tensor(0.0, dtype=torch.float64), 0
    for start, end in itertools.pairwise(bounds):
        if end - start > 1:
            part = ids[:, start:end]
            total = total + model(input_ids=part, labels=part, use_cache=False).loss * (end - start - 1)
            count += end - start - 1
    (total / count).backward()
    return (total / count).detach(), gradients(model), count


def told_by(how: str, ids: Tensor) -> dict[str, Tensor]:
    bounds = torch.tensor(BOUNDS)
    index = torch.searchsorted(bounds, torch.arange(SEQLEN), right=True) - 1
    position_ids = (torch.arange(SEQLEN) - bounds[index])[None]
    told = {
        "position_ids": {"position_ids": position_ids},
        "cu_seq_lens": {"cu_seq_lens_q": bounds.int(), "cu_seq_lens_k": bounds.int(), "position_ids": position_ids},
        "seq_idx": {"seq_idx": index[None].int()},
    }
    return {"input_ids": ids, "labels": ids, **told[how]}


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens", "seq_idx"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
def test_packed_documents_are_apart(family: str, how: str) -> None:
    config, ids = configs()[family], tokens(1)
    loss, grads, count = of_each_document(config, ids, BOUNDS)
    check_equal(sharded(config, 3, told_by(how, ids), count), loss, grads)
    together, _, _ = single(build(config), input_ids=ids, labels=ids)
    assert abs(float(together) - float(loss)) > 1e-3  # else nobody would notice


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_packed(side: str) -> None:
    config, ids, lengths = configs()["gemma2"], tokens(3), (SEQLEN, 20, 31)
    mask, labels = torch.zeros(3, SEQLEN, dtype=torch.int64), ids.clone()
    total, count, model = torch.tensor(0.0, dtype=torch.float64), sum(lengths) - 3, build(config)
    for row, length in enumerate(lengths):
        real = slice(0, length) if side == "right" else slice(SEQLEN - length, SEQLEN)
        mask[row, real] = 1
        part = ids[row : row + 1, real]
        total = total + model(input_ids=part, labels=part, use_cache=False).loss * (length - 1)
    (total / count).backward()
    labels[mask == 0] = IGNORED
    found = sharded(config, 2, {"input_ids": ids, "labels": labels, "attention_mask": mask}, count)
    check_equal(found, (total / count).detach(), gradients(model))


def call_on_ranks(config: Any, world_size: int, inputs: Callable[[Any], dict[str, Any]], **cp_args: Any) -> list[Any]:
    """What each rank's forward gives, or the exception it raises."""
    models = [build(config) for _ in range(world_size)]

    def one_rank(transport: Any) -> Any:
        cp = ringattn.ContextParallel(transport, SEQLEN, **cp_args)
        register(cp, models[transport.rank])
        try:
            return models[transport.rank](**inputs(cp), use_cache=False).logits.detach()
        except (ValueError, NotImplementedError) as error:
            return error

    return ringattn.Loopback(world_size).run(one_rank)


def test_padding_behind_the_rows_is_kept_when_the_whole_mask_tells_it() -> None:
    config, ids = configs()["llama"], tokens(2)
    mask = torch.ones(2, SEQLEN, dtype=torch.int64)
    mask[1, 40:] = 0
    expected = build(config)(input_ids=ids, attention_mask=mask, use_cache=False).logits.detach()

    def inputs(cp: ringattn.ContextParallel) -> dict[str, Any]:
        return {"input_ids": cp.shard(ids), "position_ids": cp.position_ids[None], "attention_mask": mask}

    found = call_on_ranks(config, 2, inputs, layout="contiguous")
    whole = torch.cat(found, dim=1)
    torch.testing.assert_close(whole[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-5)


def test_a_shard_of_ones_is_no_padding() -> None:
    def inputs(cp: ringattn.ContextParallel) -> dict[str, Any]:
        ones = torch.ones(1, cp.local_seqlen, dtype=torch.int64)
        return {"input_ids": cp.shard(tokens(1)), "position_ids": cp.position_ids[None], "attention_mask": ones}

    assert all(isinstance(logits, Tensor) for logits in call_on_ranks(configs()["llama"], 2, inputs))


# -- what is refused --------------------------------------------------------------------------------


def given(**changes: Callable[[ringattn.ContextParallel], Any]) -> Callable[[Any], dict[str, Any]]:
    def inputs(cp: ringattn.ContextParallel) -> dict[str, Any]:
        right = {"input_ids": cp.shard(tokens(1)), "position_ids": cp.position_ids[None]}
        changed = {name: value(cp) for name, value in changes.items()}
        return {name: value for name, value in {**right, **changed}.items() if value is not None}

    return inputs


REFUSED = {
    "missing position_ids": (given(position_ids=lambda cp: None), "pass position_ids=cp.position_ids"),
    "local position_ids": (
        given(position_ids=lambda cp: torch.arange(cp.local_seqlen)[None]),
        "count each shard from 0",
    ),
    "unknown documents": (given(position_ids=lambda cp: cp.position_ids[None] % 9), "cu_seq_lens_q"),
    "padding in shards": (
        given(attention_mask=lambda cp: (cp.position_ids < 40).long()[None]),
        "padding",
    ),
    "left padding": (
        given(attention_mask=lambda cp: (torch.arange(SEQLEN) > 4).long()[None]),
        "has padding .other.",
    ),
    "4-D mask": (
        given(attention_mask=lambda cp: torch.ones(1, 1, cp.local_seqlen, cp.local_seqlen, dtype=torch.bool)),
        "tensor of shape .1, 1, ",
    ),
    "bounds of one shard": (
        given(cu_seq_lens_q=lambda cp: torch.tensor([0, 5, cp.local_seqlen])),
        "shard every input with the context of its batch",
    ),
    "index of one shard": (
        given(seq_idx=lambda cp: torch.zeros(1, cp.local_seqlen)),
        "pass the bounds|Pass the bounds",
    ),
    "attention weights": (given(output_attentions=lambda cp: True), "output_attentions"),
    "position bias": (given(position_bias=lambda cp: torch.zeros(1)), "position_bias"),
    "unknown": (given(salience=lambda cp: torch.zeros(1)), "salience"),
}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_every_rank(case: str, layout: str) -> None:
    inputs, reason = REFUSED[case]
    found = call_on_ranks(configs()["llama"], 2, inputs, layout=layout)
    for error in found:
        assert isinstance(error, (ValueError, NotImplementedError)), error
        assert "llama" in str(error).lower()
    with pytest.raises((ValueError, NotImplementedError), match=reason):
        raise found[-1]


def test_generate_is_refused_with_the_remedy() -> None:
    config = configs()["llama"]
    model = build(config).eval()
    register(ringattn.ContextParallel(None, 9), model)
    with pytest.raises(NotImplementedError, match=r"[Ll]lama.*set_attn_implementation\('sdpa'\)"):
        model.generate(tokens(1, 9), max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    assert model.generate(tokens(1, 9), max_new_tokens=3, do_sample=False).shape == (1, 12)  # type: ignore[operator]


def test_layers_that_are_no_attention_are_refused() -> None:
    config = configs()["gemma3"]
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(NotImplementedError, match="linear_attention"):
        masks_of(config)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_depend_on_the_length_are_refused(kind: str) -> None:
    """Transformers would take the length of the shard."""
    config = configs()["llama"]
    config.rope_parameters = {"full_attention": {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}}
    with pytest.raises(NotImplementedError, match=f"rope_type '{kind}'.*fixed angles"):
        masks_of(config)
    config = configs()["llama"]
    config.max_position_embeddings = 16
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = build(config)
    register(ringattn.ContextParallel(None, SEQLEN), model)
    with pytest.raises(NotImplementedError, match="rope_type 'dynamic'"):
        model(input_ids=tokens(1), position_ids=torch.arange(SEQLEN)[None], use_cache=False)


def test_a_window_of_zero_is_none() -> None:
    """As configs of Qwen 2 say it."""
    config = configs()["mistral"]
    config.sliding_window = 0
    model, ids = build(config), tokens(1)
    config.sliding_window = None
    expected = build(config)(input_ids=ids, use_cache=False).logits
    register(ringattn.ContextParallel(None, SEQLEN), model)
    found = model(input_ids=ids, position_ids=torch.arange(SEQLEN)[None], use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_bidirectional_layer_wants_a_context_that_is_not_causal() -> None:
    config = configs()["llama"]
    config.is_causal = False
    found = call_on_ranks(config, 2, given())
    assert all("mask=ringattn.full()" in str(error) for error in found)
    logits = call_on_ranks(config, 2, given(), mask=ringattn.full(), layout="contiguous")
    expected = build(config)(input_ids=tokens(1), use_cache=False).logits.detach()
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("mask", [ringattn.full(), ringattn.prefix_lm(5)], ids=str)
def test_a_context_that_lets_causal_layers_see_later_tokens_says_so(mask: ringattn.Mask) -> None:
    model, ids = build(configs()["llama"]), tokens(1)
    register(ringattn.ContextParallel(None, SEQLEN, mask=mask), model)
    at = torch.arange(SEQLEN)[None]
    with pytest.warns(UserWarning, match="is causal, but the context's mask.*masks_of") as seen:
        for _ in range(2):
            model(input_ids=ids, position_ids=at, use_cache=False)
    assert len(seen) == 1, "once, not for every layer and call"


def test_a_mask_that_is_not_known_is_refused_by_name() -> None:
    config = configs()["gemma3"]
    config.use_bidirectional_attention = True  # which this family makes of functions of its own
    for error in call_on_ranks(config, 2, given()):
        assert isinstance(error, NotImplementedError) and "gemma3" in str(error) and "or_masks" in str(error)


def test_labels_that_would_be_shifted_within_a_shard_are_refused() -> None:
    def one_rank(transport: Any) -> str:
        cp, model = ringattn.ContextParallel(transport, SEQLEN), build(configs()["llama"])
        register(cp, model)
        register(cp, model)  # again, for another batch
        assert len(model._forward_pre_hooks) == 1
        ids = cp.shard(tokens(1))
        with pytest.raises(ValueError) as caught:
            model(input_ids=ids, labels=ids, position_ids=cp.position_ids[None], use_cache=False)
        return str(caught.value)

    for said in ringattn.Loopback(2).run(one_rank):
        assert "labels without shift_labels" in said and "shard_batch(cp, batch)" in said
    with pytest.raises(ValueError, match="the context comes first"):
        register(build(configs()["llama"]), ringattn.ContextParallel(None, SEQLEN))  # type: ignore[arg-type]


def test_names_that_transformers_would_misread_are_refused() -> None:
    cp = ringattn.ContextParallel(None, 9)
    for name in ("ring_flash", "my-sdpa", "hub/ring"):
        with pytest.raises(ValueError, match="name it 'ringattn'"):
            register(cp, name=name)
    with pytest.raises(ValueError, match="choose another"):
        register(cp, name="paged|eager")
    with pytest.raises(ValueError, match="name first the mask of a layer"):
        Ring(ringattn.ContextParallel(None, 9, mask=(ringattn.sliding_window(2), ringattn.causal())))


@pytest.mark.parametrize(
    "setup", ["sys.modules['transformers'] = None", pytest.param("hide_version()", marks=pytest.mark.slow)]
)
def test_a_missing_package_names_the_extra(setup: str) -> None:
    code = f"""
import sys, importlib.metadata as metadata
def hide_version():
    found = metadata.version
    def version(name):
        if name == "transformers": raise metadata.PackageNotFoundError(name)
        return found(name)
    metadata.version = version
{setup}
try:
    import ringattn.integrations.transformers
except ImportError as error:
    assert "ringattn[hf]" in str(error) or "work" in str(error), error
else:
    sys.exit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# -- several models, several batches ----------------------------------------------------------------


def test_two_models_with_different_contexts_do_not_disturb_each_other() -> None:
    first, second = configs()["llama"], configs()["mistral"]
    alone = [build(c)(input_ids=tokens(1, n), use_cache=False).logits for c, n in ((first, SEQLEN), (second, 31))]
    models = [(build(first), build(second)) for _ in range(2)]

    def one_rank(transport: Any) -> list[Tensor]:
        a = ringattn.ContextParallel(transport, SEQLEN, layout="zigzag")
        b = ringattn.ContextParallel(transport, 31, mask=masks_of(second), layout="striped")
        pair = models[transport.rank]
        for cp, model in zip((a, b), pair, strict=True):
            register(cp, model)
        return [
            cp.unshard(m(input_ids=cp.shard(tokens(1, n)), position_ids=cp.position_ids[None], use_cache=False).logits)
            for cp, m, n in ((a, pair[0], SEQLEN), (b, pair[1], 31), (a, pair[0], SEQLEN))
        ]

    for rank in ringattn.Loopback(2).run(one_rank):
        for found, expected in zip(rank, (*alone, alone[0]), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_a_ring_takes_the_next_context() -> None:
    config = configs()["llama"]
    ring = register(ringattn.ContextParallel(None, SEQLEN), model := build(config))
    batch = {"input_ids": tokens(1), "use_cache": False}
    before = model(**batch).logits
    ring.use(ring.cp.replace(mask=ringattn.sliding_window(3)))
    assert not torch.allclose(model(**batch).logits, before)


@pytest.mark.parametrize(("world", "ulysses"), [(2, 1), (4, 2)])
def test_a_collator_works_without_the_group(world: int, ulysses: int) -> None:
    import pickle

    samples = [{"input_ids": row, "labels": row} for row in tokens(3)]

    def one_rank(transport: Any) -> dict[str, Tensor]:
        cp = ringattn.ContextParallel(transport, SEQLEN, layout="zigzag", ulysses=ulysses)
        collator = pickle.loads(pickle.dumps(ShardingCollator(cp)))
        batch, expected = collator(samples), cp.shard(tokens(3))
        assert torch.equal(batch["input_ids"], expected)
        assert torch.equal(batch["position_ids"][0], cp.position_ids)
        return batch

    parts = ringattn.Loopback(world).run(one_rank)
    labels = torch.cat([part["shift_labels"] for part in parts], 1)
    assert (labels == IGNORED).sum() == 3  # one a row, however many shards
    assert sum(p["input_ids"].shape[1] for p in parts) == SEQLEN


def test_a_model_that_attends_by_itself_is_refused() -> None:
    def attend_alone(transport: Any) -> str:
        config = OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512)
        model, cp = OpenAIGPTLMHeadModel(config), ringattn.ContextParallel(transport, SEQLEN)
        register(cp, model)
        with pytest.raises(NotImplementedError) as caught:
            model(**shard_batch(cp, {"input_ids": tokens()}))
        return str(caught.value)

    assert all("computes its attention itself" in text for text in ringattn.Loopback(2).run(attend_alone))


def test_a_model_may_be_given_another_attention_before_its_first_forward() -> None:
    model, cp = build(configs()["llama"]), ringattn.ContextParallel(None, SEQLEN)
    register(cp, model)
    model.set_attn_implementation("sdpa")
    assert model(input_ids=tokens()).logits.isfinite().all()
    model.set_attn_implementation("ringattn")
    model(**shard_batch(cp, {"input_ids": tokens()}))


def test_a_model_may_be_registered_again_before_its_first_forward() -> None:
    model, cp = build(configs()["llama"]), ringattn.ContextParallel(None, SEQLEN)
    register(cp, model)
    ring = register(ringattn.ContextParallel(None, SEQLEN), model)
    model(**shard_batch(cp, {"input_ids": tokens()}))
    assert ring.asked
