"""What a training step takes of a device's memory, before it is run: integers and formulas, no torch."""

from ringattn.budget.model_shape import AttentionShape, Latent, LayerShape, MLPShape, ModelShape
from ringattn.budget.models import from_config, model
from ringattn.budget.positions import reach

__all__ = ["AttentionShape", "Latent", "LayerShape", "MLPShape", "ModelShape", "from_config", "model", "reach"]
