"""The blank picture fits the model that it is for."""

import pytest
import torch
from torch import nn
from transformers import TimmWrapperConfig

from proxbit.patching import blank_picture
from tiny_models import FAMILIES, SIDE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_size_and_dtype_of_the_model(dtype):
    pixels = blank_picture(FAMILIES["vit"]().to(dtype))["pixel_values"]
    assert (pixels.shape, pixels.dtype) == ((1, 3, SIDE, SIDE), dtype)
    assert not pixels.any()


def test_the_size_that_timm_keeps_in_its_own_configuration():
    model = nn.Linear(2, 2)
    model.config = TimmWrapperConfig(pretrained_cfg={"input_size": [3, 518, 392]})
    assert blank_picture(model)["pixel_values"].shape == (1, 3, 518, 392)


def test_without_a_configuration():
    assert blank_picture(nn.Linear(2, 2))["pixel_values"].shape == (1, 3, 224, 224)
