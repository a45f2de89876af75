"""What a quantization card says of a model, computed from its modules and tensors."""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from proxbit.analysis.summary import summary
from proxbit.checkpoint.files import sha256
from proxbit.nn import BinaryLayer, LatentWeight, PackedConv2d, PackedLinear, evaluating
from proxbit.patching import IMAGE_ERRORS, FusedLayerNorm, blank_image, config_of, packed_layers, state_of
from proxbit.posttraining import calibration_of

__all__ = ["FORMATS", "Format", "checkpoint_sha", "file_facts", "hub_name", "model_facts"]

NONE = "none"
FLOAT32_BITS = 32
HEADER_LENGTH_BYTES = 8
ATTENTION_BITS = {"proxbit_int8": 8, "proxbit_binary": 1}
Layer = nn.Linear | _ConvNd | LatentWeight | PackedLinear | PackedConv2d


@dataclass(frozen=True)
class Format:
    """What a quantization card says of a format of activations.

    Attributes:
        bits: of one number.
        symmetry: where its levels lie.
        granularity: what shares one step or scale.
        timing: "dynamic" if the scale is computed from each input, "static" if it is stored.
        observer: what calibration looks at.
    """

    bits: int
    symmetry: str
    granularity: str
    timing: str
    observer: str


_CHANNELS = "scale a layer, threshold a channel"
FORMATS = {
    "int8": Format(8, "symmetric", "token", "dynamic", NONE),
    "int4": Format(4, "symmetric", "layer", "static", "mean |x|"),
    "uint4": Format(4, "not negative", "layer", "static", "mean |x|"),
    "sign": Format(1, "symmetric around a threshold", _CHANNELS, "static", "mean of x a channel, mean |x - threshold|"),
    "elastic": Format(1, "not negative", _CHANNELS, "static", "mean of x above half the scale"),
}


def model_facts(model: nn.Module) -> dict[str, Any]:
    """All fields of a card that the model itself tells.

    Args:
        model: in any state.
    """
    binary = [module for module in model.modules() if isinstance(module, LatentWeight | PackedLinear | PackedConv2d)]
    state = state_of(model)
    return {
        "model_class": type(model).__name__,
        "state": state,
        "simulated_or_kernel": {"latent": "simulated", "packed": "kernel"}.get(state, state),
        "attention_prob_bits": _attention_bits(model),
        "softmax_layernorm_precision": _norm_precision(model),
        "skip_precision": _dtype(model),
        "norm_folding": any(isinstance(module, FusedLayerNorm) for module in model.modules()),
        "peak_activation_bytes": peak_activation_bytes(model),
        **_weights(model, binary),
        "calibration_errors": _errors(model),
        **_activations(model, binary),
        **_layers(model),
        **_sizes(model),
    }


