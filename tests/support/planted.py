"""Subjects for `ringattn check`: right models, and models and steps with one planted fault each."""

import os
import signal
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import ringattn
from launch.config import ModelConfig
from launch.model import Decoder, Layer
from ringattn.check.settings import IGNORED

SIZES = {"num_layers": 2, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "d_ff": 48}
WINDOW = 5


@dataclass(frozen=True)
class Fault:
    """What a planted model does wrong: nothing, by default."""

    mask: ringattn.Mask | None = None  # in place of the context's
    local_positions: bool = False
    cut: bool = False  # each rank attends to its own shard alone
    shifted: bool = False  # every token sees the embedding before it in the shard
    unstated: ringattn.Mask | None = None  # a mask that the factory does not state


class Planted(nn.Module):
    """The example's decoder as a user would wrap it, `model(tokens, position_ids)`."""

    def __init__(self, cp, fault=Fault()):
        super().__init__()
        self.decoder = Decoder(ModelConfig(**SIZES))
        self.cp, self.fault = cp, fault
        self.alone = ringattn.ContextParallel(None, cp.local_seqlen)

    def attend(self, layer, q, k, v):
        if self.fault.cut:
            return ringattn.attention(q, k, v, cp=self.alone)
        if self.fault.unstated is not None:
            return ringattn.attention(q, k, v, cp=self.cp, mask=self.fault.unstated)
        if self.fault.mask is not None:
            cp = self.cp.replace(mask=self.fault.mask, layout=self.cp.q_layout)
            return ringattn.attention(q, k, v, cp=cp)
        return ringattn.attention(q, k, v, cp=self.cp, mask=self.cp.masks[layer % len(self.cp.masks)])

    def forward(self, tokens, position_ids):
        at = torch.arange(tokens.shape[1]) if self.fault.local_positions else position_ids[0]
        if self.fault.shifted:
            tokens = F.pad(tokens[:, :-1], (1, 0))
        return self.decoder.head(self.decoder(tokens, at, self.attend))


def correct(cp):
    return Planted(cp)


def windowed(cp):
    return Planted(cp)


windowed.masks = [ringattn.sliding_window(WINDOW), ringattn.causal()]


def short_sighted(cp):
    return Planted(cp)


short_sighted.masks = [ringattn.sliding_window(WINDOW)] * 2


def dropped_window(cp):
    return Planted(cp, Fault(mask=ringattn.causal() & _documents(cp)))


dropped_window.masks = short_sighted.masks


def dropped_window_of_one(cp):
    """The other layer sees everything before it, so no output shows that this one does too."""
    return Planted(cp, Fault(mask=ringattn.causal() & _documents(cp)))


dropped_window_of_one.masks = windowed.masks


def three_layers(cp):
    """Layers take their masks by index from the context, which holds each mask once: the second layer's is wrong."""
    model = Planted(cp)
    model.decoder.layers.append(Layer(model.decoder.config, 2))
    return model


three_layers.masks = [ringattn.sliding_window(WINDOW), ringattn.sliding_window(WINDOW), ringattn.causal()]


def ignored_documents(cp):
    return Planted(cp, Fault(mask=ringattn.causal()))


def ignored_causality(cp):
    return Planted(cp, Fault(mask=_documents(cp)))


def local_positions(cp):
    return Planted(cp, Fault(local_positions=True))


def cut_ring(cp):
    return Planted(cp, Fault(cut=cp.world_size > 1))


def shift_in_shard(cp):
    return Planted(cp, Fault(shifted=True))


def zero_output(cp):
    """A fresh model whose output layer is zero: nothing shows unless the check moves the weights."""
    model = Planted(cp, Fault(mask=ringattn.causal()))
    nn.init.zeros_(model.decoder.head.weight)
    return model


def _documents(cp):
    """The documents of the context's first mask, `mask & documents`."""
    return cp.masks[0].args[1]


def stepped(**how):
    """A factory of the right model with a step of its own."""

    def factory(cp):
        return Planted(cp), lambda *call: own_step(*call, **how)

    return factory


