"""Positions that a batch brings along: kept, sharded like its tokens, and borders only where they start again."""

import copy
import time

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
)

import ringattn as ra
from ringattn.integrations.transformers import ShardingCollator, masks_of, register, shard_batch
from ringattn.integrations.transformers.ring import batch_context
from ringattn.testing import run_processes

S = 8
POSITIONS = {
    "an offset": [[*range(5, 13)]],
    "a gap": [[0, 1, 2, 3, 10, 11, 12, 13]],
    "a restart": [[0, 1, 2, 0, 1, 2, 3, 4]],
    "rows of their own": [[*range(8)], [0, 1, 2, 0, 1, 2, 3, 4]],
}
SEEN = {"an offset": [0] * 8, "a gap": [0] * 8, "a restart": [0, 0, 0, 1, 1, 1, 1, 1]}  # the document of each token


def models() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
    llama = LlamaConfig(**sizes, num_key_value_heads=1, intermediate_size=16)
    gpt2 = GPT2Config(**sizes, n_positions=32, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    return [AutoModelForCausalLM.from_config(config).double() for config in (llama, gpt2)]


def documents_of(case: str) -> torch.Tensor:
    rows = [[0] * 8, SEEN["a restart"]] if case == "rows of their own" else [SEEN[case]]
    return torch.tensor(rows)


def expected(model: torch.nn.Module, ids: torch.Tensor, case: str) -> torch.Tensor:
    """Transformers' own attention under the mask of the documents, position by position."""
    apart = documents_of(case)
    seen = (apart[:, None, :, None] == apart[:, None, None, :]) & torch.ones(S, S, dtype=torch.bool).tril()
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    return model(input_ids=ids, position_ids=torch.tensor(POSITIONS[case]), attention_mask=bias).logits.detach()


def logits(rank: int, world: int, device: str = "cpu") -> dict[tuple[int, str], float]:
    """The largest difference from Transformers' own."""
    import torch.distributed as dist

    found = {}
    for number, model in enumerate(models()):
        cp = ra.ContextParallel(dist.group.WORLD if world > 1 else None, S)
        for case, positions in POSITIONS.items():
            ids = torch.randint(0, 64, (len(positions), S), generator=torch.Generator().manual_seed(1))
            right = expected(model.cpu(), ids, case)
            register(cp, model.to(device))
            batch = shard_batch(cp, {"input_ids": ids, "position_ids": torch.tensor(positions)})
            context = batch_context(cp, batch["cu_seq_lens_q"].tolist())
            batch = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
            out = model(**batch, use_cache=False).logits.detach().cpu()
            whole = context.unshard(out)
            found[number, case] = float((whole.reshape(right.shape) - right).abs().max())
    return found


def test_given_positions_are_kept() -> None:
    for world in (1, 2, 3):
        for found in run_processes(logits, world):
            assert max(found.values()) < 1e-5, (world, found)


@pytest.mark.gpu
def test_given_positions_are_kept_on_a_gpu() -> None:
    assert max(logits(0, 1, "cuda").values()) < 1e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_restarts_are_seen_in_every_batch(device: str) -> None:
    model = models()[0].to(device)
    register(ra.ContextParallel(None, S), model)
    ids = torch.zeros(2, S, dtype=torch.int64, device=device)
    for case in ("an offset", "an offset", "rows of their own"):
        positions = torch.tensor(POSITIONS[case], device=device).expand(2, -1)
        if case == "an offset":
            model(input_ids=ids, position_ids=positions, use_cache=False)
        else:
            with pytest.raises(ValueError, match="pack them"):
                model(input_ids=ids, position_ids=positions, use_cache=False)


def test_rows_with_documents_of_their_own_are_refused_on_one_rank() -> None:
    model = models()[0]
    register(ra.ContextParallel(None, S), model)
    positions = torch.tensor(POSITIONS["rows of their own"])
    with pytest.raises(ValueError, match="pack them"):
        model(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False)


def test_restarts_that_a_layer_is_not_told_of_are_refused() -> None:
    """Llama 4 keeps position_ids from its attention."""
    config = Llama4TextConfig(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, vocab_size=64, head_dim=8,
        intermediate_size=16, intermediate_size_mlp=16, num_local_experts=2, attention_chunk_size=32, pad_token_id=0,
    )  # fmt: skip
    model = Llama4ForCausalLM(config)
    ids = torch.arange(S)[None]
    register(ra.ContextParallel(None, S, mask=masks_of(config)), model)
    positions = torch.tensor(POSITIONS["a restart"])
    with pytest.raises(NotImplementedError, match="pass documents as cu_seq_lens_q"):
        model(input_ids=ids, position_ids=positions, use_cache=False)
    model(input_ids=ids, use_cache=False)


def refuse_a_cache(rank: int, world: int) -> list[str]:
    import torch.distributed as dist

    model = models()[0]
    cp = ra.ContextParallel(dist.group.WORLD, S)
    register(cp, model)
    batch = shard_batch(cp, {"input_ids": torch.arange(S)[None]})
    model(**batch, use_cache=False)
    earlier = DynamicCache(config=model.config)
    for layer in range(2):
        earlier.update(*torch.zeros(2, 1, 1, 3, 8, dtype=torch.float64), layer)
    start = time.monotonic()
    with pytest.raises(NotImplementedError) as caught:
        model(**batch, past_key_values=earlier if rank == 1 else None, use_cache=False)
    assert time.monotonic() - start < 2.0
    model(**batch, use_cache=False)
    return str(caught.value)


def refuse_a_batch(rank: int, world: int) -> list[str]:
    import torch.distributed as dist

    model = models()[0]
    cp = ra.ContextParallel(dist.group.WORLD, S)
    register(cp, model)
    right = {"input_ids": torch.arange(S)[None]}
    odd = {**right, "position_ids": torch.arange(S - 1)[None]} if rank == 1 else right
    texts = []
    for shard in (lambda batch: shard_batch(cp, batch), ShardingCollator(cp, lambda batch: batch[0])):
        one = isinstance(shard, ShardingCollator)
        model(**shard([right] if one else right), use_cache=False)
        start = time.monotonic()
        with pytest.raises(ValueError) as caught:
            model(**shard([odd] if one else odd), use_cache=False)
        assert time.monotonic() - start < 2.0
        texts.append(str(caught.value))
        model(**shard([right] if one else right), use_cache=False)
    return texts


def test_a_batch_that_one_rank_refuses_is_refused_by_all() -> None:
    for rank, texts in enumerate(run_processes(refuse_a_batch, 2)):
        assert all("position_ids (1, 7)" in text and ("rank 1 refused" in text) == (rank == 0) for text in texts)


def test_a_cache_on_one_rank_is_refused_by_all() -> None:
    texts = run_processes(refuse_a_cache, 2)
    assert all("KV cache of earlier tokens" in text for text in texts) and "rank 1 refused" in texts[0]


def test_positions_of_several_axes_are_cut_like_tokens() -> None:
    positions = torch.arange(3 * 2 * S).reshape(3, 2, S)
    cp = ra.ContextParallel(None, S)
    batch = shard_batch(cp, {"input_ids": torch.zeros(2, S, dtype=torch.int64), "position_ids": positions})
    assert torch.equal(batch["position_ids"], positions)


def test_a_window_of_zero_is_none() -> None:
    config = MistralConfig(
        sliding_window=0, num_hidden_layers=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, vocab_size=64,
    )  # fmt: skip
    assert masks_of(config) == (ra.causal(),)
    model = AutoModelForCausalLM.from_config(config)
    register(ra.ContextParallel(None, S, mask=masks_of(config)), model)
    assert model(input_ids=torch.zeros(1, S, dtype=torch.int64), use_cache=False).logits.isfinite().all()
    with pytest.raises(ValueError, match="None is unbounded"):
        ra.sliding_window(-1)
