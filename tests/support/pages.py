"""The Python blocks of the documentation's pages, and the names that these say they come from."""

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

import ringattn

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> dict[str, list[str]]:
    """The Python blocks of a page by the heading they stand under."""
    found: dict[str, list[str]] = {}
    for section in re.split(r"^#+ (?=[A-Z]|ringattn$)", (ROOT / page).read_text(), flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        if code := re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            found[heading] = code
    return found


def everything() -> dict[str, Any]:
    """The names that the blocks say they come from."""
    from transformers import Trainer

    from ringattn.integrations import fsdp, transformers

    names = {"ringattn": ringattn, "torch": torch, "dist": dist, "F": F, "Trainer": Trainer}
    for module in (fsdp, transformers):
        names |= {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return names
