"""What one process sees of the subject: outputs, what a changed token changes, and a training step layer by layer."""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringattn.check import huggingface
from ringattn.check.attended import Attended
from ringattn.check.settings import DTYPES, Settings, SubjectError
from ringattn.check.subject import (
    Stack,
    Subject,
    call,
    declared,
    load_factory,
    make,
    settle_weights,
    stack_of,
    vocabulary,
)
from ringattn.context import ContextParallel
from ringattn.masks import Mask, causal, documents
from ringattn.runtime.settings import Options

JITTER = 1e-12  # relative, of the weights: what it does to a result bounds what other roundings can do


@dataclass(frozen=True)
class StepView:
    """One training step. ``layers``: the output of every submodule by its path, in the order they finished.
    ``gradients``: of the parameters that require one; None where the step left none. ``positions``: what the model was
    told: "global", "restart" (0, 1, 2 ... on a rank that holds other tokens), "missing" or "other"."""

    loss: float
    gradients: dict[str, Tensor | None]
    layers: dict[str, Tensor]
    positions: str


@dataclass(frozen=True)
class View:
    """All that one process saw. ``positions [local_seqlen]``: its tokens. ``logits [batch, local_seqlen, vocab]``.
    ``moved [probes, local_seqlen]``: by how much each output changes, at most, when one token does. ``attended``: the
    masks of one forward's calls of attention, in order."""

    positions: Tensor
    logits: Tensor
    moved: Tensor
    attended: tuple[Mask, ...]
    step: StepView


@dataclass(frozen=True)
class Truth:
    """The run on one process in fp64. ``shaken``: the same with all roundings changed (in fp32, where that is the
    dtype of the sharded run). ``independent``: it did not compute with ringattn. ``weights``: a saved state dict."""

    view: View
    shaken: View
    stack: Stack
    vocab: int
    independent: bool
    weights: bytes


def layer_masks(stack: Stack, settings: Settings) -> tuple[Mask, ...]:
    """The masks of the layers for this run's packed documents."""
    if settings.documents == 1:
        return stack.masks
    packed = documents(settings.cu_seqlens)
    return tuple(mask & packed for mask in stack.masks)


def _context(settings: Settings, stack: Stack, **how: Any) -> ContextParallel:
    masks = tuple(dict.fromkeys(layer_masks(stack, settings)))
    options = Options(timeout=settings.timeout)
    return ContextParallel(dist.group.WORLD, settings.seqlen, mask=masks, options=options, **how)


def observe_single(rank: int, world_size: int, settings: Settings) -> Truth:
    """The truth: one process, fp64; a Hugging Face model with its own attention, any other with plain softmax."""
    factory = load_factory(settings.model)
    guess = declared(factory) or Stack((causal(),), False)
    cp = _context(settings, guess, kernel="reference")
    subject = make(factory, cp, settings.seed)
    stack = stack_of(factory, subject.model)
    masks = layer_masks(stack, settings)
    if set(masks) != set(cp.masks):
        cp = cp.replace(mask=masks)
        subject = make(factory, cp, settings.seed)
    model = subject.model.double()
    settle_weights(model, settings.seed)
    independent = huggingface.is_one(model)
    if independent:
        huggingface.make_independent(model, masks, settings.seqlen, packed=settings.documents > 1)
    vocab = vocabulary(model, settings)
    weights = io.BytesIO()
    torch.save(model.state_dict(), weights)
    view = _look(subject, cp, settings, vocab)
    model.load_state_dict(torch.load(io.BytesIO(weights.getvalue())))
    _shake(model, settings)
    return Truth(view, _look(subject, cp, settings, vocab), stack, vocab, independent, weights.getvalue())


def _shake(model: nn.Module, settings: Settings) -> None:
    if settings.dtype != "float64":
        model.to(DTYPES[settings.dtype])
        return
    draw = torch.Generator().manual_seed(settings.seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + JITTER * torch.randn(p.shape, generator=draw, dtype=p.dtype))


def observe_sharded(rank: int, world_size: int, settings: Settings, stack: Stack, vocab: int, weights: bytes) -> View:
    """One rank's view of the sharded run, with the weights of the single one."""
    cp = _context(settings, stack, layout=settings.layout, ulysses=settings.ulysses)
    subject = make(load_factory(settings.model), cp, settings.seed)
    subject.model.to(DTYPES[settings.dtype])
    subject.model.load_state_dict(torch.load(io.BytesIO(weights)))
    return _look(subject, cp, settings, vocab)


def _look(subject: Subject, cp: ContextParallel, settings: Settings, vocab: int) -> View:
    tokens = settings.tokens(vocab)
    with torch.no_grad():
        with Attended() as attended:
            logits = call(subject.model, cp.shard(tokens), cp.position_ids[None]).clone()
        moved = []
        for probe in settings.probes:
            changed = tokens.clone()
            changed[:, probe] = (tokens[:, probe] + 1 + vocab // 2) % vocab
            after = call(subject.model, cp.shard(changed), cp.position_ids[None])
            moved.append((after - logits).abs().amax(dim=(0, 2)))
    step = _step(subject, cp, tokens, settings.labels(tokens))
    return View(cp.position_ids, logits, torch.stack(moved), tuple(attended.masks), step)


def _step(subject: Subject, cp: ContextParallel, tokens: Tensor, labels: Tensor) -> StepView:
    model = subject.model
    model.zero_grad(set_to_none=True)
    layers: dict[str, Tensor] = {}
    told: list[str] = []
    with _recorded(model, cp, layers, told):
        loss = subject.step(model, tokens.clone(), labels.clone(), cp)
    if not isinstance(loss, (float, Tensor)) or (isinstance(loss, Tensor) and loss.numel() != 1):
        raise SubjectError(f"the step returned {loss!r:.200}: must be the loss, a number")
    gradients = {name: _whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    return StepView(
        float(torch.as_tensor(loss).detach()), gradients, layers, next((t for t in told if t != "global"), "global")
    )


def _whole(grad: Tensor | None) -> Tensor | None:
    full = getattr(grad, "full_tensor", None)  # of a DTensor
    return grad if grad is None else (full() if full else grad).detach().clone()


@contextlib.contextmanager
def _recorded(model: nn.Module, cp: ContextParallel, layers: dict[str, Tensor], told: list[str]) -> Iterator[None]:
    """Hooks that note every submodule's output and the positions the model is told, for the time of a step."""
    parameters = list(inspect.signature(model.forward).parameters)

    def note_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        at = given.get("position_ids", args[1] if len(args) > 1 and "input_ids" not in parameters else None)
        told.append(_kind_of(at, cp))

    def note_output(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found = _tensor_of(output)
            if found is not None:
                calls = sum(key == name or key.startswith(f"{name} (call ") for key in layers)
                layers[f"{name} (call {calls + 1})" if calls else name] = found.detach().clone()

        return hook

    hooks = [model.register_forward_pre_hook(note_positions, with_kwargs=True)]
    hooks += [m.register_forward_hook(note_output(name or "the model's output")) for name, m in model.named_modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _kind_of(at: object, cp: ContextParallel) -> str:
    if not isinstance(at, Tensor):
        return "missing" if at is None else "other"
    rows = at.reshape(-1, at.shape[-1]) if at.ndim else at.reshape(1, 1)
    if rows.shape[-1] == cp.local_seqlen and (rows == cp.position_ids).all():
        return "global"
    return "restart" if (rows == torch.arange(rows.shape[-1])).all() else "other"


def _tensor_of(output: Any) -> Tensor | None:
    """The tensor that a module's output is about: itself, its logits, or the first that it holds."""
    output = getattr(output, "logits", output)
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
