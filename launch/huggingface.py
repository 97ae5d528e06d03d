"""A Hugging Face decoder as the job sees it: built from a config.json, with random weights."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launch import huggingface_rules
from launch.language import Inputs, Language, check_memory

PREFIX = "hf:"


def decoder(path: Path, recompute: bool) -> Language:
    """The causal model of a Transformers config file. Its layers' masks are the config's own.

    Raises ValueError for a file that is no config, a model that is no decoder or has layers or a head that this job
    does not know; ImportError without the package.
    """
    from ringattn.integrations.checkpointing import keep_attention
    from ringattn.integrations.transformers import layer_masks, masks_of, shape_of

    # after ours, whose error names the extra to install
    from transformers import AutoConfig, AutoModelForCausalLM  # isort: skip

    try:
        huggingface_rules.read(path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        check_memory(sum(parameter.numel() for parameter in empty.parameters()))
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except Exception as error:  # Transformers raises almost anything for a config that is wrong
        said = " ".join(str(error).split()) or type(error).__name__
        remedy = "" if isinstance(error, ValueError) and "must be" in said else "; correct the config"
        raise ValueError(f"--model {PREFIX}{path}: {said}{remedy}") from None
    text = config.get_text_config()
    base, head = model.base_model, model.get_output_embeddings()
    if base is model or head is None or not hasattr(base, "layers"):
        raise ValueError(f"--model {PREFIX}{path}: {type(model).__name__} is no decoder with layers and a head")
    dropping = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    if dropping:
        raise ValueError(
            f"--model {PREFIX}{path}: {dropping[0]} drops at random, alike on all ranks and otherwise after a resume; "
            "set its probability to 0 in the config (attention_dropout may stay)"
        )
    _try(model, path)
    if recompute:
        # the first name is Transformers 5.24's, the second that of earlier versions
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": keep_attention()})
    masks, distinct = layer_masks(config), masks_of(config)
    hidden, logits = _Hidden(model), _logits(head, text)
    return Language(model, list(base.layers), hidden, logits, masks, distinct, shape_of(config), text.vocab_size)


def _try(model: nn.Module, path: Path) -> None:
    """Two tokens through the model, so that sizes which do not fit together are found here and not in a step."""
    try:
        with torch.no_grad(), torch.random.fork_rng():
            logits = model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False).logits
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"--model {PREFIX}{path}: it fails on two tokens: {said}; correct its sizes") from None
    model.train()
    if not bool(logits.isfinite().all()):
        raise ValueError(f"--model {PREFIX}{path}: its logits are not finite at the start; correct its scales")


def allow_double(model: nn.Module) -> None:
    """Experts as a loop: torch's grouped matmul, which Transformers takes by default, knows no fp64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # type: ignore[operator]


def advice(model: nn.Module, seqlen: int) -> str | None:
    """What is to be said of sequences that are longer than the model's positions reach, and the setting to write."""
    from ringattn.integrations.transformers import beyond_positions

    return beyond_positions(model.config, seqlen)


def digest(path: Path) -> str:
    """Of the text of a config file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


class _Hidden:
    """The model without its head, in the context of the inputs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.ring: Any = None

    def __call__(self, inputs: Inputs) -> Tensor:
        from ringattn.integrations.transformers import PositionWarning, register

        if self.ring is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PositionWarning)  # the job says it once, at the start
                self.ring = register(inputs.cp, self.model)
        elif self.ring.cp is not inputs.cp:
            self.ring.use(inputs.cp)
        positions = inputs.cp.position_ids.to(inputs.tokens.device)[None]
        base = self.model.base_model
        return base(input_ids=inputs.tokens, position_ids=positions, use_cache=False).last_hidden_state  # type: ignore[operator]


def _logits(head: nn.Module, config: Any) -> Any:
    """The head with what the config does to logits after it."""
    for name in ("logit_scale", "logits_scaling"):
        if getattr(config, name, 1.0) not in (None, 1.0):
            raise ValueError(
                f"{type(config).__name__} has {name} = {getattr(config, name)}, which the loss in chunks does not "
                "know; set it to 1.0"
            )
    cap = getattr(config, "final_logit_softcapping", None)
    return head if cap is None else lambda rows: cap * torch.tanh(head(rows) / cap)
