"""ONNX files of packed models, with standard operators only. Importing this module needs `onnxscript`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from proxbit.errors import ConfigError, ModelStateError
from proxbit.kernels import decompositions
from proxbit.nn import evaluating
from proxbit.patching import blank_image, state_of

try:
    import onnx_ir
    import onnxscript.optimizer
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, DeduplicateInitializersPass
except ImportError as error:
    raise ImportError(
        "torch writes ONNX with onnxscript, which is not installed: pip install 'proxbit[onnx]'"
    ) from error

__all__ = ["export_onnx"]


def _stay_bits(node: onnx_ir.Node) -> bool | None:
    """Whether a constant is computed now: not where bits would become floats, and otherwise as the optimizer likes."""
    return False if any(value is not None and value.dtype == onnx_ir.DataType.UINT8 for value in node.inputs) else None


def export_onnx(model: nn.Module, path: str | Path, inputs: dict[str, Tensor] | None = None) -> Path:
    """Write a packed model as an ONNX file with standard operators, which computes what the packed model does.

    The file holds one bit a weight, and a few operators that expand them. A runtime does so when it loads the file
    (onnxruntime) or at each call: in its memory weights are floats, and it multiplies floats.

    Args:
        model: a packed model, fused or not.
        path: of the file.
        inputs: keyword arguments of one forward pass, all of them tensors whose first axis is the batch; a blank
            picture if None. The size of the batch stays free where the model allows it, the other sizes are fixed.

    Returns:
        The path. Inputs and outputs have the names they have in torch (`pixel_values`, `logits`).

    Raises:
        ModelStateError: if the model is not packed.
        ConfigError: if an input is no tensor with a batch.
    """
    state = state_of(model)
    if state != "packed":
        hint = "proxbit.pack(model) first" if state == "latent" else "torch.onnx.export writes float models"
        raise ModelStateError(f"export_onnx takes a packed model, this one is {state}: {hint}.")
    inputs = blank_image(model) if inputs is None else inputs
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or not value.ndim:
            raise ConfigError(
                f"export_onnx: the input {name} must be a tensor whose first axis is the batch: {value!r}."
            )
    # torch takes a size of 1 for fixed.
    batch = {name: torch.cat([value, value]) if len(value) == 1 else value for name, value in inputs.items()}
    with evaluating(model), torch.no_grad():
        returned = model(**batch)
        free = {name: {0: torch.export.Dim.AUTO} for name in batch}
        program = torch.export.export(model, (), batch, dynamic_shapes=free)
        # With those of torch: left to its ONNX exporter, attention with a bias (Swin, BEiT) cannot be decomposed.
        plain = program.run_decompositions({**torch.export.default_decompositions(), **decompositions()})
    result = torch.onnx.export(
        plain, dynamo=True, optimize=False, verbose=False, output_names=_names(returned), input_names=list(batch)
    )
    assert result is not None
    onnxscript.optimizer.optimize_ir(result.model, should_fold=_stay_bits)
    # One table from bytes to signs for all layers; 2048 numbers.
    DeduplicateInitializersPass(size_limit=2048)(result.model)
    ClearMetadataAndDocStringPass()(result.model)
    result.save(path)
    return Path(path)


def _names(returned: Any) -> list[str] | None:
    """Of the outputs, where the model names them."""
    return list(returned) if isinstance(returned, Mapping) else None
