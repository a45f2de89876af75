"""What touches transformers' quantizers and the Hub. Importing this package registers the plug-in."""

import proxbit.hub.attention
import proxbit.hub.parts  # noqa: F401
from proxbit.hub.hf_quantizer import ProxbitHfQuantizer
from proxbit.hub.states import binarize, dequantize, equalize, fuse, pack

__all__ = ["ProxbitHfQuantizer", "binarize", "dequantize", "equalize", "fuse", "pack"]
