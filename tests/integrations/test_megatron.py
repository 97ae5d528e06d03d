"""Megatron-Core's layers with attention over its context-parallel group: the order of its batches, a model's loss and
gradients on data x context ranks, windows, offsets of the softmax, packed sequences, dropout, and what is refused."""

import importlib.util
import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ringattn
from ringattn.testing import dense_attention, run_processes

absent = importlib.util.find_spec("megatron") is None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(absent, reason="needs Megatron-Core: pip install 'ringattn[megatron]'"),
]

VOCABULARY, SEQLEN, HEADS, GROUPS, DIM = 61, 24, 4, 2, 8
PACKED, SIZES = [0, 8, 24, 32], (5, 16, 6)  # packed sequences with their padding, and without
ROUNDING = 2e-6  # of fp32


def begin(context: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what else it would use
        from megatron.core import parallel_state
    parallel_state.initialize_model_parallel(context_parallel_size=context)


def config_of(**changes: Any) -> Any:
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    ranks = parallel_state.get_context_parallel_world_size()
    told = dict(
        num_layers=2, hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_query_groups=GROUPS,
        attention_dropout=0.0, hidden_dropout=0.0, context_parallel_size=ranks, use_cpu_initialization=True,
        bias_dropout_fusion=False, gradient_accumulation_fusion=False,
    )  # fmt: skip
    return TransformerConfig(**told | changes)


def model_of(**changes: Any) -> nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from ringattn.integrations.megatron import RingAttention

    layer = get_gpt_layer_local_spec()
    layer.submodules.self_attention.submodules.core_attention = RingAttention
    torch.manual_seed(0)
    config = config_of(**changes)
    return GPTModel(config, layer, VOCABULARY, SEQLEN, position_embedding_type="learned_absolute")  # rotary wants a GPU


def one_step(rank: int, world: int, context: int) -> tuple[float, dict[str, Tensor], list[int], list[int]]:
    """Loss and gradients of a batch with a row for each replica, and which positions Megatron and ringattn give."""
    begin(context)
    from megatron.core.utils import get_batch_on_this_cp_rank

    from ringattn.integrations.megatron import paired_chunks

    model = model_of(window_size=(6, 0), window_attn_skip_freq=2, softmax_type="learnable")
    tokens = torch.randint(0, VOCABULARY, (2, SEQLEN), generator=torch.Generator().manual_seed(1))
    replicas = world // context
    rows = slice(rank // context, None, replicas)
    places = torch.arange(SEQLEN).expand(2, -1)
    whole = {"tokens": tokens[rows], "labels": tokens.roll(-1, 1)[rows], "places": places[rows]}
    batch = get_batch_on_this_cp_rank(whole)
    loss = model(batch["tokens"], batch["places"], None, labels=batch["labels"]).sum() / tokens.numel()
    loss.backward()
    total = loss.detach()
    for shared in (total, *(p.grad for p in model.parameters())):
        dist.all_reduce(shared)
    ours = paired_chunks([0, SEQLEN], context).frame(rank % context).positions()
    return float(total), {n: p.grad for n, p in model.named_parameters()}, batch["places"][0].tolist(), ours.tolist()


@pytest.mark.parametrize("data", [1, 2])
def test_a_model_equals_one_process(data: int) -> None:
    (expected,) = run_processes(one_step, 1, 1)
    for loss, grads, theirs, ours in run_processes(one_step, 2 * data, 2):
        assert theirs == ours and len(ours) == SEQLEN // 2
        assert loss == pytest.approx(expected[0], rel=ROUNDING)
        for name, grad in expected[1].items():
            bound = ROUNDING * float(grad.abs().max()) + 1e-9
            torch.testing.assert_close(grads[name], grad, rtol=0, atol=bound)
    assert any("softmax_offset" in name for name in expected[1])


# -- the module alone, in fp64 ----------------------------------------------------------------------------


def module_of(kind: str = "causal", layer: int = 1, **changes: Any) -> Any:
    """As an attention layer of Megatron builds it."""
    from megatron.core.transformer.enums import AttnMaskType

    from ringattn.integrations.megatron import RingAttention

    told = {name: changes.pop(name) for name in ("softmax_scale", "cp_comm_type", "attention_type") if name in changes}
    given = {"cp_comm_type": None, "softmax_scale": None, "attention_type": "self", **told, "pg_collection": None}
    module = RingAttention(
        config=config_of(**changes), layer_number=layer, attn_mask_type=AttnMaskType[kind], **given
    )  # fmt: skip
    return module.train()


def qkv(seqlen: int) -> list[Tensor]:
    """Whole tensors `[seqlen, 2, heads, head_dim]`, the same on all ranks."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(seqlen, 2, heads, DIM) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes]


def own_rows(bounds: list[int], rank: int, world: int) -> Tensor:
    """Which tokens a rank holds of sequences between bounds, by what Megatron's rotary embedding takes them for."""
    from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

    rows = torch.arange(bounds[-1])
    local = [
        _get_thd_freqs_on_this_cp_rank(rank, world, rows[: (b - a) // world], rows[a:b])
        for a, b in itertools.pairwise(bounds)
    ]
    return torch.cat(local)


def differs(module: Any, mask: Tensor, bounds: list[int], packed: Any = None, scale: float | None = None) -> float:
    """The largest difference to dense attention of this rank's outputs and of its gradients."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows, inputs = own_rows(bounds, rank, world), qkv(bounds[-1])
    counted = torch.ones(bounds[-1], dtype=torch.bool)
    if packed is not None:  # one batch row, and padding has no loss
        counted = torch.cat(
            [torch.arange(b - a) < n for (a, b), n in zip(itertools.pairwise(bounds), SIZES, strict=True)]
        )
    local = [x.detach()[rows].requires_grad_() for x in inputs]
    given = [x[:, 0] for x in local] if packed is not None else local
    out = module(*given, None, packed_seq_params=packed)
    out = out.view(len(rows), -1, HEADS, DIM)
    whole, _ = dense_attention(*(x.transpose(0, 1)[: out.size(1)] for x in inputs), mask, scale)
    whole = whole.transpose(0, 1)
    weight = torch.sin(torch.arange(whole.numel())).view_as(whole) * counted[:, None, None, None]
    (whole * weight).sum().backward()
    (out * weight[rows]).sum().backward()
    pairs = [(out * counted[rows, None, None, None], (whole * counted[:, None, None, None])[rows])]
    pairs += [(x.grad, y.grad[rows]) for x, y in zip(local, inputs, strict=True)]
    return max(float((a - b).abs().max()) for a, b in pairs)


def attended(rank: int, world: int) -> dict[str, float]:
    begin(world)
    from megatron.core.packed_seq_params import PackedSeqParams

    whole, near = [0, SEQLEN], ringattn.causal() & ringattn.sliding_window(5, 0)
    plain, window = ringattn.causal().dense(SEQLEN, SEQLEN), near.dense(SEQLEN, SEQLEN)
    cu, held = torch.tensor(list(itertools.accumulate(SIZES, initial=0))), torch.tensor(PACKED)
    packed = PackedSeqParams("thd", cu, cu, held, held)
    documents = ringattn.documents(sorted({*PACKED, *(a + n for a, n in zip(PACKED, SIZES, strict=False))}))
    last = PACKED[-1]
    return {
        "causal": differs(module_of(), plain, whole),
        "gather": differs(module_of(cp_comm_type="all_gather"), plain, whole),
        "scale": differs(module_of(softmax_scale=0.7), plain, whole, scale=0.7),
        "window": differs(module_of(window_size=(5, 0)), window, whole),
        "full": differs(module_of("no_mask"), torch.ones_like(plain), whole),
        "packed": differs(module_of(), (ringattn.causal() & documents).dense(last, last), PACKED, packed),
        "packed full": differs(module_of("padding"), documents.dense(last, last), PACKED, packed),
        "off by one": off_by_one(),
        "dropout": dropped(),
    }


def off_by_one() -> float:
    """The difference to the output without an offset, each row smaller by the part that the offset takes."""
    inputs = [x.detach()[own_rows([0, SEQLEN], dist.get_rank(), dist.get_world_size())] for x in qkv(SEQLEN)]
    whole = [x.detach().transpose(0, 1) for x in qkv(SEQLEN)]
    out, lse = dense_attention(*whole, ringattn.causal().dense(SEQLEN, SEQLEN))
    expected = (out * torch.sigmoid(lse).transpose(1, 2)[..., None]).transpose(0, 1).flatten(-2)
    rows = own_rows([0, SEQLEN], dist.get_rank(), dist.get_world_size())
    found = module_of(softmax_type="off-by-one", params_dtype=torch.float64)(*inputs, None)
    return float((found - expected[rows]).abs().max())


def dropped() -> float:
    """The difference between two calls with one seed; another seed and another layer drop otherwise."""
    inputs = [x.detach()[own_rows([0, SEQLEN], dist.get_rank(), dist.get_world_size())] for x in qkv(SEQLEN)]
    module, other = module_of(attention_dropout=0.5), module_of(layer=2, attention_dropout=0.5)
    module.seed = other.seed = 3
    first, again, elsewhere = module(*inputs, None), module(*inputs, None), other(*inputs, None)
    module.seed = 4
    assert not torch.equal(first, module(*inputs, None)) and not torch.equal(first, elsewhere)
    assert not torch.equal(first, module.eval()(*inputs, None))
    return float((first - again).abs().max())


@pytest.mark.parametrize("world", [2])
def test_a_layer_attends_as_dense_attention_does(world: int) -> None:
    for found in run_processes(attended, world):
        assert found == pytest.approx(dict.fromkeys(found, 0.0), abs=1e-12) and found["dropout"] == 0.0


def refusals(rank: int, world: int) -> list[str]:
    begin(world)
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    found = []
    inputs = [x.detach()[: SEQLEN // world] for x in qkv(SEQLEN)]
    mask = torch.ones(1, 1, SEQLEN, SEQLEN, dtype=torch.bool)
    packed = PackedSeqParams("thd", torch.tensor([0, 5, SEQLEN]), torch.tensor([0, 5, SEQLEN]))
    elsewhere = PackedSeqParams("sbhd", cp_group=dist.group.WORLD)
    calls: list[Any] = [
        lambda: module_of(attention_type="cross"),
        lambda: module_of(cp_comm_type="a2a"),
        lambda: module_of(qk_clip=True),
        lambda: module_of()(*inputs, mask),
        lambda: module_of()(*inputs, None, AttnMaskType.arbitrary),
        lambda: module_of()(*inputs, None, attention_bias=mask),
        lambda: module_of()(inputs[0], *(x[:3] for x in inputs[1:]), None),
        lambda: module_of()(*inputs, None, packed_seq_params=elsewhere),
        lambda: module_of()(*inputs, None, packed_seq_params=packed),
        lambda: module_of()(*(x[:, 0] for x in inputs), None, packed_seq_params=packed),
        lambda: module_of()(*(x[:5] for x in inputs), None),
        lambda: module_of(attention_dropout=0.1)(*inputs, None),
    ]
    for call in calls:
        with pytest.raises((NotImplementedError, ValueError)) as caught:
            call()
        found.append(str(caught.value))
    return found


def test_what_would_not_be_kept_is_refused() -> None:
    texts = [
        "attention_type=cross", "cp_comm_type=a2a", "qk_clip=True", "attention_mask (1, 1, 24, 24)",
        "attn_mask_type=AttnMaskType.arbitrary", "attention_bias (1, 1, 24, 24)", "12 queries and 3 keys", "cp_group",
        "thd has 3", "a sequence of 5 tokens over 2 ranks: must be a multiple of 4", "a sequence of 10 tokens",
        "attention_dropout=0.1 without a seed",
    ]  # fmt: skip
    for found in run_processes(refusals, 2):
        assert [text for text, expected in zip(found, texts, strict=True) if expected not in text] == []
