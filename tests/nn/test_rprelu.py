"""RPReLU: its values, and that all of it learns."""

import torch

from proxbit.nn import RPReLU


def test_values_and_gradients():
    layer, x = RPReLU(3, dtype=torch.float64), torch.randn(4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.nn.functional.leaky_relu(x, 0.25))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    expected = torch.nn.functional.prelu((x - layer.corner).flatten(0, 1), layer.slope).view_as(x) + layer.lift
    torch.testing.assert_close(layer(x), expected)
    assert torch.autograd.gradcheck(layer, x.requires_grad_())
    layer(x).square().sum().backward()
    assert all(float(parameter.grad.abs().min()) > 0 for parameter in layer.parameters())
