"""What transformers calls to load, save and run latent and packed models. Importing this package registers it."""

import proxbit.plugin.attention  # noqa: F401
from proxbit.plugin.hf_quantizer import ProxbitHfQuantizer
from proxbit.plugin.states import binarize, dequantize, equalize, fuse, pack

__all__ = ["ProxbitHfQuantizer", "binarize", "dequantize", "equalize", "fuse", "pack"]
