"""Builds of FlashAttention-2 and -3 from Hugging Face's hub of kernels. `auto` takes none of them: the first call would
load code from elsewhere, which is for its user to ask for by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from ringattn.kernels import flash2, flash3
from ringattn.kernels.base import Needs
from ringattn.kernels.flash import Operators

VERSION = 1  # of the builds' interface
PACKAGE = {"kernels": ">=0.10"}
CUDA = frozenset({"cuda"})


def _interface(repository: str) -> Any:
    build = import_module("kernels").get_kernel(repository, version=VERSION)
    return import_module(f"{build.__name__}.flash_attn_interface")


@cache
def load2() -> flash2.Package:
    """Fetches FlashAttention-2 once, and imports it."""
    return flash2.Package(_interface("kernels-community/flash-attn2"))


@cache
def load3() -> flash3.Package:
    """Fetches FlashAttention-3 once, and imports it."""
    return flash3.Package(_interface("kernels-community/flash-attn3"))


@dataclass(frozen=True)
class HubFlash2(flash2.Flash2):
    """The `hub_flash2` kernel."""

    load: Callable[[], Operators] = load2

    name = "hub_flash2"
    needs = Needs(CUDA, (8, 0), packages=PACKAGE)
    named_only = CUDA
    written_for = "kernels 0.17 with version 1 of kernels-community/flash-attn2"


@dataclass(frozen=True)
class HubFlash3(flash3.Flash3):
    """The `hub_flash3` kernel."""

    load: Callable[[], Operators] = load3

    name = "hub_flash3"
    needs = Needs(CUDA, (9, 0), (10, 0), PACKAGE)
    named_only = CUDA
    written_for = "kernels 0.17 with version 1 of kernels-community/flash-attn3"
