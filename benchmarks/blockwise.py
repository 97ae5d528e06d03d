"""The blockwise kernel beside sdpa on the same CPU tiles, and what each score feature costs it.

One thread, fp32, 4 heads of 64, random data. A ratio is the median over rounds in which both took their turn, so
that a machine that changes speed changes both.

    python -m benchmarks.blockwise
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import typer

from benchmarks.common import interleaved, ratio, write
from benchmarks.kernels import DIM, HEADS, SCALE, Pair, tile
from ringattn.kernels.blockwise import Blockwise
from ringattn.kernels.scores import Alibi, Dropout, Scores, Window

TILES: dict[str, tuple[int, Window]] = {
    "full 2048": (2048, (None, None)),
    "full 4096": (4096, (None, None)),
    "full 8192": (8192, (None, None)),
    "causal 2048": (2048, (None, 0)),
    "causal 4096": (4096, (None, 0)),
    "causal 8192": (8192, (None, 0)),
    "window 64 of 8192": (8192, (63, 0)),
    "window 256 of 8192": (8192, (255, 0)),
    "window 1024 of 8192": (8192, (1023, 0)),
}
CAUSAL: Window = (None, 0)
LENGTH = 2048  # of the causal tile on which features are measured


def features() -> dict[str, Scores]:
    """Calls with one feature each, and with all."""
    bias, dbias = torch.randn(1, HEADS, LENGTH, LENGTH), torch.zeros(1, HEADS, LENGTH, LENGTH)
    rule, dropout = Alibi(torch.full((HEADS,), 0.1)), Dropout(0.1, 0)
    return {
        "softcap": Scores(SCALE, softcap=30.0),
        "alibi": Scores(SCALE, rule=rule),
        "bias": Scores(SCALE, bias=bias),
        "bias and its gradient": Scores(SCALE, bias=bias, dbias=dbias),
        "dropout": Scores(SCALE, dropout=dropout),
        "all": Scores(SCALE, 30.0, bias, dbias, rule, dropout),
    }


def compared(above: Pair, below: Pair, rounds: int) -> dict[str, float]:
    """Seconds of `above` over those of `below`: forward, backward, and both together."""
    calls: dict[str, Callable[[], object]] = {"af": above[0], "ab": above[1], "bf": below[0], "bb": below[1]}
    seconds = interleaved(calls, rounds)
    for name in ("a", "b"):
        seconds[name] = [f + b for f, b in zip(seconds[f"{name}f"], seconds[f"{name}b"], strict=True)]
    return {
        "forward": ratio(seconds, "af", "bf"),
        "backward": ratio(seconds, "ab", "bb"),
        "both": ratio(seconds, "a", "b"),
    }


def shown(name: str, row: dict[str, float]) -> dict[str, Any]:
    print(f"{name:22}" + "".join(f" {key} {value:5.2f}" for key, value in row.items()), flush=True)
    return {"case": name} | row


def main(rounds: int = 7, json: str = "blockwise-cpu") -> None:
    """Measure, print and write JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kernel = Blockwise()
    with torch.no_grad():
        print("speed over sdpa's")
        speed = [shown(name, compared(tile(*at), tile(*at, kernel), rounds)) for name, at in TILES.items()]
        print(f"time over that without the feature, causal {LENGTH}")
        plain = tile(LENGTH, CAUSAL, kernel)
        with_feature = {name: tile(LENGTH, CAUSAL, kernel, call) for name, call in features().items()}
        cost = [shown(name, compared(pair, plain, rounds)) for name, pair in with_feature.items()]
    settings = {"dtype": "float32", "threads": 1, "heads": HEADS, "head_dim": DIM, "rounds": rounds}
    write(json, settings | {"speed_over_sdpa": speed, "time_over_plain": {"tile": f"causal {LENGTH}", "rows": cost}})


if __name__ == "__main__":
    typer.run(main)
