"""proxbit: 1-bit vision transformers with ProxConnect++, as a plug-in of transformers.

Importing the package registers it with transformers: `from_pretrained` then loads latent and packed checkpoints.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

import proxbit.hub  # noqa: F401
from proxbit.config import BinarizationConfig
from proxbit.errors import ProxbitError
from proxbit.extras import lazy
from proxbit.nn import set_mu, soft_evaluation, start_update
from proxbit.optim import ProxConnect
from proxbit.plugin import binarize, dequantize, equalize, fuse, pack
from proxbit.quantizers import QuantizerPair, compose, decompose, enhance, heuristic, register_pair

if TYPE_CHECKING:
    from proxbit.analysis.summary import summary
    from proxbit.export import export_onnx
    from proxbit.hub.push import push
    from proxbit.hub.release import write_release
    from proxbit.plugin.adapters import packed_lora
    from proxbit.plugin.sharded import packed_copy
    from proxbit.training.arguments import ProxConnectArguments
    from proxbit.training.calibration import calibrate
    from proxbit.training.callback import ProxConnectCallback
    from proxbit.training.recipes import get_recipe, register_recipe
    from proxbit.training.trainer import ProxConnectTrainer

__version__ = version("proxbit")

# Loaded at first use: they import much that inference does not need, or what is optional.
_LAZY = {
    "ProxConnectArguments": "proxbit.training.arguments",
    "ProxConnectCallback": "proxbit.training.callback",
    "ProxConnectTrainer": "proxbit.training.trainer",
    "calibrate": "proxbit.training.calibration",
    "export_onnx": "proxbit.export",
    "get_recipe": "proxbit.training.recipes",
    "packed_copy": "proxbit.plugin.sharded",
    "packed_lora": "proxbit.plugin.adapters",
    "push": "proxbit.hub.push",
    "register_recipe": "proxbit.training.recipes",
    "summary": "proxbit.analysis.summary",
    "write_release": "proxbit.hub.release",
}

__all__ = [
    "BinarizationConfig",
    "ProxConnect",
    "ProxConnectArguments",
    "ProxConnectCallback",
    "ProxConnectTrainer",
    "ProxbitError",
    "QuantizerPair",
    "binarize",
    "calibrate",
    "compose",
    "decompose",
    "dequantize",
    "enhance",
    "equalize",
    "export_onnx",
    "fuse",
    "get_recipe",
    "heuristic",
    "pack",
    "packed_copy",
    "packed_lora",
    "push",
    "register_pair",
    "register_recipe",
    "set_mu",
    "soft_evaluation",
    "start_update",
    "summary",
    "write_release",
]

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__, _LAZY)
