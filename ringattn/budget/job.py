"""What of a plan the pretraining job, `launch.pretrain`, computes, and the command and config that start it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ringattn.arguments.values import shown
from ringattn.budget.model_shape import ModelShape
from ringattn.budget.models import file_of
from ringattn.budget.setup import Setup
from ringattn.planning.hardware import memory_of

# The job's only values of these where its model is a Transformers one; `recompute` is its "attention", or none.
FIXED = {
    "batch": 1, "optimizer": "adamw", "offload_states": "none", "fused_loss": False, "token_chunks": 1,
    "head_chunks": 1, "mask": "causal()", "code": "transformers", "transient": False, "autocast": True,
}  # fmt: skip
WAYS = ("none", "attention")
ENGINES = {"none": "ddp", "fsdp": "fsdp"}  # of the other ways of sharding DeepSpeed
STEPS, RATE, WARMUP = 1000, 3e-4, 100  # a beginning, for the user to change


def of_job(model: str | ModelShape, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with those that the job has without saying. Raises ValueError for what it does not do."""
    own = "or plan for a loop of your own, own_loop=True or --own-loop"
    if isinstance(model, ModelShape):
        raise ValueError(
            f"model={model.name!r} is a ModelShape, and launch.pretrain reads a config.json: give its path, {own}"
        )
    for name, value in FIXED.items():
        if settings.get(name, value) != value:
            raise ValueError(
                f"{name}={shown(settings[name])}: launch.pretrain computes a Transformers model with {name}={value!r} "
                f"only; leave it out, {own}"
            )
    return settings | FIXED


def command_of(setup: Setup) -> str:
    """The line to start on each node, with the config of `config_of` in CONFIG.toml."""
    meet = "--rdzv-backend c10d --rdzv-endpoint HOST:29500" if setup.nodes > 1 else "--standalone"
    start = f"torchrun --nnodes {setup.nodes} --nproc-per-node {setup.gpus} {meet}"
    return f"{start} -m launch.pretrain --config CONFIG.toml"


def config_of(model: str, setup: Setup) -> str:
    """The job's config, as TOML."""
    engine = ENGINES.get(setup.shard, "deepspeed")
    values = {
        "name": f"{_label(model)}-{setup.seqlen}", "seqlen": setup.seqlen, "steps": STEPS,
        "hf": str(file_of(model).resolve()), "engine": engine, "data_parallel": setup.data,
        "ulysses": setup.ulysses, "layout": setup.layout, "schedule": setup.schedule, "device": "cuda",
        "dtype": setup.dtype, "recompute": setup.recompute != "none", "offload": setup.offload,
        "loss_chunks": setup.loss_chunks,
    }  # fmt: skip
    tables = {"optimizer": {"lr": RATE, "warmup": WARMUP}}
    if engine == "deepspeed":
        tables["deepspeed"] = {"stage": int(setup.shard.removeprefix("zero"))}
    lines = _lines(values)
    for name, table in tables.items():
        lines += ["", f"[{name}]", *_lines(table)]
    return "\n".join(lines)


def calls_of(model: str | ModelShape, setup: Setup) -> str:
    """The same in Python: the plan, and the context of a loop of one's own."""
    named = repr(model) if isinstance(model, str) else "model"
    given = "".join(f", {name}={value!r}" for name, value in differing(setup).items())
    masks = [re.sub(r"\b(?=[a-z_]+\()", "ringattn.", str(mask)) for mask in setup.masks()]
    how = "".join(f", {name}={getattr(setup, name)!r}" for name in ("layout", "schedule", "ulysses"))
    options = f", options=ringattn.Options(head_chunks={setup.head_chunks})" if setup.head_chunks > 1 else ""
    context = f"{setup.seqlen}, mask=[{', '.join(masks)}]{how}{options}"
    return (
        f"plan = budget.plan({named}, {setup.seqlen}{given})\n"
        f'mesh = data_context_mesh("cuda", data={setup.data})  # of ringattn.integrations.fsdp\n'
        f'cp = ringattn.ContextParallel(mesh["cp"], {context})'
    )


def differing(setup: Setup) -> dict[str, Any]:
    """The settings of a plan that are not what is taken where they are not given."""
    usual = vars(Setup(setup.model, setup.seqlen, device=setup.device, memory=memory_of(setup.device)))
    found = {name: value for name, value in vars(setup).items() if value != usual[name]}
    return found if setup.device == Setup.device else found | {"device": setup.device}


def _label(model: str) -> str:
    """What a run of the model can be called."""
    path = Path(model)
    name = path.resolve().parent.name if path.name == "config.json" else path.name.removesuffix(".json")
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:50] or "run"


def _lines(values: dict[str, Any]) -> list[str]:
    """TOML writes these as JSON does."""
    return [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]


__all__ = ["FIXED", "WAYS", "calls_of", "command_of", "config_of", "differing", "of_job"]
