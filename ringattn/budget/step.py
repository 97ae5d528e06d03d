"""A training step on one rank: what lies in memory at each of its moments, tensors that know their formulas.

Between a layer's forward and its backward lies what the way of computing it keeps; while one layer runs backward, the
layers before it still hold theirs, and the gradients of those behind it are there. So the peak is found by walking over
the layers once, and looking into each (`Tape`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ringattn.budget.amounts import Amount, named
from ringattn.budget.layers import CASTS, INPUT, OUT, QKV, WEIGHTS, LayerCode, Numerics, Scratch
from ringattn.budget.model_shape import LayerShape, ModelShape
from ringattn.budget.tape import ACTIVATIONS, Moment, Tape, Tensor, largest
from ringattn.budget.zero import GATHERED, Zero

LOGITS, RANDOM = "logits", "random states"
LEAST = 1 << 16  # bytes below which `ringattn.offloaded` lets a tensor stay
GENERATOR = named("bytes of a CPU generator's state", 5056)

Alive = tuple[tuple[Tensor, int], ...]


@dataclass(frozen=True, slots=True)
class Way:
    """How a step saves memory. recompute: none, attention (a layer keeps its input and attention's result) or full (its
    input). token_chunks: pieces in which all but attention is computed, and again backward; 0: all at once. offload:
    what is kept is elsewhere meanwhile. loss_chunks: pieces of the logits. fused_loss: their gradient is computed
    forward and takes their place, as in Liger's fused linear cross entropy (arXiv 2410.10989)."""

    recompute: str = "none"
    token_chunks: int = 0
    offload: bool = False
    loss_chunks: int = 8
    fused_loss: bool = False


