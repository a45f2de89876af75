"""A linear layer with latent weights."""

import torch
from torch import Tensor, nn

from proxbit.nn.activations import check_activations, simulate_activations
from proxbit.nn.latent import LatentWeight
from proxbit.quantizers import QuantizerPair

__all__ = ["BinaryLinear"]


class BinaryLinear(LatentWeight, nn.Linear):
    r"""An `nn.Linear` that computes with F_mu of its weight.

    Forward:
        y = A(x) w^T + bias,   w = a F_mu(W / s), see `quantizers.quantize`; A: see `simulate_activations`

    Args:
        in_features: `I`.
        out_features: `O`.
        bias: whether there is a bias, `[O]`.
        pair: forward and backward quantizer.
        normalize: "row", "tensor", "std" or "none".
        scale: "ls" or "fixed".
        center: "none", "remove" or "restore".
        activations: "float", "int8" or "sign".
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pair: QuantizerPair,
        normalize: str = "row",
        scale: str = "ls",
        center: str = "none",
        activations: str = "float",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        check_activations(activations)
        self.activations = activations
        self.init_latent(pair, normalize, scale, center)

    @classmethod
    def from_float(
        cls,
        layer: nn.Linear,
        pair: QuantizerPair,
        normalize: str,
        scale: str,
        center: str = "none",
        activations: str = "float",
    ) -> "BinaryLinear":
        """A latent layer that owns the parameters of `layer`; its weight becomes the latent weight."""
        new = cls(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            pair=pair,
            normalize=normalize,
            scale=scale,
            center=center,
            activations=activations,
            device="meta",
        )
        new.weight, new.bias = layer.weight, layer.bias
        return new.train(layer.training)

    def to_float(self) -> nn.Linear:
        """A plain linear layer whose weight is the hard one, plus and minus the row scale; activations are floats."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        with torch.no_grad():
            hard = self.effective_weight(hard=True)
        layer.weight = nn.Parameter(hard, requires_grad=self.weight.requires_grad)
        layer.bias = self.bias
        return layer.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(simulate_activations(input, self.activations), self.effective_weight(), self.bias)
