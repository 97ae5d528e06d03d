"""Token-wise modules in pieces: the gradients of the whole, one for each parameter, and nothing held in between."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import ringattn
from ringattn.testing import run_processes

WIDTH, INNER, TOKENS = 6, 17, 11


class MLP(nn.Module):
    """Of the tokens' norm; with ``dropout`` drawn anew at each call."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up = nn.RMSNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, 2 * INNER)
        self.down, self.dropout = nn.Linear(INNER, WIDTH, bias=False), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(self.norm(x)).chunk(2, dim=-1)
        return x + self.dropout(self.down(F.silu(gate) * value))


def made(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> tuple[MLP, Tensor]:
    torch.manual_seed(3)
    return MLP(dropout).to(dtype), torch.randn(2, TOKENS, WIDTH, dtype=dtype, requires_grad=True)


def gradients(model: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The result of a call, and the gradients of all that it depends on."""
    model.zero_grad()
    x.grad = None
    out = call(x * 1)
    out.sin().sum().backward()
    return [out.detach(), *(y.grad.clone() for y in (x, *model.parameters()))]


def rounding(dtype: torch.dtype) -> float:
    return 4 * TOKENS * torch.finfo(dtype).eps


@pytest.mark.parametrize("tiles", [1, 2, 3, TOKENS, 50])
@pytest.mark.parametrize("amp", [False, True])
def test_pieces_have_the_gradients_of_the_whole(tiles: int, amp: bool) -> None:
    model, x = made(torch.float32 if amp else torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        whole = gradients(model, x, model)
        found = gradients(model, x, lambda y: ringattn.tiled(model, y, tiles=tiles))
    for one, other in zip(found, whole, strict=True):
        bound = 0 if tiles == 1 else rounding(torch.bfloat16 if amp else torch.float64) * float(other.abs().max())
        assert float((one - other).abs().max()) <= bound


def test_several_tensors_go_in_and_come_out_along_any_dim() -> None:
    x, turn = torch.randn(TOKENS, 3, 4, dtype=torch.float64, requires_grad=True), torch.randn(TOKENS, 1, 4)
    weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    def fn(x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x @ weight * turn
        return y[:, :2], y[:, 2:].float(), y.argmax(-1)

    model = nn.ParameterList([weight])
    for dim in (0, -3):
        found = ringattn.tiled(fn, x, turn, tiles=4, dim=dim)
        for one, other in zip(found, fn(x, turn), strict=True):
            torch.testing.assert_close(one, other)
    assert [y.requires_grad for y in found] == [True, True, False]
    first = gradients(model, x, lambda y: sum(z.sum() for z in ringattn.tiled(fn, y, turn, tiles=4, dim=0)[:2]))
    for one, other in zip(first, gradients(model, x, lambda y: sum(z.sum() for z in fn(y, turn)[:2])), strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_is_drawn_again_as_it_was() -> None:
    """The masks that forward drew, seen from outside: its result is linear in the kept ones."""
    model, x = made(dropout=0.5)
    torch.manual_seed(5)
    out = ringattn.tiled(model, x, tiles=3)
    state = torch.get_rng_state()
    kept = ((out - x) != 0).double() * 2
    given = torch.autograd.grad(out.sin().sum(), [x, *model.parameters()])
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    expected = torch.autograd.grad((x + kept * (model(x) - x)).sin().sum(), [x, *model.parameters()])
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradients_of_16_bits_are_added_up_in_32() -> None:
    """512 pieces of one token, each with a gradient of 1, which bf16 cannot count beyond 256."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    ringattn.tiled(lambda x: x * weight, torch.ones(1, 512, 1, dtype=torch.bfloat16), tiles=512).sum().backward()
    assert weight.grad is not None
    assert (weight.grad.dtype, float(weight.grad)) == (torch.bfloat16, 512)


def test_parameters_that_only_some_pieces_use_are_found() -> None:
    """As the experts of a router are."""
    experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2))
    x = torch.cat([torch.ones(1, 4, WIDTH), -torch.ones(1, 4, WIDTH)], dim=1).double().requires_grad_()

    def route(x: Tensor) -> Tensor:
        return experts[0](x) if float(x.detach().min()) > 0 else experts[1](x)

    found = gradients(experts, x, lambda y: ringattn.tiled(route, y, tiles=2))
    whole = gradients(experts, x, lambda y: torch.cat([experts[0](y[:, :4]), experts[1](y[:, 4:])], dim=1))
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("outer", ["checkpoint", "offloaded", "twice"])
def test_inside_of_what_else_saves_memory(outer: str, tmp_path: Any) -> None:
    model, x = made()

    def call(y: Tensor) -> Tensor:
        return ringattn.tiled(model, ringattn.tiled(model, y, tiles=3), tiles=2)

    def wrapped(y: Tensor) -> Tensor:
        if outer == "checkpoint":
            return checkpoint(call, y, use_reentrant=False)
        if outer == "twice":
            return ringattn.tiled(call, y, tiles=2)
        with ringattn.offloaded(tmp_path):
            return call(y)

    for one, other in zip(gradients(model, x, wrapped), gradients(model, x, lambda y: model(model(y))), strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_is_held_but_what_goes_in() -> None:
    model, x = made()
    held = []

    def keep(y: Tensor) -> Tensor:
        held.append(y)
        return y

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        out = ringattn.tiled(model, x, tiles=3)
    assert sorted(y.data_ptr() for y in held) == sorted(y.data_ptr() for y in (x, *model.parameters()))
    with torch.no_grad():
        assert torch.equal(ringattn.tiled(model, x, tiles=3), out)


@pytest.mark.slow
def test_in_a_compiled_graph() -> None:
    model, x = made()
    compiled = torch.compile(lambda y: ringattn.tiled(model, y, tiles=3), fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(model, x, lambda _: compiled(x)), gradients(model, x, model), strict=True):
        torch.testing.assert_close(one, other)


# -- on ranks ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """Calls its own parts in pieces, of which each rank has another number."""

    def __init__(self, tiles: int) -> None:
        super().__init__()
        self.mlp, self.tiles = MLP(), tiles

    def forward(self, x: Tensor) -> Tensor:
        return ringattn.tiled(self.mlp, x, tiles=self.tiles) if self.tiles else self.mlp(x)


def step(rank: int, world_size: int, engine: str, tiled: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The gradients of a step, and a name for each time that a parameter got one."""
    torch.manual_seed(0)
    block, seen = Block(2 + rank if tiled else 0).double(), []
    model: nn.Module = block
    if engine == "ddp":
        model = DistributedDataParallel(block)
    else:
        policy = MixedPrecisionPolicy(param_dtype=torch.float32) if engine == "fsdp mixed" else MixedPrecisionPolicy()
        fully_shard(block, mesh=init_device_mesh("cpu", (world_size,)), mp_policy=policy)
    for name, parameter in block.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    x = torch.randn(world_size, 7 + rank, WIDTH, dtype=torch.float64)
    model(x).sin().sum().backward()
    whole = {n: p.grad.full_tensor() if engine != "ddp" else p.grad for n, p in block.named_parameters()}
    return whole, sorted(seen)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "fsdp mixed"])
def test_wrappers_see_one_gradient_of_each_parameter(engine: str) -> None:
    for tiled, plain in zip(run_processes(step, 2, engine, True), run_processes(step, 2, engine, False), strict=True):
        assert tiled[1] == plain[1] == sorted(plain[0])
        bound = rounding(torch.float32 if engine == "fsdp mixed" else torch.float64)
        for name, grad in plain[0].items():
            assert float((tiled[0][name] - grad).abs().max()) <= bound * float(grad.abs().max())


def refused(rank: int, world_size: int) -> str:
    mlp = fully_shard(MLP(), mesh=init_device_mesh("cpu", (world_size,)))
    x = torch.randn(1, 4, WIDTH, requires_grad=True)
    for fn in (mlp, lambda y: mlp(y)):
        with pytest.raises(NotImplementedError, match=r"fully_shard has wrapped .*wrap the module whose forward calls"):
            ringattn.tiled(fn, x, tiles=2)
    return dist.get_backend()


@pytest.mark.slow
def test_what_would_gather_for_each_piece_is_refused() -> None:
    run_processes(refused, 2)


# -- refusals ---------------------------------------------------------------------------------------


def test_refusals() -> None:
    model, x = made()
    outside = x * 2
    hooked = nn.Parameter(torch.ones(()))
    hooked.register_hook(lambda grad: grad)
    for call, said in (
        (lambda: ringattn.tiled(model, x, tiles=0), "tiles=0: must be at least 1"),
        (lambda: ringattn.tiled(model, x, tiles=2, dim=3), "dim=3 of a tensor"),
        (lambda: ringattn.tiled("mlp", x, tiles=2), "fn='mlp': must be a module or a function"),
        (lambda: ringattn.tiled(model, x, x[:, 1:], tiles=2), r"others\[0\] .* as many tokens in dim 1"),
        (lambda: ringattn.tiled(lambda y: y.sum(1), x, tiles=2), "for a piece of 5 tokens in dim 1"),
        (lambda: ringattn.tiled(lambda y: y[:, 1:], x, tiles=2), "must have as many"),
        (lambda: ringattn.tiled(lambda y: None, x, tiles=2), "fn returned None"),
        (lambda: ringattn.tiled(lambda y: y * outside[:, :1], x, tiles=2), "MulBackward0 made outside of it"),
        (lambda: ringattn.tiled(lambda y: y * hooked, x, tiles=2), "register_post_accumulate_grad_hook"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
