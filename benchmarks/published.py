"""Memory that others have published of their long-context training, against what `ringattn.budget` says of the same
settings: bytes at the peak, or the longest sequence that fits. Attention is planned as ringattn computes it, with its
buffers freed behind each call, and for runs over PyTorch's context parallel as that does.

    python -m benchmarks.published
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import typer

from benchmarks.common import write
from ringattn.budget import ModelShape, from_config, model, plan
from ringattn.budget.amounts import Amount, named
from ringattn.budget.attention import BUFFERS
from ringattn.budget.layers import OUT, SCRATCH, LayerCode
from ringattn.budget.plans import Plan
from ringattn.budget.tape import Tape, Tensor

PUBLISHED = Path(__file__).parents[1] / "tests" / "budget" / "published.json"
NEAR = 0.15
MEMORY = {"H100-80GB": "80GiB", "H200": "141GB"}


def settings_of(run: dict[str, Any]) -> dict[str, Any]:
    """A published run in the planner's words."""
    s, shape = run["settings"], model_of(run)
    fused = s["loss_rows"] == "liger"
    # TRL's tiles are computed again within their layer's checkpoint, which keeps what all of them keep
    tiled = s["mlp_rows"] and not run["name"].startswith("trl")
    local = -(-run["seqlen"] // (s["ring"] * s["ulysses"]))
    rows = s["loss_rows"]
    if fused:  # the next power of two, as Liger's fused linear cross entropy chooses
        rows = 1 << (-(-local // -(-shape.vocabulary // shape.width)) - 1).bit_length()
    states = "all" if s["offload_parameters"] else "optimizer" if s["offload_optimizer"] else "none"
    return {
        "nodes": -(-run["gpus"] // 8), "gpus": min(run["gpus"], 8), "memory": MEMORY[run["gpu"]],
        "shard": "fsdp" if s["weight_bytes"] == 4 else "zero3", "offload_states": states,
        "optimizer": "adamw" if s["optimizer_bytes"] else "sgd", "recompute": "full",
        "offload": s["checkpointing"] == "offloaded", "loss_chunks": 1 if rows is None else max(1, local // rows),
        "token_chunks": max(1, local // s["mlp_rows"]) if tiled else 1, "ulysses": s["ulysses"],
        "data": run["gpus"] // (s["ring"] * s["ulysses"]), "head_chunks": s["head_chunks"],
        "transient": True, "fused_loss": fused,
    }  # fmt: skip


def model_of(run: dict[str, Any]) -> ModelShape:
    """Its model's shape."""
    return from_config(run["model"], run["name"]) if isinstance(run["model"], dict) else model(run["model"])


def published() -> list[dict[str, Any]]:
    """Of each figure what was published, and what the planner says of the same settings: bytes at the peak, or the
    longest sequence that fits."""
    rows = []
    for run in json.loads(PUBLISHED.read_text())["runs"]:
        found = planned(run)
        if "longest" in run:
            said, ours, unit = run["seqlen"], found.longest, "tokens"
        elif "peak_gb" in run:
            said, ours, unit = int(run["peak_gb"] * 1e9), found.peak, "bytes"
        else:
            said, ours, unit = int(run["device_gib"] * 2**30), found.peak + found.reserve, "bytes"
        row = {"name": run["name"], "figure": run["figure"], "published": said, "planned": ours, "unit": unit}
        rows.append(row | {"ratio": ours / said, "reproduced": abs(ours / said - 1) <= NEAR, "at": found.moment})
    return rows


def show_published(rows: list[dict[str, Any]]) -> None:
    """As a table."""
    for row in rows:
        verdict = "within 15 %" if row["reproduced"] else "not reproduced"
        print(
            f"{row['name']:46} {'figure' if row['figure'] else '':7} published {row['published']:>16,} {row['unit']}, "
            f"planned {row['planned']:>16,}: {row['ratio']:.2f}  {verdict}  {row['at']}"
        )


@dataclass(slots=True)
class TorchRing(LayerCode):
    """Transformers' layers over PyTorch's context parallel as accelerate sets it up: keys and values of all ranks are
    gathered, partial results are merged in fp32, and behind the first call each has half of the queries or of the keys
    (`_templated_ring_attention` and its backward, PyTorch 2.13)."""

    ranks: int = 1

    def attend(self, tape: Tape, q: Tensor, k: Tensor, v: Tensor, tokens: Amount) -> Tensor:
        n, (heads, _, _, _) = self.numerics, self.heads()
        whole, keys, values = self.qkv(tokens)
        out = Tensor(OUT, "out", whole)
        lse = Tensor(OUT, "lse", tokens * heads * n.wide, grad=None)
        gathered = (
            Tensor(BUFFERS, "keys and values of all ranks", (keys + values) * named("ranks", self.ranks)),
            Tensor(BUFFERS, "own keys and values, joined", keys + values),
        )
        names = "merged out", "a call's out in fp32", "a call's out"
        merged = [
            Tensor(SCRATCH, name, size) for name, size in zip(names, (*2 * [self._wide(whole)], whole), strict=True)
        ]
        backward = max((self._call(tokens, *halves) for halves in ((1, 2), (2, 1))), key=_bytes)
        tape.run(
            "attention", (q, k, v), (out, lse), keeps=(q, k, v, out, lse), scratch=(*gathered, *merged),
            backward_scratch=(*gathered, *backward),
        )  # fmt: skip
        return out

    def _wide(self, size: Amount) -> Amount:
        return size * self.numerics.wide.over(self.numerics.compute)

    def _call(self, tokens: Amount, of_queries: int, of_keys: int) -> tuple[Tensor, ...]:
        """What lies there in a backward call of one part in so many of the queries, and of the keys."""
        whole, keys, values = self.qkv(tokens)
        queries, part = (named(f"parts of the {name}", n) for name, n in (("queries", of_queries), ("keys", of_keys)))
        dq, dkv, (heads, kv_heads, _, _) = whole.over(queries), (keys + values).over(part), self.heads()
        joined = ((f"dk and dv {x}", self._wide(keys + values)) for x in ("received", "sent", "on their way"))
        sizes = [("dq added up", self._wide(whole)), *joined]
        sizes += [(f"dq, dk and dv of {call}", dq + dkv) for call in ("the call before", "a call")]
        sizes.append(("dq in fp32", self._wide(dq)))
        if heads.value != kv_heads.value:
            sizes.append(("dk and dv of all query heads", 2 * whole.over(part)))
        return tuple(Tensor(SCRATCH, name, size) for name, size in sizes)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.size.value for x in tensors)


def planned(run: dict[str, Any]) -> Plan:
    """A published run as the planner has it."""
    found = plan(model_of(run), run["seqlen"], **settings_of(run))
    if run["settings"]["schedule"] == "torch context parallel":
        return found.computed_by(partial(TorchRing, ranks=run["settings"]["ring"]))
    return found


def main(output: str = "published-cpu") -> None:
    """Plan, print and write JSON."""
    found = published()
    show_published(found)
    write(output, {"rows": found})


if __name__ == "__main__":
    typer.run(main)
