"""LoRA adapters of PEFT on packed layers; `nn.adapted` refuses to merge them. Importing this module imports `peft`,
which is optional.
"""

from typing import Any

from torch import nn

from proxbit.errors import ConfigError, ModelStateError
from proxbit.nn import PackedLinear

try:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear, LoraLayer
    from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
except ImportError as error:
    raise ImportError("Adapters are those of PEFT, which is not installed: pip install 'proxbit[peft]'") from error

__all__ = ["PackedLora", "packed_lora"]


class PackedLora(Linear):
    r"""A packed linear layer with LoRA adapters beside it. The bits stay as they are; the adapters are floats.

    Forward:
        y = packed(x) + (lora_alpha / r) B A x, with A `[r, I]` and B `[O, r]`; x is not quantized for the adapter

    Source:
        Hu et al., LoRA, 2021, https://huggingface.co/papers/2106.09685, Section 4.1.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        layer = base_layer.get_base_layer() if isinstance(base_layer, LoraLayer) else base_layer
        assert isinstance(layer, PackedLinear)
        if layer.gelu or layer.norm is not None:
            raise ModelStateError(
                "This layer is fused with its neighbours: its input and output are not those an adapter goes between. "
                "Add adapters first, then call proxbit.fuse(model)."
            )
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA alone: the variants compute with the float weight of the layer."""
        return {(): None}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, PackedLinear | nn.Linear)  # the other once it is dequantized
        return module.in_features, module.out_features


def packed_lora(config: LoraConfig) -> LoraConfig:
    """Let a LoRA configuration of PEFT target packed linear layers too.

    Args:
        config: of `peft`, new or loaded with `LoraConfig.from_pretrained`; changed in place. PEFT does not store this
            in a file, so it is said again for a configuration that was loaded.

    Returns:
        The same configuration, for `get_peft_model(model, config)` and `PeftModel.from_pretrained(model, folder,
        config=config)`.

    Raises:
        ConfigError: for `init_lora_weights` that starts from the float weight, and for `target_modules="all-linear"`.
    """
    if isinstance(config.target_modules, str) and config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        raise ConfigError(
            "target_modules='all-linear' are to PEFT those of torch.nn.Linear: it would adapt the head and pass over "
            "the packed layers. Name them: target_modules=list(model.binarization_report.converted), or by the ends "
            "of their names, as ['q_proj', 'v_proj']."
        )
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} starts from the float weight, which a packed layer has "
            "not: leave it at True, or choose 'gaussian' or 'orthogonal'."
        )
    config._register_custom_module({PackedLinear: PackedLora})
    return config
