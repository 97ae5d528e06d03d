"""The picture of a run: loss and throughput over steps, as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def draw(records: Sequence[dict[str, Any]], entropy: float, title: str, path: Path) -> None:
    """Writes the plot of metric records (`step`, `loss`, `tokens_per_s`), with the text's unigram entropy
    in nats as the line a model must get below to have learned anything from context."""
    steps = [record["step"] for record in records]
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    above.plot(steps, [record["loss"] for record in records], marker=".", color="tab:blue", label="loss")
    above.axhline(entropy, color="tab:gray", linestyle="--", label=f"unigram entropy {entropy:.3f}")
    above.set_ylabel("nats per byte")
    above.set_title(title)
    above.legend()
    below.plot(steps, [record["tokens_per_s"] for record in records], marker=".", color="tab:green")
    below.set_ylim(0, 1.1 * max((record["tokens_per_s"] for record in records), default=1.0))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.set_ylabel("tokens / s")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
