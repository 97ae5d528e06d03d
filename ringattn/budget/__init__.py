"""What a training step takes of a device's memory, before it is run.

print(budget.plan("llama3-8b", "1M", gpus=8, memory="80GB"))
"""

from ringattn.budget.model_shape import AttentionShape, Latent, LayerShape, MLPShape, ModelShape
from ringattn.budget.models import from_config, model, shipped
from ringattn.budget.plans import Change, Item, Plan, plan
from ringattn.budget.positions import reach

__all__ = [
    "AttentionShape",
    "Change",
    "Item",
    "Latent",
    "LayerShape",
    "MLPShape",
    "ModelShape",
    "Plan",
    "from_config",
    "model",
    "plan",
    "reach",
    "shipped",
]
