"""What a training run is to be: model, lengths, how it is computed and on what, checked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ringattn.arguments.values import flag, integer, quantity, shown
from ringattn.budget.model_shape import ModelShape
from ringattn.geometry.layouts import named as known
from ringattn.mask_text import parse_mask
from ringattn.masks import Mask, sliding_window
from ringattn.planning.hardware import GPUS, known_gpu, memory_of

RECOMPUTE = ("none", "attention", "full")
STATES = ("none", "optimizer", "all")
CODES = ("transformers", "decoder")
DTYPES = ("bfloat16", "float32")
MOST = 1 << 40
# bytes of an optimizer's state a parameter of a matrix inside the layers, and of the others
OPTIMIZERS = {"adamw": (8, 8), "adamw_foreach": (8, 8), "adamw8bit": (2, 2), "muon": (4, 8), "sgd": (0, 0)}


@dataclass(frozen=True, slots=True)
class Shard:
    """What of a parameter lies whole on each rank, and what in parts over all of them, in bytes: weights; gradients;
    ``master``: fp32 weights beside those, in parts. ``gathered``: weights are brought together a layer at a time."""

    whole_weights: int
    part_weights: int
    part_gradients: int
    master: int = 0
    buckets: int = 0
    gathered: bool = False
    moments_whole: bool = False


def shards(dtype: str, autocast: bool = False) -> dict[str, Shard]:
    """Of FSDP2 with fp32 weights gathered in `dtype`; of DDP under autocast; of DeepSpeed's stages with 16-bit weights
    and fp32 ones beside them, which it has beside fp32 weights too. Under autocast weights are fp32 everywhere."""
    low = 2 if dtype == "bfloat16" and not autocast else 4
    master = 4
    return {
        "none": Shard(4, 0, 0, buckets=4, moments_whole=True),
        "fsdp": Shard(0, 4, 4, gathered=True),
        "zero1": Shard(low, 0, 0, master),
        "zero2": Shard(low, 0, low, master),
        "zero3": Shard(0, low, low, master, gathered=True),
    }


SHARDS = tuple(shards("bfloat16"))


@dataclass(frozen=True)
class Setup:
    """A run. See :func:`ringattn.budget.plan` for what each says."""

    model: ModelShape
    seqlen: int
    nodes: int = 1
    gpus: int = 8
    memory: int = memory_of("H100")
    batch: int = 1
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    shard: str = "fsdp"
    recompute: str = "full"
    offload: bool = False
    offload_states: str = "none"
    loss_chunks: int = 64
    fused_loss: bool = False
    token_chunks: int = 1
    head_chunks: int = 1
    mask: str = "causal()"
    layout: str = "auto"
    schedule: str = "auto"
    ulysses: int = 1
    data: int = 1
    code: str = "transformers"
    device: str = "H100"
    reserve: int | None = None
    transient: bool = False
    autocast: bool = False

    def __post_init__(self) -> None:
        for name in ("seqlen", "nodes", "gpus", "memory", "batch", "loss_chunks", "token_chunks", "head_chunks"):
            integer(name, getattr(self, name), 1, MOST)
        for name in ("ulysses", "data"):
            integer(name, getattr(self, name), 1, MOST)
        for name, choices in (
            ("dtype", DTYPES), ("optimizer", tuple(OPTIMIZERS)), ("shard", SHARDS), ("recompute", RECOMPUTE),
            ("code", CODES), ("offload_states", STATES),
        ):  # fmt: skip
            known(name, getattr(self, name), choices)
        for name in ("offload", "fused_loss", "transient", "autocast"):
            flag(name, getattr(self, name))
        checked_gpu(self.device)
        if not isinstance(self.mask, str):
            raise ValueError(f"mask={shown(self.mask)}: must be text, such as 'sliding_window(4095) & causal()'")
        for name in ("loss_chunks", "token_chunks"):
            if getattr(self, name) > self.seqlen:
                raise ValueError(
                    f"{name}={getattr(self, name):,} of {self.seqlen:,} tokens: must be at most as many, for instance 8"
                )
        self._check_split()

    def _check_split(self) -> None:
        heads = self.model.layers[0].attention.num_heads
        if self.world % self.data:
            raise ValueError(
                f"data={self.data} over {self.world} ranks: must divide them, as the ranks of a replica share a "
                f"sequence; take a divisor of {self.world}"
            )
        if self.context % self.ulysses:
            raise ValueError(
                f"ulysses={self.ulysses} over the {self.context} ranks of a sequence ({self.world} ranks by data="
                f"{self.data}): must divide them; take a divisor of {self.context}"
            )
        if self.ulysses > heads:
            raise ValueError(
                f"ulysses={self.ulysses} and {heads} query heads: each rank needs one, take at most {heads}"
            )
        if self.head_chunks > heads // self.ulysses:
            raise ValueError(
                f"head_chunks={self.head_chunks} of {heads // self.ulysses} heads a rank: must be at most so many"
            )
        if self.context > self.seqlen:
            raise ValueError(f"{self.context} ranks share {self.seqlen:,} tokens: take more tokens, or data above 1")

    @property
    def world(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus

    @property
    def context(self) -> int:
        """Those that share a sequence."""
        return self.world // self.data

    def masks(self) -> tuple[Mask, ...]:
        """Of the layers, without repeats: the mask, and within a layer's window where it has one."""
        whole = parse_mask(self.mask)
        return tuple(whole if w is None else whole & sliding_window(w - 1) for w in self._windows)

    @property
    def ends(self) -> bool:
        """Whether the mask has this length and no longer one, as that of documents."""
        try:
            for mask in self.masks():
                mask.bind(self.seqlen + 1, self.seqlen + 1)
        except ValueError:
            return True
        return False

    def layers(self) -> tuple[int, ...]:
        """How many layers each of them has."""
        return tuple(self._windows.values())

    @property
    def _windows(self) -> Counter[int | None]:
        return Counter(layer.attention.window for layer in self.model.layers)


UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30,
    "tib": 1 << 40,
}  # fmt: skip


def bytes_of(name: str, text: str | int, least: int = 1) -> int:
    """A number of bytes: "80GB" is 80e9, "80GiB" 80 * 2**30. A number without a unit is of bytes, and refused where it
    is below a MiB, since gigabytes were meant."""
    size = quantity(name, text, UNITS, f"a {'positive ' if least else ''}size such as 80GB or 80GiB", least, MOST)
    if str(text).strip()[-1:].isdigit() and 0 < size < 1 << 20:
        raise ValueError(f'{name}={shown(text)}: {size:,} bytes are no memory of a GPU; give a unit, as in "{size}GB"')
    return size


def checked_gpu(name: str) -> str:
    """The name of a GPU that is known. Raises ValueError for another."""
    if not isinstance(name, str) or known_gpu(name) is None:
        known("device", name, [mark.upper() for gpu in GPUS for mark in gpu.marks])
    return name
