"""The picture of a run: loss and throughput over steps, as PNG."""

from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from launch.report import Record


def draw(records: Sequence["Record"], baseline: tuple[str, float], title: str) -> bytes:
    """The plot as PNG: the loss above, with the line a model must get below to have learned anything from context
    (its name, and nats a target); in recall the share of right answers and the
    length of the sequences; the throughput. A dotted line stands where a run was gone on with."""
    steps = [record.step for record in records]
    answers = [100 * record.accuracy for record in records if record.accuracy is not None]
    figure = Figure(figsize=(8, 7.5 if answers else 6), layout="constrained")
    axes = figure.subplots(3 if answers else 2, 1, sharex=True, height_ratios=(2, 1.5, 1) if answers else (2, 1))
    axes[0].plot(steps, [record.loss for record in records], marker=".", color="tab:blue", label="loss")
    axes[0].axhline(baseline[1], color="tab:gray", linestyle="--", label=f"{baseline[0]} {baseline[1]:.3f}")
    axes[0].set_ylabel("nats a target")
    axes[0].set_title(title, parse_math=False)
    if answers:
        axes[1].plot(steps, answers, marker=".", color="tab:orange")
        axes[1].set_ylabel("right answers, %")
        lengths = axes[1].twinx()
        lengths.step(steps, [record.seqlen for record in records], where="post", color="tab:gray", linewidth=1)
        lengths.set_yscale("log", base=2)
        lengths.set_ylabel("tokens in a sequence (gray)")
    speed = [record.tokens_per_s for record in records]
    axes[-1].plot(steps, speed, marker=".", color="tab:green")
    axes[-1].set_ylim(0, 1.1 * max(speed, default=1.0))
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_ylabel("tokens / s")
    axes[-1].set_xlabel("step")
    resumed = [after.step - 0.5 for before, after in pairwise(records) if after.start != before.start]
    for one_of in axes:
        one_of.grid(alpha=0.3)
        for number, at in enumerate(resumed):
            one_of.axvline(at, color="tab:red", linestyle=":", linewidth=1, label="_" if number else "resumed")
    axes[0].legend()
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
