"""Changing the layers of a model in place: float to latent, latent to packed, latent or packed to float."""

import logging
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from proxbit.config import BinarizationConfig
from proxbit.errors import ConfigError, ModelStateError
from proxbit.nn import (
    HALF,
    BinaryConv2d,
    BinaryLinear,
    PackedConv2d,
    PackedLinear,
    dtype_around,
    keep_single,
    latent_layers,
    learned_modules,
)
from proxbit.nn.surroundings import Surroundings
from proxbit.patching.attention import learn_scales, learned_attentions, unlearn_scales
from proxbit.patching.fuse import unfuse_layers
from proxbit.patching.parts import Origin, leave_origin, take_origin
from proxbit.patching.report import BinarizationReport, ModuleDecision
from proxbit.patching.sites import surroundings
from proxbit.patching.swap import swap
from proxbit.patching.targets import CONVERTIBLE, call_layers, explicit_patterns, select, state_of

__all__ = [
    "beyond_float",
    "check_latents",
    "check_packed_layers",
    "packed_layers",
    "to_float",
    "to_latent",
    "to_packed",
]

# |soft - hard| / |hard| of weights above which a packed model is another one than the model that was trained.
FAR = 0.1

logger = logging.getLogger(__name__)

LatentLayer = BinaryLinear | BinaryConv2d
PackedLayer = PackedLinear | PackedConv2d


def packed_layers(model: nn.Module) -> list[tuple[str, PackedLayer]]:
    """The packed layers of a model, with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLayer)]


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
        PatternError: see `targets.select`.
        LatentError: if a selected weight cannot be binarized; the model is then unchanged.
    """
    if state_of(model) != "float":
        raise ModelStateError(
            f"This model is {state_of(model)} already; binarize takes a float model. "
            "To start again from plus and minus the scales: proxbit.dequantize(model) first, or `proxbit unpack`."
        )
    decisions = select(model, config)
    pair = config.quantizer_pair()
    around, overrides = surroundings(model, decisions, config)
    attentions, learned = learned_attentions(model, config)
    replacements: dict[str, BinaryLinear | BinaryConv2d] = {}
    for decision in decisions:
        if not decision.converted:
            continue
        layer = model.get_submodule(decision.name)
        units = {"normalize": config.normalize, "scale": config.scale, "center": config.center}
        latent: BinaryLinear | BinaryConv2d
        try:
            if isinstance(layer, nn.Linear):
                latent = BinaryLinear.from_float(layer, pair, **units, **around[decision.name])  # type: ignore[arg-type]
            else:
                latent = BinaryConv2d.from_float(layer, pair, **units)  # type: ignore[arg-type]
        except ConfigError as error:
            raise ConfigError(f"{decision.name}: {error}") from error
        if not latent.weight.is_meta:
            latent.check_latent(decision.name)
        replacements[decision.name] = latent
    if check is not None:
        check(list(replacements))
    swap(model, replacements)
    call_layers(model, replacements)
    learn_scales(model, attentions)
    if config.state == "latent":
        keep_single(model)
    report = BinarizationReport("binarized", tuple(decisions))
    report.attach(model)
    include = explicit_patterns(replacements, report.left)
    changes = {"include": include, "modules_to_not_convert": None, "overrides": overrides, "learned_attention": learned}
    resolved = config.replace(**changes)
    for name, latent in replacements.items():
        leave_origin(latent, Origin(resolved, name))
    return report, resolved


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
    if isinstance(module, PackedLayer):
        return len(module.weight_scale) * module.columns
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.numel()


def _packed(layer: nn.Module) -> nn.Module | None:
    if not isinstance(layer, LatentLayer):
        return None
    packed = PackedLinear.from_latent(layer) if isinstance(layer, BinaryLinear) else PackedConv2d.from_latent(layer)
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
        if isinstance(layer, Surroundings):
            found[f"{layer.activations} activations"] += layer.activations in ("sign", "elastic")
            found["narrow accumulators"] += layer.accumulator is not None
            found["RPReLU"] += layer.rprelu is not None
    return [f"{what} ({number} layer{'s' if number > 1 else ''})" for what, number in found.items() if number]


def to_float(model: nn.Module) -> None:
    """Replace latent and packed layers by plain ones that hold plus and minus the row scale; nothing learned is left.

    Raises:
        ModelStateError: if the model is float already.
    """
    if state_of(model) == "float":
        raise ModelStateError("dequantize takes a latent or packed model; this one is float already.")
    _convert(
        model, "dequantized", lambda layer: layer.to_float() if isinstance(layer, LatentLayer | PackedLayer) else None
    )
    unlearn_scales(model)
