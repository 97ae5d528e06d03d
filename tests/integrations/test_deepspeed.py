"""DeepSpeed's ZeRO over data x context: losses, gradients and weights of one process, whatever the stage; and what
would make them wrong is refused on all ranks."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ringattn.testing import run_processes
from tests.support import zero

pytestmark = pytest.mark.timeout(300)
STEPS = 5
STAGES = (0, 1, 2, 3)


def bounds(data: int, steps: int) -> tuple[zero.Run, tuple[float, float]]:
    """One fp64 process, and four times what one fp32 process is away from it."""
    exact = zero.alone(data, steps)
    gradients, weights = zero.alone(data, steps, torch.float32).error(exact)
    return exact, (4 * gradients, 4 * weights)


def stages(rank: int, world: int, context: int, steps: int, which: tuple[int, ...]) -> list[zero.Run]:
    zero.begin(rank, world)
    mesh = zero.mesh_of(context)
    return [zero.train(mesh, zero.settings(stage), steps, whole=stage % 2 == 0) for stage in which]


def check(data: int, context: int, steps: int, which: tuple[int, ...]) -> None:
    exact, bound = bounds(data, steps)
    for runs in run_processes(stages, data * context, context, steps, which, timeout=280):
        for stage, found in zip(which, runs, strict=True):
            assert found.losses == pytest.approx(exact.losses, rel=bound[1]), stage
            errors = found.error(exact)
            assert errors[0] <= bound[0] and errors[1] <= bound[1], (stage, errors, bound)


def test_two_ranks_of_a_context_equal_one_process() -> None:
    check(1, 2, 1, (2,))


@pytest.mark.slow
@pytest.mark.parametrize(("data", "context"), [(1, 2), (2, 2), (1, 4)])
def test_every_stage_equals_one_process(data: int, context: int) -> None:
    check(data, context, STEPS, STAGES)


PRECISIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "bf16": (1, {"bf16": {"enabled": True}}),
    "bf16, fp32 sums": (2, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    "autocast bf16": (3, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    "autocast fp16, its loss scaled": (2, {"torch_autocast": {"enabled": True, "dtype": "float16"}}),
    "prescaled": (0, {"prescale_gradients": True}),
    "predivided": (0, {"gradient_predivide_factor": 2.0}),
}


def precisions(rank: int, world: int) -> list[zero.Run]:
    zero.begin(rank, world)
    return [zero.train(zero.mesh_of(2), zero.settings(stage, **more), 1) for stage, more in PRECISIONS.values()]


@pytest.mark.slow
def test_precisions_and_divisions_that_are_taken_are_right() -> None:
    exact = zero.alone(1, 1)
    start = {name: p.detach().double() for name, p in zero.model_of().named_parameters()}
    rough = zero.alone(1, 1, torch.bfloat16)
    change = max(
        float((rough.weights[k] - exact.weights[k]).norm() / (start[k] - exact.weights[k]).norm()) for k in start
    )
    for runs in run_processes(precisions, 2, timeout=280):
        for name, found in zip(PRECISIONS, runs, strict=True):
            errors = {
                k: float((found.weights[k] - exact.weights[k]).norm() / (start[k] - exact.weights[k]).norm())
                for k in start
            }
            assert max(errors.values()) <= (change if "fp16" in name or "bf16" in name else 1e-4), name


# -- what is refused ----------------------------------------------------------------------------------

WRONG: dict[str, dict[str, Any]] = {
    "sequence_parallel_size=2": {"sequence_parallel_size": 2},
    "data_parallel_size=2": {"data_parallel_size": 2},
    "gradient_allreduce_op='sum'": {"gradient_allreduce_op": "sum"},
    "gradient_predivide_factor=2.0": {"gradient_predivide_factor": 2.0, "zero_optimization": {"stage": 3}},
    "train_batch_size=4": {"train_batch_size": 4, "gradient_accumulation_steps": 4},
    "train_batch_size=8": {"train_batch_size": 8, "train_micro_batch_size_per_gpu": None},
    "grad_accum_dtype='fp32'": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "compile.passes=": {"compile": {"passes": ["autosp"]}},
    "tensor_parallel.autotp_size=2": {"tensor_parallel": {"autotp_size": 2}},
    "expert_parallel.enabled=True": {"expert_parallel": {"enabled": True}},
    "data_efficiency.enabled=True": {"data_efficiency": {"enabled": True}},
    "hybrid_engine.enabled=True": {"hybrid_engine": {"enabled": True}},
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_setting_is_refused(said: str) -> None:
    from ringattn.integrations.deepspeed import check_settings

    config = {"train_micro_batch_size_per_gpu": 1, **WRONG[said]}
    with pytest.raises(ValueError, match=f"DeepSpeed's .*{re.escape(said)}.*(leave|take|shorten)"):
        check_settings(config, 2)


def test_settings_that_are_right_pass() -> None:
    from ringattn.integrations.deepspeed import check_settings

    check_settings({"train_batch_size": 8, **zero.settings(0), "bf16": {"enabled": True}}, 4)
    check_settings({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}, 4)
    check_settings({"gradient_predivide_factor": 2.0, "prescale_gradients": True}, 2)


def said(call: Any, *args: Any, **options: Any) -> str:
    try:
        call(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals(rank: int, world: int) -> dict[str, str]:
    """What each rank hears where rank 1 alone is wrong."""
    zero.begin(rank, world)
    import deepspeed

    from ringattn.integrations.deepspeed import check_trainer, initialize, loss_scale

    def start(model: nn.Module | None = None, **options: Any) -> str:
        wrong, stage = options.pop("wrong", {}), options.pop("stage", 0)
        model = model or zero.model_of()
        config = {**zero.settings(stage), **(wrong if rank else {})}
        return said(initialize, model, config, **(options if rank else {}))

    other = zero.model_of()
    if rank:
        other.lm_head.weight.data[3, 3] += 1
    found = {name: start(wrong=wrong) for name, wrong in WRONG.items() if "train" not in name and "accum" not in name}
    pipeline = deepspeed.pipe.PipelineModule([nn.Linear(2, 2), nn.Linear(2, 2)], num_stages=1)
    experts = nn.Sequential(deepspeed.moe.layer.MoE(4, nn.Linear(4, 4), num_experts=2))
    found["mpu="] = start(mpu=object())
    found["mesh_param=(1, 2)"] = start(mesh_param=(1, 2))
    found["training_data="] = start(training_data=[1])
    found["differ in weights"] = start(other)
    found["differ in config"] = start(wrong={"steps_per_print": 3})
    found["PipelineModule has pipeline stages"] = start(pipeline)
    found["MoE"] = start(experts)
    plugin = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=zero.settings(0)))
    accelerator = SimpleNamespace(state=plugin, parallelism_config=SimpleNamespace(sp_size=1 + rank))
    found["sp_size=2"] = said(check_trainer, SimpleNamespace(model=zero.model_of(), accelerator=accelerator))
    found["missing.json"] = said(initialize, zero.model_of(), "missing.json")
    model = zero.model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero.settings(0), mesh_param=(1, world))
    found["sequence_parallel_size is 2"] = said(loss_scale, engine)
    found["groups.mesh_device is set"] = start()
    dist.barrier()
    return found


@pytest.mark.slow
def test_what_one_rank_refuses_all_refuse() -> None:
    for found in run_processes(refusals, 2, timeout=280):
        for name, text in found.items():
            assert text.startswith("ValueError") and name in text, (name, text)
