"""Changing the layers of a model in place: float to latent, latent to packed, latent or packed to float."""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from proxbit.config import BinarizationConfig
from proxbit.errors import ConfigError, ModelStateError
from proxbit.nn import (
    HALF,
    BinaryConv2d,
    BinaryLayer,
    BinaryLinear,
    LatentWeight,
    PackedConv2d,
    PackedLinear,
    PackedWeight,
    dtype_around,
    keep_single,
    latent_layers,
    learned_modules,
)
from proxbit.patching.attention import learn_scales, learned_attentions, unlearn_scales
from proxbit.patching.fuse import unfuse_layers
from proxbit.patching.layer_config import Origin, layer_options, leave_origin, take_origin
from proxbit.patching.report import BinarizationReport, ModuleDecision
from proxbit.patching.selection import CONVERTIBLE, call_layers, explicit_patterns, select, state_of
from proxbit.patching.swap import swap

__all__ = [
    "beyond_float",
    "check_latents",
    "check_packed_layers",
    "make_packed",
    "packed_layers",
    "report_packed",
    "to_float",
    "to_latent",
    "to_packed",
]

# |soft - hard| / |hard| of weights above which a packed model is another one than the model that was trained.
FAR = 0.1

logger = logging.getLogger(__name__)


def packed_layers(model: nn.Module) -> list[tuple[str, PackedWeight]]:
    """The packed layers of a model, with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PackedWeight)]


def check_latents(model: nn.Module) -> None:
    """Raise LatentError if a latent weight cannot be binarized."""
    for name, layer in latent_layers(model):
        layer.check_latent(name)


def check_packed_layers(model: nn.Module) -> None:
    """Raise PackedFormatError if a packed layer breaks the format."""
    for name, layer in packed_layers(model):
        layer.check_packed(name)


def to_latent(
    model: nn.Module, config: BinarizationConfig, check: Callable[[list[str]], None] | None = None
) -> tuple[BinarizationReport, BinarizationConfig]:
    """Replace the selected linear and convolutional layers of a float model by latent ones.

    Args:
        model: a float model; its parameters are kept, not copied. Latent weights and what is learned beside them come
            to single precision, unless the model is to be packed.
        config: what to select, and which quantizer.
        check: called with the names of what was selected, before anything is changed; its errors go through.

    Returns:
        The report, and a copy of the configuration whose patterns name exactly what was selected.

    Raises:
        ModelStateError: if the model is latent or packed already.
        PatternError: see `selection.select`.
        LatentError: if a selected weight cannot be binarized; the model is then unchanged.
    """
    if state_of(model) != "float":
        raise ModelStateError(
            f"This model is {state_of(model)} already; binarize takes a float model. "
            "To start again from plus and minus the scales: proxbit.dequantize(model) first, or `proxbit unpack`."
        )
    return _place(model, config, _latent, check, "binarized")


def make_packed(model: nn.Module, config: BinarizationConfig) -> None:
    """Put packed layers in the place of the selected layers of a float model without data (the meta device), which is
    about to be filled from a checkpoint.

    Args:
        model: float; as it was before it was binarized and packed.
        config: as the checkpoint has it.

    Raises:
        PatternError: see `selection.select`.
        ConfigError: for a layer that cannot be as the configuration says.
    """
    _place(model, config, _without_bits, None, "packed")


def _place(
    model: nn.Module,
    config: BinarizationConfig,
    make: Callable[[nn.Module, BinarizationConfig, dict[str, Any]], LatentWeight | PackedWeight],
    check: Callable[[list[str]], None] | None,
    action: str,
) -> tuple[BinarizationReport, BinarizationConfig]:
    """Put what is made of each selected layer in its place; see `to_latent`."""
    decisions = select(model, config)
    options, overrides = layer_options(model, decisions, config)
    attentions, learned = learned_attentions(model, config)
    replacements: dict[str, LatentWeight | PackedWeight] = {}
    for name in (decision.name for decision in decisions if decision.converted):
        try:
            layer = make(model.get_submodule(name), config, options.get(name, {}))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        if isinstance(layer, LatentWeight) and not layer.weight.is_meta:
            layer.check_latent(name)
        replacements[name] = layer
    if check is not None:
        check(list(replacements))
    swap(model, replacements)
    call_layers(model, replacements)
    learn_scales(model, attentions)
    if config.state == "latent":
        keep_single(model)
    report = BinarizationReport(action, tuple(decisions))
    report.attach(model)
    include = explicit_patterns(replacements, report.left)
    changes = {"include": include, "modules_to_not_convert": None, "overrides": overrides, "learned_attention": learned}
    resolved = config.replace(**changes)
    for name, layer in replacements.items():
        leave_origin(layer, Origin(resolved, name))
    return report, resolved


def _latent(layer: nn.Module, config: BinarizationConfig, options: dict[str, Any]) -> LatentWeight:
    """The latent layer that owns the parameters of a float one."""
    kind = BinaryLinear if isinstance(layer, nn.Linear) else BinaryConv2d
    return kind.from_float(layer, config.quantizer_pair(), config.units, **options)


def _without_bits(layer: nn.Module, config: BinarizationConfig, options: dict[str, Any]) -> PackedWeight:
    """A packed layer of the shape of a float one, without data."""
    options = {name: value for name, value in options.items() if name != "activation_pair"}
    kind = PackedLinear if isinstance(layer, nn.Linear) else PackedConv2d
    return kind.like(layer, config.units.has_offset, **options).train(layer.training)


def report_packed(model: nn.Module) -> None:
    """Leave the report on a model that was made packed, as `to_packed` does."""
    decisions = []
    for name, module in model.named_modules():
        if (packed := isinstance(module, PackedWeight)) or type(module) in CONVERTIBLE:
            reason = "packed" if packed else "float"
            decisions.append(ModuleDecision(name, type(module).__name__, _weights(module), packed, reason))
    BinarizationReport("packed", tuple(decisions)).attach(model)


def _convert(model: nn.Module, action: str, convert: Callable[[nn.Module], nn.Module | None]) -> None:
    """Replace every module for which `convert` gives a replacement, and leave a report."""
    replacements, decisions = {}, []
    for name, module in model.named_modules():
        try:
            replacement = convert(module)
        except ModelStateError as error:
            raise ModelStateError(f"{name}: {error}") from error
        if replacement is not None:
            replacements[name] = replacement
            decisions.append(ModuleDecision(name, type(module).__name__, _weights(module), True, action))
        elif type(module) in CONVERTIBLE:
            decisions.append(ModuleDecision(name, type(module).__name__, _weights(module), False, "float"))
    # Not before: a layer may refuse, and the model is to stay as it was.
    unfuse_layers(model)
    dtype = dtype_around(model)
    swap(model, replacements)
    if dtype in HALF:  # of a model that is no longer trained, all of it
        for module in (*replacements.values(), *(each for _, each in learned_modules(model))):
            module.to(dtype)
    BinarizationReport(action, tuple(decisions)).attach(model)


def _weights(module: nn.Module) -> int:
    """Weights of a layer, counted before packing."""
    if isinstance(module, PackedWeight):
        return len(module.weight_scale) * module.columns
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.numel()


def _packed(layer: nn.Module) -> nn.Module | None:
    if not isinstance(layer, LatentWeight):
        return None
    kind = PackedLinear if isinstance(layer, BinaryLinear) else PackedConv2d
    packed = kind.from_latent(layer)
    take_origin(packed, layer)
    return packed


def to_packed(model: nn.Module) -> None:
    """Replace the latent layers of a model by packed ones.

    Raises:
        ModelStateError: if the model is not latent.
        ConfigError: if the levels of a pair are not -1 and +1; the model is then unchanged.
        LatentError: if a latent weight cannot be binarized; the model is then unchanged.
    """
    state = state_of(model)
    if state != "latent":
        first = "call proxbit.binarize(model, config) first, or `proxbit binarize`"
        hint = "it is packed already" if state == "packed" else first
        raise ModelStateError(f"pack takes a latent model, this one is {state}: {hint}.")
    for name, layer in latent_layers(model):
        if not layer.pair.binary:
            levels = ", ".join(f"{level:g}" for level in layer.pair.levels)
            raise ConfigError(
                f"{name}: one bit a weight stores the levels -1 and +1; this pair has {levels or 'no levels at all'}. "
                "Such a model stays latent; proxbit.dequantize(model), or `proxbit unpack`, makes it a float one "
                "with its hard weights."
            )
        if not layer.weight.is_meta:
            layer.check_latent(name)
    _tell_if_soft(model)
    _convert(model, "packed", _packed)


@torch.no_grad()
def _tell_if_soft(model: nn.Module) -> None:
    """Say so in the log if what was trained is far from what is packed: weights of F_mu that no hard step followed."""
    layers = [(name, layer) for name, layer in latent_layers(model) if layer.trained_soft and not layer.weight.is_meta]
    gaps = {}
    for name, layer in layers:
        soft, hard = layer.effective_weight(hard=False), layer.effective_weight(hard=True)
        gaps[name] = float((soft - hard).abs().sum() / hard.abs().sum())
    far = [name for name, gap in gaps.items() if gap > FAR]
    if far:
        logger.warning(
            "%d layers were trained with soft weights, which differ from their hard ones by %.0f %% on average (%s "
            "first): the packed model is not the one that was trained. End the training hard: ProxConnectTrainer "
            "does, and ProxConnectCallback under any other Trainer.",
            len(far),
            100 * sum(gaps[name] for name in far) / len(far),
            far[0],
        )


def beyond_float(model: nn.Module) -> list[str]:
    """What the layers of a model do, more than round, that plain layers with their hard weights do not.

    Args:
        model: in any state.

    Returns:
        One line each, as "sign activations (12 layers)".
    """
    found: Counter[str] = Counter()
    for layer in model.modules():
        if isinstance(layer, BinaryLayer):
            found[f"{layer.activations} activations"] += layer.activations in ("sign", "elastic")
            found["narrow accumulators"] += layer.epilogue.accumulator is not None
            found["RPReLU"] += layer.rprelu is not None
    return [f"{what} ({number} layer{'s' if number > 1 else ''})" for what, number in found.items() if number]


def to_float(model: nn.Module) -> None:
    """Replace latent and packed layers by plain ones that hold plus and minus the row scale; nothing learned is left.

    Raises:
        ModelStateError: if the model is float already.
    """
    if state_of(model) == "float":
        raise ModelStateError("dequantize takes a latent or packed model; this one is float already.")
    _convert(model, "dequantized", lambda layer: layer.to_float() if isinstance(layer, BinaryLayer) else None)
    unlearn_scales(model)
