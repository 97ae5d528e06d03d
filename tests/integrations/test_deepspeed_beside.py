"""What of DeepSpeed and Transformers works beside the ring: Trainer with `deepspeed=`, a ring inside Ulysses, and
ALST's pieces; and what they would drop of a model, refused."""

import itertools
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import ringattn
from ringattn.integrations.transformers import ShardedTrainerMixin, register
from ringattn.loss import IGNORED, count_targets, linear_token_mean, token_mean
from ringattn.testing import dense_attention, run_processes
from tests.support import zero
from tests.support.hf_models import VOCABULARY, build, configs
from tests.support.pages import blocks

pytestmark = pytest.mark.timeout(300)
ROUNDING = 2e-6  # of fp32 sums, relative to the norm of a parameter's gradient


def close(found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for name, gradient in exact.items():
        error = float((found[name] - gradient).norm() / gradient.norm())
        assert error <= ROUNDING, (name, error)


# -- Trainer ------------------------------------------------------------------------------------------


def rows(count: int) -> list[dict[str, Tensor]]:
    found = []
    for row in range(count):
        (sample,) = zero.samples(2 * row, 1)[0]  # of one document
        sample.labels[:, : 3 * row] = IGNORED
        found.append({"input_ids": sample.ids[0], "labels": sample.labels[0]})
    return found


def trainer(rank: int, world: int, folder: Path, deepspeed: dict[str, Any] | None) -> tuple[list[float], Any]:
    zero.begin(rank, world)
    from transformers import Trainer, TrainingArguments

    class ShardedTrainer(ShardedTrainerMixin, Trainer):
        pass

    if deepspeed:
        from ringattn.integrations.deepspeed import compile_nothing

        compile_nothing()
    model = zero.model_of()  # before the arguments: of ZeRO 3 they make from_config() shard what it makes
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        learning_rate=0.5, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.3, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, train_sampling_strategy="sequential", deepspeed=deepspeed,
    )  # fmt: skip
    ring = register(ringattn.ContextParallel(zero.world() if world > 1 else None, zero.SEQLEN), model)
    one = ShardedTrainer(model, arguments, train_dataset=rows(4), ring=ring)
    one.train()
    losses = [entry["loss"] for entry in one.state.log_history if "loss" in entry]
    return losses, zero.weights(one.model_wrapped) if deepspeed else dict(model.named_parameters())


def refused(rank: int, world: int, folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        trainer(rank, world, folder, zero.settings(1, **({"gradient_allreduce_op": "sum"} if rank else {})))
    return str(caught.value)


@pytest.mark.slow
def test_trainer_refuses_what_initialize_refuses(tmp_path: Path) -> None:
    for text in run_processes(refused, 2, tmp_path, timeout=280):
        assert "gradient_allreduce_op='sum'" in text and "leave it out" in text


@pytest.mark.slow
def test_trainer_equals_one_process(tmp_path: Path) -> None:
    ((losses, exact),) = run_processes(trainer, 1, tmp_path, None, timeout=280)
    start = dict(zero.model_of().named_parameters())
    config = zero.settings(3, zero_force_ds_cpu_optimizer=False)
    config |= dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
    )
    for found, weights in run_processes(trainer, 2, tmp_path, config, timeout=280):
        assert found == pytest.approx(losses, rel=1e-5)
        for name, weight in exact.items():
            change, apart = (x.detach().norm() for x in (weight - start[name], weights[name] - weight))
            assert apart <= 1e-4 * change, name


# -- a ring inside Ulysses ----------------------------------------------------------------------------

EVEN = 44  # tokens that divide by 4 ranks