def _dtype(model: nn.Module) -> str | None:
    """Of the numbers that flow through a model: that of its first float parameter."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _float_bits(model: nn.Module) -> int:
    return next((8 * p.element_size() for p in model.parameters() if p.is_floating_point()), FLOAT32_BITS)


def _norm_precision(model: nn.Module) -> str | None:
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    found = sorted({str(p.dtype).removeprefix("torch.") for norm in norms for p in norm.parameters(recurse=False)})
    return ", ".join(found) or None


def _attention_bits(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    if not any("att" in name for name, _ in model.named_modules()) and not hasattr(config, "num_attention_heads"):
        return 0
    implementation = getattr(config, "_attn_implementation", None)
    return None if implementation is None else ATTENTION_BITS.get(implementation, _float_bits(model))


def _quantizer(model: nn.Module) -> str | None:
    """The name of the pair that trained the weights, of the whole model or of the part that was binarized."""
    config = config_of(model)
    return None if config is None else str(config.weights)


def _weights(model: nn.Module, binary: Sequence[nn.Module]) -> dict[str, Any]:
    if not binary:
        return {
            "weight_quantizer": NONE,
            "weight_bits": _float_bits(model),
            "weight_levels": [],
            "weight_symmetry": NONE,
            "weight_granularity": NONE,
            "scale_dtype": NONE,
            "scale_count": 0,
            "bias_bits": max((8 * b.element_size() for b in _biases(list(model.modules()))), default=0),
        }
    numbers = [_scales(layer) for layer in binary]
    return {
        "weight_quantizer": _quantizer(model),
        "weight_bits": max(weight_bits(layer) for layer in binary),
        "weight_levels": sorted({level for layer in binary for level in _levels(layer)}),
        "weight_symmetry": "one offset a row" if any(offsets for _, _, offsets, _ in numbers) else "symmetric",
        "weight_granularity": "row" if any(by_row for *_, by_row in numbers) else "tensor",
        "scale_dtype": ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype, *_ in numbers})),
        "scale_count": sum(rows + offsets for _, rows, offsets, _ in numbers),
        "bias_bits": max((8 * b.element_size() for b in _biases(binary)), default=0),
    }


def _errors(model: nn.Module) -> dict[str, dict[str, float]] | None:
    report = calibration_of(model)
    if report is None:
        return None
    return {layer.name: {"before": layer.before, "after": layer.after} for layer in report.layers}


def _biases(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [bias for module in modules if isinstance(bias := module._parameters.get("bias"), Tensor)]


def _levels(layer: nn.Module) -> tuple[float, ...]:
    return layer.pair.levels or () if isinstance(layer, LatentWeight) else (-1.0, 1.0)


def weight_bits(layer: nn.Module) -> float:
    """Bits of one weight that a layer multiplies with; log2 of the number of levels where it has levels."""
    if isinstance(layer, LatentWeight | PackedLinear | PackedConv2d) and (levels := _levels(layer)):
        bits = math.log2(len(levels))
        return int(bits) if bits.is_integer() else bits
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return 8 * weight.element_size()


def _scales(layer: nn.Module) -> tuple[torch.dtype, int, int, bool]:
    """Of a layer, or of the one it is packed into: dtype and number of its scales, number of its offsets, and whether
    scales differ from row to row.
    """
    if isinstance(layer, LatentWeight):
        rows, units = len(layer.weight), layer.units
        return layer.weight.dtype, rows, rows if units.has_offset else 0, units.scales_differ
    assert isinstance(layer, PackedLinear | PackedConv2d)
    scale, offset = layer.weight_scale, layer.weight_offset
    return scale.dtype, len(scale), 0 if offset is None else len(offset), bool((scale != scale[0]).any())


def _formats(binary: Sequence[nn.Module]) -> list[str]:
    """The formats of activations in use, in the order of the table."""
    used = {layer.activations if isinstance(layer, BinaryLayer) else "float" for layer in binary}
    return [name for name in FORMATS if name in used]


def _activations(model: nn.Module, binary: Sequence[nn.Module]) -> dict[str, Any]:
    report, quantized = calibration_of(model), [FORMATS[name] for name in _formats(binary)]
    learned = [one for one in quantized if one.observer != NONE]
    found = [layer.epilogue.accumulator if isinstance(layer, BinaryLayer) else None for layer in binary]
    narrow = {accumulator.bits for accumulator in found if accumulator is not None}
    wide = None in found or not binary
    bits = {activation_bits(layer, model) for layer in binary} or {_float_bits(model)}
    return {
        "activation_bits": sorted(bits),
        "activation_symmetry": _different(one.symmetry for one in quantized),
        "activation_granularity": _different(one.granularity for one in quantized),
        "static_or_dynamic": _different(one.timing for one in quantized),
        "accumulator_bits": sorted(narrow | ({FLOAT32_BITS} if wide else set())),
        "calibration_observer": _different(one.observer for one in learned),
        "calibration_samples": report.images if report is not None else None if learned else 0,
    }


def _different(values: Any) -> list[str]:
    return list(dict.fromkeys(values))


def activation_bits(layer: nn.Module, model: nn.Module) -> int:
    """Bits of one number that a layer multiplies its weights with."""
    name = layer.activations if isinstance(layer, BinaryLayer) else "float"
    return FORMATS[name].bits if name in FORMATS else _float_bits(model)


def _layers(model: nn.Module) -> dict[str, Any]:
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    bits = [(weight_bits(layer), activation_bits(layer, model)) for layer in layers]
    return {
        "first_layer_bits": bits[0][0] if bits else None,
        "last_layer_bits": bits[-1][0] if bits else None,
        "mixed_precision_policy": dict(Counter(f"W{weights:.3g}A{inputs}" for weights, inputs in bits)),
    }


def _sizes(model: nn.Module) -> dict[str, Any]:
    """Parameters and bytes, counted from the state dict; scales and offsets are no parameters, but cost bits."""
    packed = {f"{name}.weight": len(layer.weight_scale) * layer.columns for name, layer in packed_layers(model)}
    beside = {f"{name}.{key}" for name, _ in packed_layers(model) for key in ("weight_scale", "weight_offset")}
    tensors = {id(tensor): (key, tensor) for key, tensor in model.state_dict(keep_vars=True).items()}
    total = sum(packed.get(key, tensor.numel()) for key, tensor in tensors.values() if key not in beside)
    tensor_bytes = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors.values())
    table = summary(model)
    macs = table.binary_macs
    return {
        "total_parameters": total,
        "binary_parameters": table.binary_parameters,
        "float_parameters": total - table.binary_parameters,
        "tensor_bytes": tensor_bytes,
        "total_bits": 8 * tensor_bytes,
        "avg_weight_bits": 8 * tensor_bytes / total,
        "float32_tensor_bytes": table.float32_bytes - table.header_bytes,
        "binary_ops": macs,
        "float_ops": None if macs is None or table.total_macs is None else table.total_macs - macs,
    }


def peak_activation_bytes(model: nn.Module) -> int | None:
    """Bytes of the largest tensor that a module without parts gives for one blank picture; None if it takes none."""
    sizes = [0]

    def look(module: nn.Module, arguments: Any, output: Any) -> None:
        sizes.extend(
            each.nbytes for each in (output if isinstance(output, tuple) else (output,)) if isinstance(each, Tensor)
        )

    handles = [module.register_forward_hook(look) for module in model.modules() if not list(module.children())]
    try:
        with evaluating(model), torch.no_grad():
            model(**blank_image(model))
    except IMAGE_ERRORS:
        return None
    finally:
        for handle in handles:
            handle.remove()
    return max(sizes)


def hub_name(model: nn.Module) -> str | None:
    """The name on the Hub that a model was loaded from; None if it came from a folder, or was made here."""
    name = getattr(getattr(model, "config", None), "name_or_path", "")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if not name or Path(name).exists() else str(name)


def file_facts(files: Sequence[Path]) -> dict[str, Any]:
    """All fields of a card that the weight files tell.

    Args:
        files: safetensors files; their names are what the card knows them by.
    """
    known = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}
    return {
        "files": known,
        "checkpoint_sha": checkpoint_sha(known),
        "model_bytes": sum(facts["bytes"] for facts in known.values()),
        "header_bytes": sum(_header_bytes(file) for file in files),
    }


def _header_bytes(file: Path) -> int:
    with open(file, "rb") as stream:
        return HEADER_LENGTH_BYTES + int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")


def checkpoint_sha(files: dict[str, dict[str, Any]]) -> str:
    """The SHA-256 of what `sha256sum` prints of the files, in the order of their names."""
    listing = "".join(f"{files[name]['sha256']}  {name}\n" for name in sorted(files))
    return hashlib.sha256(listing.encode()).hexdigest()