@dataclass(frozen=True)
class Step:
    """``persistent`` lies there all the time: parameters, moments of the optimizer, buffers. ``around``: what a step
    holds from its beginning to its end. ``gathering``: how parameters that lie in parts are brought together; ``zero``:
    that, and how gradients are summed, as DeepSpeed does (stage, ranks, numbers of its bucket).
    ``generators``: whether states of random generators lie with the rest, as on a CPU. ``grown``: what the first
    backward leaves in the kernel's caches. ``updating``: what the optimizer takes in its step. ``layer``: whose layers
    these are."""

    model: ModelShape
    code: str
    tokens: Amount
    numerics: Numerics
    way: Way = Way()
    scratch: Scratch = field(default_factory=Scratch)
    persistent: Alive = ()
    around: Alive = ()
    gathering: Gathering | None = None
    zero: tuple[int, int, int] | None = None
    generators: bool = True
    grown: Alive = ()
    accumulates: bool = False
    updating: Alive = ()
    layer: Callable[..., LayerCode] = LayerCode

    def accumulating(self) -> Step:
        """The same for the later of several micro-batches: the gradients of those before lie there all the time."""
        gradients = () if self.taken else _each(self.weights)
        return replace(self, around=(*self.around, *gradients), accumulates=True)

    @cached_property
    def weights(self) -> tuple[Tensor, ...]:
        """The gradients of all parameters."""
        return (*self._root, *(x for shape in self.model.layers for x in self.layers[shape].left))

    @cached_property
    def dealt(self) -> Zero | None:
        """What DeepSpeed does with them."""
        if self.zero is None:
            return None
        stage, ranks, bucket = self.zero
        return Zero(stage, ranks, self.numerics.weight, self.weights, bucket)

    @property
    def taken(self) -> bool:
        """Whether gradients do not stay where they are made."""
        return self.zero is not None and self.zero[0] > 1

    @cached_property
    def width(self) -> Amount:
        return named("width", self.model.width)

    def layer_code(self, shape: LayerShape) -> LayerCode:
        return self.layer(self.code, shape, self.width, self.numerics, self.scratch)

    # -- what a layer keeps -------------------------------------------------------------------

    @cached_property
    def layers(self) -> dict[LayerShape, LayerMoments]:
        """Each kind of layer, looked into once."""
        return {shape: _moments(self, self.layer_code(shape)) for shape in self.model.kinds}

    @property
    def _first_backward(self) -> LayerMoments:
        """Of the last layer, whose backward is the first and leaves what the kernel keeps from then on."""
        grown = tuple(x for x, _ in self.grown)
        scratch = replace(self.scratch, backward=(*self.scratch.backward, *grown))
        return _moments(self, replace(self.layer_code(self.model.layers[-1]), scratch=scratch))

    @cached_property
    def moments(self) -> list[Moment]:
        """All that may be the largest, in the order of time."""
        return list(self._walk())

    @property
    def peak(self) -> Moment:
        return largest(self.moments)

    def _walk(self) -> Iterator[Moment]:
        gathering, root, zero = self.gathering, self._root, self.dealt
        always = (*self.persistent, *self.around, *(gathering.whole(root) if gathering else ()))
        always = (*always, *(zero.gathered if zero else ()))
        held: list[Alive] = []
        for number, shape in enumerate(self.model.layers):
            layer = self.layers[shape]
            others = (*always, *_flat(held), *layer.given)
            if zero:
                yield self._coming(number, layer).beside((*others, *zero.message), f"layer {number}, forward")
            if gathering:
                yield Moment(f"layer {number}, gathered", (*others, *gathering.arriving(layer.left)))
                others = (*others, *gathering.whole(layer.left))
            yield layer.forward.beside(others, f"layer {number}, forward: {layer.forward.name}")
            held.append(layer.held)
        last = self.tail
        yield last.forward.beside((*always, *_flat(held), *last.given), f"loss, forward: {last.forward.name}")
        for moment in last.backward[:-1]:
            yield moment.beside((*always, *_flat(held), *last.given), f"loss, {moment.name}")
        always, final = (*always, *(zero.bucketed if zero else ())), last.backward[-1]
        yield final.beside((*always, *_flat(held), *last.given), f"loss, {final.name}")
        yield from self._backward(always, held)

    def _coming(self, number: int, layer: LayerMoments) -> Moment:
        """The largest of a layer's forward while parameters are on their way: of the last layer before the last
        product, the last operation to keep something."""
        if number < len(self.model.layers) - 1 or self.way.token_chunks:
            return layer.forward
        tape = self.layer_code(self.model.layers[-1]).whole(self.tokens)
        return tape.forward(True, None if self.way.recompute == "none" else self.attended(tape))

    def attended(self, tape: Tape) -> list[Tensor]:
        """What a layer that is computed again keeps of attention."""
        return [x for x in tape.kept() if x.kind == OUT and self.way.recompute == "attention"]

    def _backward(self, always: Alive, held: list[Alive]) -> Iterator[Moment]:
        gathering = self.gathering
        staying = not (self.accumulates or self.taken)
        made: list[Alive] = [_each(self.tail.left)] if staying else []
        leaving: Alive = ()
        for number in reversed(range(len(self.model.layers))):
            first = number == len(self.model.layers) - 1
            layer = self._first_backward if first else self.layers[self.model.layers[number]]
            held.pop()
            others = (*always, *_flat(held), *_flat(made))
            if gathering:
                before = self.layers[self.model.layers[number - 1]].left if number else ()
                others = (*others, *gathering.whole(layer.left), *leaving)
                yield Moment(f"layer {number}, the next gathered", (*others, *layer.held, *gathering.arriving(before)))
                others = (*others, *gathering.arrived(before))
            for moment in layer.backward:
                yield moment.beside(others, f"layer {number}, {moment.name}")
            always = (*always, *self.grown) if first else always
            if staying:
                made.append(gathering.sharded(layer.left) if gathering else _each(layer.left))
            if gathering:
                leaving = gathering.leaving(layer.left)
                others = (*always, *_flat(held), *_flat(made), *_each(layer.left), *leaving, *gathering.arrived(before))
                yield Moment(f"layer {number}, gradients summed", others)
        size = self.tokens * self.width * self.numerics.residual
        dx = _gradient_of("the embedding's result", size)
        others = (*always, *_flat(made), (self._table, 1), *leaving)
        yield Moment("embedding, backward", ((dx, 1), *others))
        if staying:
            made.append(((self._table, 1),))
        if gathering and not self.accumulates:
            yield Moment("root, gradients summed", (*others, *gathering.leaving(self._root)))
            made = [gathering.sharded(self._root), *made[1:-1]]
        if zero := self.dealt:
            yield Moment("gradients summed", (*always, *zero.last, *_flat(made)))
            made = [zero.updating]
        always = (*self.persistent, *self.around, *self.grown)
        yield Moment("optimizer's step", (*always, *_flat(made), *self.updating))

    @property
    def _table(self) -> Tensor:
        rows = named("vocabulary", self.model.vocabulary)
        return Tensor(WEIGHTS, "embedding", rows * self.width * self.numerics.weight)

    @property
    def _root(self) -> tuple[Tensor, ...]:
        """What is in no layer."""
        own = tuple(self.tail.left)
        return own if self.model.tied else (*own, self._table)

    # -- the end of the model -----------------------------------------------------------------

    @cached_property
    def tail(self) -> LayerMoments:
        """The last norm and the loss in chunks, each of which is computed again backward."""
        chunks = named("loss chunks", self.way.loss_chunks)
        code = self.layer_code(self.model.layers[-1])
        x = code.input(self.tokens)
        norm = Tape((x,))
        hidden = code.norm(norm, x, self.tokens)
        norm.results = (hidden,)
        if self.way.fused_loss:
            return self._fused(norm, x, hidden)
        kept = self._put_away([*norm.kept(), hidden.storage])
        held = (*_each(kept), *self._states(chunks.value))
        piece = self._piece(code, self.tokens.over(chunks), hidden)
        forward = Moment(piece.forward().name, (*_each([*norm.kept(), hidden]), *piece.forward().alive))
        moment, left = piece.backward()
        rows = _gradient_of("the chunks' rows", hidden.size)
        again = largest([moment, piece.forward(again=True)])
        summed = ((left[0], 1),) if self.way.loss_chunks > 1 else ()
        pieces = again.beside((*held, (rows, 1), *summed), f"backward of a chunk: {again.name}")
        joined = _gradient_of("the last norm's result", hidden.size)
        both = Moment("gradients of chunks joined", (*held, (rows, 1), (joined, 1), *_each(left)))
        moment, weights = norm.backward()
        final = moment if self.taken else moment.beside(_each(left))
        given = () if self.way.offload else ((x, 1),)
        return LayerMoments(given, held, forward, (pieces, both, final), (*left, *weights))

    def _fused(self, norm: Tape, x: Tensor, hidden: Tensor) -> LayerMoments:
        n, rows = self.numerics, self.tokens.over(named("loss chunks", self.way.loss_chunks))
        vocabulary = named("vocabulary", self.model.vocabulary)
        logits = Tensor(LOGITS, "logits of a chunk, then their gradient", rows * vocabulary * n.compute)
        weight = Tensor(WEIGHTS, "weight of head", vocabulary * self.width * n.weight)
        back = _gradient_of("the last norm's result", hidden.size)
        kept = (*_each(self._put_away(norm.kept())), (back, 1), (weight, 1))
        forward = Moment("logits of a chunk", _each([*norm.kept(), hidden, back, weight, logits]))
        moment, weights = norm.backward()
        given = () if self.way.offload else ((x, 1),)
        return LayerMoments(given, kept, forward, (moment.beside(((weight, 1),)),), (weight, *weights))

    def _piece(self, code: LayerCode, rows: Amount, hidden: Tensor) -> Tape:
        n, vocabulary = self.numerics, named("vocabulary", self.model.vocabulary)
        given = Tensor(INPUT, "rows of a chunk", rows * self.width * code.normed)
        tape = Tape((given,))
        logits = code.linear(tape, given, rows, self.width, vocabulary, "head", LOGITS, code.normed)
        wide = code.cast(tape, logits, n.compute, n.wide, rows * vocabulary, "logits in fp32", LOGITS)
        logs = Tensor(LOGITS, "log-probabilities", rows * vocabulary * n.wide)
        tape.run("log softmax", (wide,), (logs,), keeps=(logs,))
        loss = Tensor(LOGITS, "loss", n.wide)
        tape.run("loss", (logs,), (loss,), keeps=(logs,))
        tape.results = (loss,)
        return tape

    def _put_away(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What of them stays in memory."""
        kept = list(dict.fromkeys(tensors))
        return [x for x in kept if x.size.value < LEAST or x.kind == CASTS] if self.way.offload else kept

    def _states(self, count: int) -> Alive:
        return ((Tensor(RANDOM, "state of the generator", GENERATOR), count),) if self.generators else ()


@dataclass(frozen=True, slots=True)
class Gathering:
    """Parameters in parts on so many ``ranks``, brought together a layer at a time as FSDP2 does: the next one while
    one computes, while gradients of the one before are on their way to their parts. ``size``: bytes of a gathered
    number; ``copies``: that gloo gathers into memory of its own first; ``gradient``: bytes of one in parts, where they
    are not a weight's."""

    ranks: int
    weight: Amount
    size: Amount
    copies: bool = False
    gradient: Amount | None = None

    def whole(self, gradients: Sequence[Tensor]) -> Alive:
        """Parameters while they are whole: as many as they have gradients."""
        return self._as("parameters gathered", gradients)

    def arrived(self, gradients: Sequence[Tensor]) -> Alive:
        """The message of the next ones, until they are laid out as parameters."""
        return self._as("parameters of the next layer", gradients)

    def arriving(self, gradients: Sequence[Tensor]) -> Alive:
        """While they are on their way."""
        return (*self.arrived(gradients), *(self._as("gloo's copy", gradients) if self.copies else ()))

    def leaving(self, gradients: Sequence[Tensor]) -> Alive:
        """Gradients on their way to their parts."""
        return self._as("gradients on their way", gradients)

    def sharded(self, gradients: Sequence[Tensor]) -> Alive:
        """This rank's part of them."""
        parts = named("ranks", self.ranks)
        if self.gradient is None or self.gradient.value == self.weight.value:
            return tuple((replace(x, size=x.size.over(parts)), 1) for x in gradients)
        numbers = sum(x.size.value for x in gradients) // max(self.weight.value, 1)
        size = (named("parameters", numbers) * self.gradient).over(parts)
        return ((Tensor(WEIGHTS, "gradients in parts", size), 1),)

    def _as(self, name: str, gradients: Sequence[Tensor]) -> Alive:
        """As many bytes as their numbers take when gathered."""
        numbers = sum(x.size.value for x in gradients) // max(self.weight.value, 1)
        return ((Tensor(GATHERED, name, named("parameters", numbers) * self.size), 1),) if numbers else ()


@dataclass(frozen=True)
class LayerMoments:
    """A layer: what it is ``given`` and holds while it runs, what is ``held`` of it between forward and backward (its
    input included), the largest moment forward and those backward, the gradients that it leaves, and what is ``kept``
    for backward, wherever that is."""

    given: Alive
    held: Alive
    forward: Moment
    backward: tuple[Moment, ...]
    left: tuple[Tensor, ...]
    kept: Alive = ()


def _moments(step: Step, code: LayerCode) -> LayerMoments:
    return _tiled(step, code) if step.way.token_chunks else _at_once(step, code)


def _at_once(step: Step, code: LayerCode) -> LayerMoments:
    way, tape = step.way, code.whole(step.tokens)
    (x,) = tape.inputs
    given = _each([x])
    stays = () if way.offload else given
    if way.recompute == "none":
        kept = step._put_away(tape.kept())
        moment, left = tape.backward(set(tape.kept()) - set(kept), step.taken)
        whole = (*given, *_each(tape.kept()))
        return LayerMoments(given, (*_each(kept), *stays), tape.forward(), (moment.beside(given),), left, whole)
    moment, left = tape.backward(taken=step.taken)
    attended = step.attended(
        tape
    )  # stays where it is: selective checkpointing keeps it itself, past offloading's hooks
    again = tape.forward(again=True)
    rerun = again.beside(_each([_gradient_of("the layer's result", x.size)]), f"computed again: {again.name}")
    held = (*_each(attended), *step._states(1), *stays)
    whole = (*given, *_each(attended))
    back = rerun.beside(given), moment.beside(given)
    return LayerMoments(given, held, tape.forward(keeping=attended), back, left, whole)


def _tiled(step: Step, code: LayerCode) -> LayerMoments:
    """Projection and conclusion in pieces, attention between them at once."""
    way, tokens = step.way, step.tokens
    pieces = tokens.over(named("token chunks", way.token_chunks))
    x = code.input(tokens)
    given: Alive = ((x, 1),)
    q, k, v = (Tensor(QKV, name, size) for name, size in zip("qkv", code.qkv(tokens), strict=True))
    attention = code.attention(tokens)
    out, lse = attention.operations[0].outputs
    project, conclude = code.projection(pieces), code.conclusion(pieces)
    result = Tensor(INPUT, "layer's result", x.size)
    attended = _each([out, lse])
    forward = [
        project.forward().beside(_each([q, k, v]), "projection of a piece"),
        attention.forward().beside(_each([q, k, v]), "attention"),
        conclude.forward().beside((*_each([q, k, v, result]), *attended), "conclusion of a piece"),
    ]
    dresult, dx, dout = (_gradient_of(*of) for of in (("the layer's result", x.size), ("x", x.size), ("out", out.size)))
    whole = _each([q, k, v]) if way.recompute == "none" else ()
    held = (
        *_each(step._put_away([q, k, v] if way.recompute == "none" else [])),
        *_each({"none": step._put_away([out, lse]), "attention": [out, lse], "full": []}[way.recompute]),
    )
    held = (*held, *step._states(2 if way.recompute == "none" else 1), *(given if not way.offload else ()))
    moment, of_conclusion = conclude.backward()
    again = largest([moment, conclude.forward()])
    weights = _each(of_conclusion)
    kept = (*(whole if not way.offload else ()), *attended)
    again = again.beside((*given, *kept, *weights, *_each([dresult, dx, dout])), f"conclusion of a piece: {again.name}")
    moment, _ = attention.backward()
    weights = () if step.taken else weights
    attending = moment.beside((*(() if way.offload else given), *_each([q, k, v]), (dx, 1), *weights), moment.name)
    moment, of_projection = project.backward()
    grads = [_gradient_of(y.name, y.size) for y in (q, k, v)]
    piece = largest([moment, project.forward()])
    twice = _gradient_of("x by the projection", x.size)
    projecting = piece.beside(
        (*given, *weights, *_each([dx, twice, *grads]), *_each(of_projection)), f"projection of a piece: {piece.name}"
    )
    back = [again, attending, projecting]
    if way.recompute != "none":
        rerun = largest(forward).beside((*given, (dresult, 1)), "computed again")
        back = [rerun, *(m.beside(_each([q, k, v])) if m is again else m for m in back)]
    left = (*of_conclusion, *of_projection)
    stored = (*given, *whole, *(attended if way.recompute != "full" else ()))
    return LayerMoments(given, held, largest(forward), tuple(back), left, stored)


def _gradient_of(name: str, size: Amount) -> Tensor:
    return Tensor(ACTIVATIONS, f"gradient of {name}", size)


def _each(tensors: Sequence[Tensor]) -> Alive:
    return tuple((x, 1) for x in tensors)


def _flat(parts: Sequence[Alive]) -> Alive:
    return tuple(x for part in parts for x in part)


__all__ = ["Step", "Way"]