def documents(bounds: tuple[int, ...], model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A batch of one row, and the gradients of one fp64 process, each document by itself."""
    (sample,) = zero.samples(0, 1)[0]
    ids, labels, total, count = sample.ids[:, :EVEN], sample.labels[:, :EVEN], torch.zeros(()), 0
    for a, b in itertools.pairwise(bounds):
        logits, targets = model(input_ids=ids[:, a:b], use_cache=False).logits[0, :-1], labels[0, a + 1 : b]
        total = total + F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        count += int((targets != IGNORED).sum())
    (total / count).backward()
    cu = torch.tensor(bounds, dtype=torch.int32)
    batch = {"input_ids": ids, "labels": labels, "cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    return batch, {name: p.grad for name, p in model.named_parameters()}


def ulysses(rank: int, world: int) -> dict[str, Any]:
    """The largest relative error of gradients, by case; and what is said to wrong calls."""
    zero.begin(rank, world)
    from ringattn.integrations.deepspeed import backward, initialize
    from ringattn.integrations.deepspeed.ulysses import register_ulysses, release_ulysses

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    found: dict[str, Any] = {}

    def ring_of(model: nn.Module, layout: str = "contiguous", seqlen: int = EVEN, **options: Any) -> Any:
        return register_ulysses(ringattn.ContextParallel(mesh["ring"], seqlen, layout=layout), model, 2, **options)

    def said(call: Any, *args: Any, **options: Any) -> str:
        try:
            call(*args, **options)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    for layout, stage, bounds, family in (
        ("contiguous", 3, (0, EVEN), "llama"),
        ("zigzag", 1, (0, 13, EVEN), "llama"),
        ("contiguous", 0, (0, 13, EVEN), "mistral"),  # whose window reaches across shards
    ):
        config = configs()[family]
        batch, exact = documents(bounds, build(config))
        model = build(config).float()
        ring = ring_of(model, layout)
        engine, *_ = initialize(
            model, zero.settings(stage, gradient_accumulation_steps=1, gradient_clipping=0.0),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        )  # fmt: skip
        piece = ring.shard_batch(batch)
        count = count_targets(piece["shift_labels"], zero.world())
        backward(engine, engine(**piece, use_cache=False, num_items_in_batch=count).loss)
        gradients = zero.gradients(engine)
        found[f"{family} {layout}"] = max(float((gradients[k] - exact[k]).norm() / exact[k].norm()) for k in exact)
        if stage == 3:
            found["padding"] = said(engine, **piece, attention_mask=(piece["input_ids"] % 2), use_cache=False)
            square = torch.ones(1, 1, EVEN // 4, EVEN // 4, dtype=torch.bool)
            found["attention_mask is a tensor"] = said(engine, **piece, attention_mask=square, use_cache=False)
            two = {k: x.repeat(2, 1) for k, x in piece.items() if k in ("input_ids", "position_ids")}
            found["2 rows"] = said(engine, **two, use_cache=False)
            found["release_ulysses"] = said(ring_of, zero.model_of())
        engine.destroy()
        release_ulysses()
    names: dict[str, Any] = dict(init_device_mesh=init_device_mesh, ringattn=ringattn, seqlen=EVEN, model=build(config))
    names["ids"] = batch["input_ids"]
    exec(blocks("docs/engines.md")["DeepSpeed"][1], names)
    mine = names["cp"].shard(batch["input_ids"]).chunk(2, dim=1)[mesh["ulysses"].get_local_rank()]
    found["tokens of the page's block"] = float((names["piece"]["input_ids"] != mine).sum())
    release_ulysses()
    found["a shard of 23 tokens"] = said(ring_of, zero.model_of(), seqlen=46)
    config = configs()["llama"]
    config.num_attention_heads, config.num_key_value_heads = 3, 3
    found["3 heads"] = said(ring_of, build(config))
    found["must be"] = said(register_ulysses, ringattn.ContextParallel(mesh["ulysses"], EVEN), zero.model_of(), 2)
    return found | layer(mesh, said)


def layer(mesh: Any, said: Any) -> dict[str, Any]:
    """DeepSpeed's own layer around the ring, in both of its orders of dims."""
    from ringattn.integrations.deepspeed import RingDistributedAttention

    cp = ringattn.ContextParallel(mesh["ring"], EVEN, layout="zigzag")
    attend, draw = RingDistributedAttention(cp, mesh["ulysses"]), torch.Generator().manual_seed(5)
    qkvg = [torch.randn(2, EVEN, heads, 8, generator=draw, dtype=torch.float64) for heads in (4, 2, 2, 4)]
    whole = [x.requires_grad_() for x in qkvg[:3]]
    out, _ = dense_attention(*whole, mask=ringattn.causal().dense(EVEN, EVEN))
    (out * qkvg[3]).sum().backward()

    def piece(x: Tensor) -> Tensor:
        return cp.shard(x.detach()).chunk(2, dim=1)[mesh["ulysses"].get_local_rank()]

    found: dict[str, Any] = {}
    for batch_dim in (0, 1):
        q, k, v, g = (piece(x).transpose(0, batch_dim).contiguous().requires_grad_() for x in qkvg)
        mine = attend(q, k, v, batch_dim)
        (mine * g).sum().backward()
        pairs = [(mine, piece(out)), *((x.grad, piece(y.grad)) for x, y in zip((q, k, v), whole, strict=True))]
        found[f"layer {batch_dim}"] = max(float((a.transpose(0, batch_dim) - b).abs().max()) for a, b in pairs)
    three = torch.zeros(1, EVEN // 4, 3, 8)
    found["3 heads for 2 ranks"] = said(attend, three, three, three)
    q, k, v, _ = map(piece, qkvg)
    found["rotate q and k"] = said(attend, q, k, v, 0, (q, q))
    found["bias is counted by heads"] = said(attend, q, k, v, bias=ringattn.alibi([1.0, 0.5]))
    found["but a piece has"] = said(attend, q[:, 1:], k[:, 1:], v[:, 1:])
    return found


@pytest.mark.slow
def test_a_ring_inside_ulysses_equals_one_process() -> None:
    for found in run_processes(ulysses, 4, timeout=280):
        for name, what in found.items():
            if isinstance(what, str):
                assert name in what and what.startswith(("ValueError", "NotImplementedError")), (name, what)
            else:
                assert what <= (1e-12 if name.startswith("layer") else ROUNDING), (name, what)


# -- ALST ---------------------------------------------------------------------------------------------


def tiled(rank: int, world: int) -> list[dict[str, Tensor]]:
    """Gradients of the two samples that the ranks load and share, with tiled MLPs and a chunked head."""
    zero.begin(rank, world)
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP, UlyssesSPDataLoaderAdapter

    from ringattn.integrations.deepspeed import backward, initialize

    model = zero.model_of()
    register(ringattn.ContextParallel(zero.world(), EVEN, layout="contiguous"), model)

    def mlp(self: Any, x: Tensor) -> Tensor:
        weights = [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight]
        return TiledMLP.apply(type(self).forward, self, x, 3, weights)

    for block in model.model.layers:
        block.mlp.forward = types.MethodType(mlp, block.mlp)
    config = zero.settings(2, gradient_accumulation_steps=1, gradient_clipping=0.0)
    engine, *_ = initialize(model, config, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    loader = torch.utils.data.DataLoader([alst_row(rank)], batch_size=1)
    found = []
    for batch in UlyssesSPDataLoaderAdapter(loader, rank, zero.world(), world, torch.device("cpu")):
        hidden = engine.module.model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).last_hidden_state
        backward(engine, linear_token_mean(hidden, engine.module.lm_head, batch["shift_labels"], group=zero.world()))
        found.append(zero.gradients(engine))
        engine.step()
    return found


def alst_row(row: int) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (EVEN,), generator=torch.Generator().manual_seed(row))
    labels = ids.clone()
    labels[: 5 + 9 * row] = IGNORED
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(EVEN)}


@pytest.mark.slow
def test_alst_pieces_work_beside_the_ring() -> None:
    for found in run_processes(tiled, 2, timeout=280):
        assert len(found) == 2
        for row, gradients in enumerate(found):
            model, sample = zero.model_of(torch.float64), alst_row(row)
            labels = ringattn.loss.shift_labels(sample["labels"][None])
            logits = model(input_ids=sample["input_ids"][None], use_cache=False).logits
            token_mean(logits, labels).backward()
            close(gradients, {name: p.grad for name, p in model.named_parameters()})
