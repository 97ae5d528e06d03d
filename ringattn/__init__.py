"""Exact attention over sequences that do not fit one device."""

from ringattn.attention import attention
from ringattn.comm import Loopback, PeerError
from ringattn.context import ContextParallel, Options
from ringattn.cost import Rates
from ringattn.layouts import Layout
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

__all__ = [
    "ContextParallel",
    "Layout",
    "Loopback",
    "Mask",
    "Options",
    "PeerError",
    "Rates",
    "attention",
    "bigbird",
    "causal",
    "chunked",
    "dilated",
    "documents",
    "full",
    "global_tokens",
    "longformer",
    "prefix_lm",
    "sliding_window",
    "strided",
]
