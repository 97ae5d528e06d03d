"""Settings of every test: one thread, one seed, which marked tests run where, and what their processes have loaded."""

import multiprocessing
import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.support.clock import patience

# Triton reads it when a kernel is defined: without a GPU its kernels run on the CPU, here and in every process.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What `ringattn.testing.run_processes` and `ringattn check` fork their processes from has these loaded.
multiprocessing.set_forkserver_preload(
    [
        *("torch", "torch.distributed", "torch.distributed.checkpoint", "torch._dynamo", "numpy", "pytest"),
        *("ringattn", "ringattn.testing", "transformers.trainer"),
        *("transformers.models.llama.modeling_llama", "transformers.models.gemma3.modeling_gemma3"),
    ]
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--soak", action="store_true", help="what is marked soak too, and chance tried many times over")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --run-slow"))
        if "soak" in item.keywords and not config.getoption("--soak"):
            item.add_marker(pytest.mark.skip(reason="soak: runs with --run-slow --soak"))
        limit = item.get_closest_marker("timeout")
        seconds = limit.args[0] if limit else float(config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(patience(seconds)), append=False)
    # the longest first, so that no worker waits for another at the end
    items.sort(key=lambda item: -item.get_closest_marker("timeout").args[0])  # type: ignore[union-attr]


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether a test of what depends on chance is to be a long one."""
    return bool(request.config.getoption("--soak"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN (integers: the largest value), so a result that reads any of it shows."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(deterministic)
