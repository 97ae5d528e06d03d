"""The attention function that Transformers calls in every layer: what it is given is checked, translated, and handed
to `ringattn.attention`; what cannot be kept is refused with the model, the argument and the remedy."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ringattn.attention import attention
from ringattn.comm import together, told
from ringattn.context import ContextParallel
from ringattn.integrations.transformers.positions import PositionWarning, beyond_positions
from ringattn.integrations.transformers.ring import Ring
from ringattn.integrations.transformers.structure import Structure, describe_model, mask_function, window

# Arguments that come along with a layer's call and ask nothing of attention.
IGNORED = frozenset(
    "use_cache output_hidden_states output_router_logits return_dict max_length_q max_length_k num_items_in_batch "
    "shift_labels logits_to_keep cache_position".split()
)


class RingAttention:
    """What Transformers' registry holds under one name: the rings of the models that use it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.default: Ring | None = None
        self.of_layer: WeakKeyDictionary[nn.Module, Ring] = WeakKeyDictionary()

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Structure | Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """See `transformers.AttentionInterface`.

        query `[batch, num_heads, local_seqlen, head_dim]`, key and value `[batch, num_kv_heads, local_seqlen, ...]`;
        returns `[batch, local_seqlen, num_heads, v_head_dim]`.
        """
        model = describe_model(getattr(module, "config", None))
        ring = self.ring(module, model)
        with together(ring.cp.link.transport, f"a layer of {model}"):  # what one rank refuses, all of them refuse
            refuse_others(model, others)
            structure = structure_of(module, model, attention_mask, is_causal, sliding_window)
            if key.shape[2] != query.shape[2]:
                raise NotImplementedError(
                    f"{model}: {query.shape[2]} queries and {key.shape[2]} keys in one layer: a KV cache or cross-"
                    "attention; pass use_cache=False, and decode after model.set_attn_implementation('sdpa')"
                )
            batch = ring.batch(model, query.shape[2], cu_seq_lens_q, cu_seq_lens_k, seq_idx, position_ids)
            if ring.check_positions:
                batch.check_positions(structure, position_ids)
            cp, mask = batch.layer(structure)
            layer = getattr(module, "layer_idx", None)
            out = attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                cp=cp,
                mask=mask,
                scale=scaling,
                softcap=softcap,
                sinks=s_aux,
                dropout_p=dropout,
                seed=ring.layer_seed(model, layer, dropout),
                label=_label(layer),
            )
        return out, None

    def ring(self, module: nn.Module, model: str) -> Ring:
        """The ring of the model that a layer belongs to; a layer keeps the one of its first call."""
        ring = self.of_layer.get(module) or self.default
        if ring is None:
            raise ValueError(
                f"{model} attends with {self.name!r}, which was registered for other models; call "
                "register(cp, model) for this one too, or model.set_attn_implementation('sdpa') if it is not sharded "
                "(registering a model changes its config, which others may share)"
            )
        self.of_layer.setdefault(module, ring)
        return ring

    def bind(self, model: nn.Module, ring: Ring) -> None:
        """Gives all layers of a model this ring."""
        for module in model.modules():
            self.of_layer[module] = ring

    def expect(self, model: nn.Module) -> None:
        """Raises at the end of the model's first forward if none of its layers has asked for attention."""

        def implementation() -> str | None:
            return getattr(getattr(model, "config", None), "_attn_implementation", None)

        def check(*_: Any) -> None:
            if torch.compiler.is_compiling() or implementation() != registered:
                return  # it has been given another attention since
            if not self.of_layer[model].asked:  # the ring of its last registration
                raise NotImplementedError(
                    f"{type(model).__name__} computes its attention itself, without asking Transformers' registry, so "
                    "each rank attended to its own shard alone: nothing of this result is right; take a model that "
                    "supports attn_implementation, or call ringattn.attention in its layers yourself"
                )
            handle.remove()

        registered = implementation()  # of some models no other can be set
        handle = model.register_forward_hook(check)

    def refuse_whole_labels(self, model: nn.Module) -> None:
        """Has a causal language model refuse labels that it would shift within each shard, at whose end a target is
        then missing, or the next shard's is another document's."""
        config: Any = model.config
        registered = config._attn_implementation

        def check(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
            link = self.of_layer[model].cp.link
            if config._attn_implementation != registered or link.transport.world_size == 1:
                return  # it may have been given another attention since, and whole sequences
            if given.get("labels") is not None and given.get("shift_labels") is None:
                with told(link.transport, "labels"):
                    raise ValueError(
                        f"{type(model).__name__} was given labels without shift_labels and would shift them within "
                        "each rank's shard; pass shard_batch(cp, batch), or "
                        "shift_labels=cp.shard(ringattn.loss.shift_labels(labels)) and no labels"
                    )

        if "CausalLM" in type(model).__name__ or "ConditionalGeneration" in type(model).__name__:
            model.register_forward_pre_hook(check, with_kwargs=True)


def refuse_others(model: str, others: dict[str, Any]) -> None:
    """Raises for an argument that is set and that attention here would have to drop."""
    asked = [name for name, value in others.items() if name not in IGNORED and value is not None and value is not False]
    remedies = {
        "position_bias": "give the bias as bias= to ringattn.attention, or keep that layer on another attention",
        "cache": "pass use_cache=False",
        "output_attentions": "leave it out: attention weights are never formed here",
    }
    if asked:
        remedy = remedies.get(asked[0], "leave it out, or keep that model on another attention")
        raise NotImplementedError(f"{model} passes {asked[0]} to its attention, which cannot be kept here: {remedy}")


def structure_of(
    module: nn.Module, model: str, given: Structure | Tensor | None, is_causal: bool | None, width: int | None
) -> Structure:
    """The layer's structure: as the mask function gave it, or from the layer's own arguments where it was not asked."""
    width = width or None  # some configs say 0 for none
    if isinstance(given, Tensor):
        raise NotImplementedError(
            f"{model}: attention_mask is a tensor of shape {tuple(given.shape)}; a mask of the sequence squared is "
            "never built or taken here. Pass the 2-D padding mask or none to the model, and describe documents by "
            "cu_seq_lens_q, any other mask by ContextParallel(mask=...)"
        )
    if given is None:
        is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        return Structure(is_causal, () if width is None else (window(width),), model=model)
    if given.refusal is not None:
        raise given.refusal
    if width is not None and window(width) not in given.limits and given.causal:
        raise NotImplementedError(
            f"{model}: a layer asks for sliding_window={width}, but its mask is made of {given.limits or 'no window'}; "
            "they must say the same"
        )
    return given


def register(
    cp: ContextParallel, model: nn.Module | None = None, *, name: str = "ringattn", check_positions: bool = True
) -> Ring:
    """Makes sharded attention known to Transformers under `name`, with its mask function.

    Args:
        cp: the context; its first mask is what a layer without a window sees (causal, unless given), and windows of
            layers come from the model. `masks_of(config)` names a whole stack's, so that the layout suits all of them.
            Documents come with each batch (`cu_seq_lens_q`), and so does the batch's length.
        model: the model that attends in this context, which is switched to `name`. Without one, any model whose
            `attn_implementation` is `name` does, from its first call on; a later `register(cp)` with another group
            is for models that have not been called yet. Two models in one process are best named.
        name: the attention implementation's name.
        check_positions: whether `position_ids` are compared with the tokens' positions (see `Ring`).

    Returns the ring; `ring.use(cp)` takes another context for the calls that follow. Warns with the setting to write
    (`PositionWarning`) where the context's sequences are longer than the model's `max_position_embeddings` and its RoPE
    is not scaled to them.

    From then on a causal language model that is given `labels` without `shift_labels` on several ranks is a
    `ValueError`: it would shift them within each shard.

    Raises `ValueError` for a name that Transformers would take for something else, or that is taken.
    """
    if not isinstance(cp, ContextParallel):
        raise ValueError(f"cp is a {type(cp).__name__}: the context comes first, as register(cp, model)")
    for word in ("flash", "sdpa", "flex_attention", "/"):
        if word in name:
            raise ValueError(
                f"name={name!r}: Transformers takes names with {word!r} for one of its own kinds; name it 'ringattn'"
            )
    held = ALL_ATTENTION_FUNCTIONS.get(name)
    if held is not None and not isinstance(held, RingAttention):
        raise ValueError(f"name={name!r}: another attention is registered under it; choose another name")
    registered = RingAttention(name) if held is None else held
    AttentionInterface.register(name, registered)
    AttentionMaskInterface.register(name, mask_function)
    if model is None and registered.default is not None and registered.default.cp.link is cp.link:
        registered.default.check_positions = check_positions
        registered.default.use(cp)
        return registered.default
    ring = Ring(cp, check_positions)
    said = None if model is None else beyond_positions(model.config, cp.seqlen)
    if said is not None:
        warnings.warn(said, PositionWarning, stacklevel=2)
    if model is None:
        registered.default = ring
    else:
        known = model in registered.of_layer
        registered.bind(model, ring)
        model.set_attn_implementation(name)  # type: ignore[operator]
        registered.expect(model)
        if not known:
            registered.refuse_whole_labels(model)
    return ring


def _label(layer: int | None) -> str:
    """What errors call a layer. In a compiled graph it has no name: each name would be a graph of its own."""
    return "" if layer is None or torch.compiler.is_compiling() else f"layer {layer}"