def own_step(model, tokens, labels, cp, late=False, mean=False, scale=1.0, positions=True, skip="", report="sum"):
    """A step as users write them. `late`: labels are shifted after they were sharded. `mean`: the loss is the mean of
    local means. `skip`: parameters that are not reduced. `report`: the loss that is returned, "sum" or "share"."""

    def shift(x):
        return F.pad(x[:, 1:], (0, 1), value=IGNORED)

    targets = shift(cp.shard(labels)) if late else cp.shard(shift(labels))
    at = cp.position_ids if positions else torch.arange(cp.local_seqlen)
    logits = model(cp.shard(tokens), at[None])
    count = (targets != IGNORED).sum()
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    if mean:
        share = total / count.clamp(min=1) / cp.world_size
    else:
        dist.all_reduce(count)
        share = total / count
    (share * (scale if cp.world_size > 1 else 1.0)).backward()
    for name, p in model.named_parameters():
        if skip != "all" and not (skip and skip in name):
            dist.all_reduce(p.grad)
    loss = share.detach().clone()
    if report == "sum":
        dist.all_reduce(loss)
    return loss


own_right = stepped()
late_labels = stepped(late=True)
mean_of_means = stepped(mean=True)
doubled = stepped(scale=2.0)
averaged = stepped(scale=0.5)
odd_factor = stepped(scale=1.7)
step_positions = stepped(positions=False)
unreduced_head = stepped(skip="head")
unreduced = stepped(skip="all")
share_reported = stepped(report="share")


def detached(cp):
    """Forward is right; the gradient of one rank's share stops at the embedding."""
    model = Planted(cp)
    if cp.world_size > 1 and cp.rank == 1:
        model.decoder.embedding.register_forward_hook(lambda module, args, out: out.detach())
    return model


def raises_on_one(cp):
    if cp.world_size > 1 and cp.rank == 1:
        raise RuntimeError("this rank is out of luck")
    return Planted(cp)


def dies_on_one(cp):
    if cp.world_size > 1 and cp.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return Planted(cp)


def waits_on_one(cp):
    if cp.world_size > 1 and cp.rank == 1:
        signal.pause()
    return Planted(cp)


def unstated_mask(cp):
    return Planted(cp, Fault(unstated=ringattn.sliding_window(WINDOW)))


def not_a_model(cp):
    return "model"


# -- Hugging Face models, with the smallest attention function that keeps the interface's contract --------------


def _huggingface(cp, kind, fault="", **settings):
    import transformers

    def attend(module, query, key, value, attention_mask, scaling=None, sliding_window=None, s_aux=None, **others):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        of_kind = [m for m in cp.masks if ("sliding" in repr(m)) == (sliding_window is not None)]
        mask = cp.masks[-1] if fault == "window" else of_kind[0]
        return ringattn.attention(q, k, v, cp=cp, mask=mask, scale=scaling, sinks=s_aux), None

    transformers.AttentionInterface.register("stand_in", attend)
    sizes = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "tie_word_embeddings": False,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes, **settings)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="stand_in")


def llama(cp):
    return _huggingface(cp, "Llama")


def registered(cp):
    """As README has it."""
    from ringattn.integrations.transformers import register

    model = _huggingface(cp, "Llama")
    register(cp, model)
    return model


def mistral(cp):
    return _huggingface(cp, "Mistral", sliding_window=WINDOW + 1)


def qwen3(cp):
    kinds = ["sliding_attention", "full_attention"]
    return _huggingface(cp, "Qwen3", use_sliding_window=True, sliding_window=WINDOW + 1, layer_types=kinds)


def gpt_oss(cp):
    kinds = ["sliding_attention", "full_attention"]
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return _huggingface(cp, "GptOss", sliding_window=WINDOW + 1, layer_types=kinds, **experts)


def qwen3_dropped_window(cp):
    kinds = ["sliding_attention", "full_attention"]
    settings = {"use_sliding_window": True, "sliding_window": WINDOW + 1, "layer_types": kinds}
    return _huggingface(cp, "Qwen3", fault="window", **settings)


def llama_without_positions(cp):
    """A step that leaves position_ids out, which Transformers does not mind."""

    def run(model, tokens, labels, cp):
        return own_step(_WithoutPositions(model), tokens, labels, cp)

    return _huggingface(cp, "Llama"), run


class _WithoutPositions(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, position_ids):
        return self.model(input_ids=tokens, use_cache=False).logits
