"""What a mask will do on 8 ranks, before any is started: what each computes and receives, which layout is best, and
whether a step of training fits. No process group, no tensors; a second or two.

    python examples/look.py             # as text
    python examples/look.py look.html   # and the layouts side by side, as a page that zooms
"""

import sys

import ringattn
from ringattn import budget

SEQLEN, RANKS = 131_072, 8


def main(path: str | None = None) -> None:
    """path: .html, .svg, .png (with matplotlib) or .txt."""
    documents = ringattn.documents([0, 40_000, 56_000, SEQLEN])
    mask = ringattn.sliding_window(8191) & documents
    print(f"{mask.area(SEQLEN, SEQLEN):,} of {SEQLEN**2:,} pairs attend")
    print(ringattn.show(mask, SEQLEN, ranks=RANKS, view="work"))
    if path is not None:
        ringattn.show(mask, SEQLEN, ranks=RANKS, view="layouts").save(path)
    print(budget.plan("qwen3-0.6b", SEQLEN, gpus=RANKS, memory="80GB", loss_chunks=64))


if __name__ == "__main__":
    main(*sys.argv[1:])
