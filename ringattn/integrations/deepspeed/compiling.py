"""What DeepSpeed would compile unasked: on a CPU, when it starts, its sums over shared memory."""

from __future__ import annotations

import os
import sys

import deepspeed.ops
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops

SUMS = "deepspeed_shm_comm"


def compile_nothing() -> None:
    """Leaves DeepSpeed's sums over shared memory (`deepspeed_shm_comm`) out, unless they came with the package, and
    says so; gloo sums then. DeepSpeed would compile them when it starts on a CPU: two minutes, or an error where there
    is no compiler or no ninja.

    Call it before DeepSpeed starts, so before Transformers' `TrainingArguments(deepspeed=...)`; `initialize` does. On
    a GPU there is nothing to leave out.
    """
    if get_accelerator().device_name() != "cpu" or comm.is_initialized() or installed_ops.get(SUMS):
        return
    known = deepspeed.ops.__compatible_ops__  # DeepSpeed's own list of what this machine can build
    if not known.get(SUMS):
        return
    known[SUMS] = False
    if os.environ.get("RANK", "0") == "0":
        print(
            f"ringattn: {SUMS} is not built and left out, gloo sums instead; to have it, install DeepSpeed with "
            "DS_BUILD_SHM_COMM=1",
            file=sys.stderr,
            flush=True,
        )
