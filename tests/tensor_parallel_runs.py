"""What the processes do that load a model by a `tp_plan`."""

import torch
from transformers import ViTForImageClassification
from transformers.distributed import DistributedConfig


def load(folder, plan):
    return ViTForImageClassification.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_plan=plan, tp_size=2)
    )


def message(folder, plan):
    """Of the error."""
    try:
        load(folder, plan)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def answers(folder, plan, pictures):
    model = load(folder, plan)
    with torch.inference_mode():
        return model(pictures).logits, type(model.classifier.weight).__name__
