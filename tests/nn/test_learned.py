"""What is learned beside the weights: found by kind, and scales with the gradient of LSQ."""

import math

import pytest
import torch

import proxbit
from proxbit.nn import BinaryProbabilities, RPReLU, learned_modules
from proxbit.nn.activations import make_activation
from proxbit.nn.learned import lsq_scale


@pytest.mark.parametrize("value", [1.5, -0.25])
def test_scales_are_positive_and_move_slowly(value):
    parameter = torch.tensor(value, requires_grad=True)
    scale = lsq_scale(parameter, 50)
    assert float(scale.detach()) == pytest.approx(abs(value), abs=1e-7)
    (3 * scale).backward()
    assert float(parameter.grad) == pytest.approx(3 * math.copysign(1, value) / math.sqrt(50))


def test_everything_that_is_learned_is_found():
    """Quantizers without parameters are no modules of their layer, and nothing is said of them."""
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)), BinaryProbabilities())
    overrides = {"1": {"activations": "int8"}, "2": {"activations": "int4", "rprelu": False}}
    config = proxbit.BinarizationConfig(activations="sign", rprelu=True, include=["*"], overrides=overrides)
    proxbit.binarize(model, config)
    found = dict(learned_modules(model))
    assert list(found) == ["0.rprelu", "0.activation", "1.rprelu", "2.activation", "3"]
    assert [module.calibrated for module in found.values()] == [isinstance(m, RPReLU) for m in found.values()]


def test_what_was_loaded_counts_as_calibrated():
    """Of a state without its numbers nothing was."""
    made = {"scale": BinaryProbabilities(), "step": make_activation("int4", 8), "sign": make_activation("sign", 8)}
    model = torch.nn.ModuleDict(made)
    state = model.state_dict()
    model.load_state_dict({name: value for name, value in state.items() if name.startswith("step.")}, strict=False)
    assert {name: module.calibrated for name, module in made.items()} == {"scale": False, "step": True, "sign": False}
    model.load_state_dict(state)
    assert all(module.calibrated for module in made.values())
