"""Exact attention over sequences that do not fit one device."""

from ringattn import loss
from ringattn.attention import attention
from ringattn.comm import Loopback, PeerError
from ringattn.context import ContextParallel
from ringattn.geometry.layouts import Layout
from ringattn.kernels.scores import alibi
from ringattn.links import measure_links
from ringattn.masks import (
    Mask,
    bigbird,
    causal,
    chunked,
    dilated,
    documents,
    full,
    global_tokens,
    longformer,
    prefix_lm,
    sliding_window,
    strided,
)
from ringattn.packing import Packing, pack
from ringattn.planning.assign import assign
from ringattn.planning.assignment import Assignment
from ringattn.planning.rates import Rates
from ringattn.planning.shape import Shape
from ringattn.planning.topology import Link, Topology
from ringattn.rolling import roll
from ringattn.runtime.offload import offloaded
from ringattn.runtime.settings import Options
from ringattn.show import show
from ringattn.tiled import tiled

__all__ = [
    "Assignment",
    "ContextParallel",
    "Layout",
    "Link",
    "Loopback",
    "Mask",
    "Options",
    "Packing",
    "PeerError",
    "Rates",
    "Shape",
    "Topology",
    "alibi",
    "assign",
    "attention",
    "bigbird",
    "causal",
    "chunked",
    "dilated",
    "documents",
    "full",
    "global_tokens",
    "longformer",
    "loss",
    "measure_links",
    "offloaded",
    "pack",
    "prefix_lm",
    "roll",
    "show",
    "sliding_window",
    "strided",
    "tiled",
]
