"""The hardware that defaults are known of. Each figure says where it is from: *measured* by this project, or from a
*datasheet* or publication; figures of a GPU that nobody measured are scaled from one that was.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ringattn.planning.rates import Rates
from ringattn.planning.topology import Link, Topology


@dataclass(frozen=True)
class Hardware:
    """A device and what links it to others. ``marks``: words of which one is in the name of such a device; ``memory``:
    of each of them, in units of 1e9 bytes."""

    name: str
    marks: tuple[str, ...]
    rates: Rates
    topology: Topology
    memory: tuple[int, ...] = ()


NODE = 8  # GPUs of one NVLink domain: datasheets of HGX A100, H100, H200 and B200

# One core, AVX2, torch 2.13, fp32. Measured: the operator's GFLOP/s at head sizes of 64 and 128, full (59-65, 55-62)
# and causal (46-51, 44-58); windows as batches of blocks, 0.7-0.8 of the causal rate; 75-95 and 95-108 us a call
# forward and backward; a merge of 8 MiB in 0.35-0.7 ms; gloo over loopback 1 GB/s each way. Messages are copied, or
# moved, by the cores that compute: nothing hides them. Assumed: 0.1 ms a message and 0.2 ms a step.
CPU = Hardware(
    "a CPU core",
    ("cpu",),
    Rates(6.2e10, 5.8e10, diagonal=0.85, window=0.75, call=9e-5, step=2e-4, merge=3e-10, exposed=1.0),
    Topology(Link(1e9, 1e-4)),
)

# A GPU's host, in seconds of a call and of a step, without CUDA graphs. Measured beside an H200, of one rank of eight
# at 1,024 tokens, forward and backward together: 9.6 ms for a ring's eight calls and seven steps, 4.3 ms for an
# exchange's three calls, one step and 14 messages (0.03 ms each of a pass), 1.9 ms for one call.
HOST: dict[str, Any] = {"call": 1.7e-4, "step": 1.9e-4, "queued": True}

# Measured on an H200, bf16, 32 heads over 8 of 128: FlashAttention-4 at 32,768 tokens 663 / 621 TFLOP/s full, 629 / 604
# causal, and 468 / 396 in a window of 1,024; 0.185 ms to merge 4,096 rows of 32 heads (11 ps an element) and 0.509 ms
# 16,384 (8 ps). Datasheet: NVLink 4, 900 GB/s both ways together, and one 400 Gb/s adapter a GPU; memory of H100 SXM,
# H200 and GH200 with HBM3. Assumed: a tenth of a hidden transfer costs time, and a message between nodes 10 us more.
HOPPER = Hardware(
    "an H100 or H200",
    ("h100", "h200", "gh200"),
    Rates(6.6e14, 6.2e14, diagonal=0.95, window=0.72, merge=9e-12, exposed=0.1, **HOST),
    Topology(Link(4.5e11, 3e-5), Link(5e10, 4e-5), NODE),
    (80, 141, 96),
)

# Published: FlashAttention-2, up to 73 % and 63 % of 312 TFLOP/s forward and backward (arXiv 2307.08691). Datasheet:
# HBM 2.0 TB/s, 0.42 of an H200's, so that merges take 2.4 times as long; NVLink 3, 600 GB/s both ways together, and one
# 200 Gb/s adapter a GPU; memory of the larger of its two kinds. The other figures are the H200's.
AMPERE = Hardware(
    "an A100",
    ("a100", "a800"),
    Rates(2.3e14, 1.95e14, diagonal=0.95, window=0.72, merge=2.1e-11, exposed=0.1, **HOST),
    Topology(Link(3e11, 3e-5), Link(2.5e10, 4e-5), NODE),
    (80, 80),
)

# Published: FlashAttention-4, 1,613 TFLOP/s and more forward (its pull request 2605); backward is as much slower as an
# H200's. Datasheet: HBM 8 TB/s, 1.7 times an H200's; NVLink 5, 1.8 TB/s both ways together, and one 400 Gb/s adapter a
# GPU; memory of HGX B200 and GB200 NVL72 (13.4 TB over 72). The other figures are the H200's.
BLACKWELL = Hardware(
    "a B200",
    ("b200", "gb200"),
    Rates(1.6e15, 1.5e15, diagonal=0.95, window=0.72, merge=5.4e-12, exposed=0.1, **HOST),
    Topology(Link(9e11, 3e-5), Link(5e10, 4e-5), NODE),
    (180, 186),
)

GPUS: tuple[Hardware, ...] = (HOPPER, AMPERE, BLACKWELL)


def hardware(name: str) -> Hardware:
    """The defaults for a device: ``cpu``, or the name of a GPU as its driver gives it; of a GPU that is not known,
    those of an H100."""
    return CPU if name.lower() == "cpu" else known_gpu(name) or HOPPER


def checked_device(name: str) -> str:
    """A device's name by which something is asked for: "cpu" or a GPU that is known. Raises ``ValueError`` otherwise:
    its figures would be another's."""
    if name.lower() != "cpu" and known_gpu(name) is None:
        names = ", ".join(("cpu", *(mark.upper() for known in GPUS for mark in known.marks)))
        raise ValueError(f"device={name!r}: figures are known of {names}; name the nearest, or give Options(rates=...)")
    return name


def memory_of(name: str) -> int:
    """Bytes of a known GPU's memory: as many as its name says ("NVIDIA A100-SXM4-40GB"), else those of its datasheet,
    where GB is 1e9 bytes."""
    known, words = known_gpu(name), _words(name)
    assert known is not None, "names are checked before"
    said = next((found[1] for word in words if (found := re.fullmatch(r"(\d+)gb", word))), None)
    own = next(size for mark, size in zip(known.marks, known.memory, strict=True) if mark in words)
    return (int(said) if said and int(said) else own) * 10**9


def known_gpu(name: str) -> Hardware | None:
    """The GPU of that name; None if it is not known."""
    words = _words(name)
    return next((known for known in GPUS if any(mark in words for mark in known.marks)), None)


def _words(name: str) -> list[str]:
    return name.lower().replace("-", " ").split()
