"""How a model and its parts are binarized, in their configurations: corrected for saving, completed for loading."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from proxbit.checkpoint.checks import check_folder
from proxbit.config import QUANT_METHOD, BinarizationConfig
from proxbit.errors import CheckpointError, ModelStateError
from proxbit.foreign import printable
from proxbit.patching import config_of, is_binarized, origin_of, state_of, to_latent
from proxbit.plugin.compat import loaded_folder, stored_config

__all__ = ["copy_config", "part_configs", "restore_config", "stored_quantization", "to_config", "true_configs"]


def stored_quantization(config: Any) -> BinarizationConfig | dict[str, Any] | None:
    """What a configuration of a model, read from a file or not, says of proxbit; None if it says nothing, or is of
    another quantizer.
    """
    key = "quantization_config"
    said = config.get(key) if isinstance(config, dict) else getattr(config, key, None)
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    return said if method == QUANT_METHOD else None


def to_config(stored: BinarizationConfig | dict[str, Any]) -> BinarizationConfig:
    """A quantization configuration, read from a file or not."""
    config = BinarizationConfig.from_dict(stored) if isinstance(stored, dict) else stored
    assert isinstance(config, BinarizationConfig)
    return config


def part_configs(model: nn.Module, strict: bool = False) -> Iterator[tuple[PreTrainedModel, BinarizationConfig | None]]:
    """The transformers models in a module, and what their configurations should say; None for float ones.

    Args:
        model: any.
        strict: raise ModelStateError where one configuration cannot say it; else it says nothing.
    """
    known: dict[int, BinarizationConfig | None] = {}
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        key = id(part.config)
        if key not in known:
            try:
                config = config_of(part)
            except ModelStateError:
                if strict:
                    raise
                config = None
            said = getattr(stored_quantization(part.config), "calibration", None)
            known[key] = config.replace(calibration=said) if config is not None and said else config
        yield part, known[key]


def copy_config(model: PreTrainedModel) -> None:
    """Give a float model a copy of its configuration, for all its modules: others may be made of the same object, which
    are not binarized as this one will be.

    A base model keeps the one it shares with the task model around it, unless that says already how another was.
    """
    if model.base_model is model and getattr(model.config, "quantization_config", None) is None:
        return
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                vars(module)[key] = copies[id(value)]


@contextmanager
def true_configs(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, the configurations of a model and of its parts say what their layers are, whatever was done
    to the parts. At its end they say what they said before: other models may have been made from the same objects.

    Raises:
        ModelStateError: if no configuration can say it, see `patching.config_of`; or if there are latent or packed
            layers that neither `binarize` made, nor the class of the model makes.
    """
    _check_origins(model)
    said: dict[int, tuple[PreTrainedConfig, Any]] = {
        id(config): (config, None) for config in (model.config, *_sub_configs(model.config))
    }
    said |= {id(part.config): (part.config, config) for part, config in part_configs(model, strict=True)}
    found = [(config, stored_quantization(config), right) for config, right in said.values()]
    changed = [(config, before, right) for config, before, right in found if before != right]
    if changed and state_of(model) == "float":
        warnings.warn(
            f"{type(model).__name__} is float, though its configuration says that it is binarized, as after "
            "from_config, which makes the layers of the class. It is saved as a float model.",
            stacklevel=5,
        )
    for config, _, right in changed:
        _set_quantization(config, right)
    try:
        yield
    finally:
        for config, before, _ in changed:
            _set_quantization(config, before)


def _set_quantization(config: PreTrainedConfig, value: Any) -> None:
    if value is not None:
        config.quantization_config = value
    elif stored_quantization(config) is not None:
        del config.quantization_config


def _check_origins(model: PreTrainedModel) -> None:
    """Check that `from_pretrained` will make every layer that is no float one."""
    unknown = [name for name, module in model.named_modules() if is_binarized(module) and origin_of(module) is None]
    if not unknown:
        return
    with torch.device("meta"):
        made = dict(type(model)._from_config(copy.deepcopy(model.config)).named_modules())
    for name in unknown:
        if not is_binarized(made.get(name)):
            raise ModelStateError(
                f"{name} is no layer that {type(model).__name__} has by itself, and nothing says how it was binarized: "
                "saved, it could not be loaded. Put the float layer there, and call proxbit.binarize."
            )


def _sub_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The configurations in that of a composite model, at any depth."""
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield value
            yield from _sub_configs(value)


def restore_config(config: PreTrainedConfig) -> bool:
    """Give a configuration that is about to be loaded what its checkpoint says of how it was binarized, where that is
    not in it: it is of a part, was written by another program, or by an older proxbit.

    Args:
        config: changed in place.

    Returns:
        Whether the parts say it, each of itself.

    Raises:
        CheckpointError: if the checkpoint is of a composite model whose configuration cannot be followed.
    """
    if getattr(config, "quantization_config", None) is not None and stored_quantization(config) is None:
        return False
    stored = stored_config() or {}
    if (said := stored_quantization(stored)) is not None:
        if stored.get("model_type") == config.model_type:
            own = stored_quantization(config)
            if own is None or to_config(own).state != to_config(said).state:
                config.quantization_config = said
        elif stored_quantization(config) is None and not _parts_say(stored):
            _take_from_composite(config, stored)
        return False
    if stored_quantization(config) is not None:
        return False
    first = next((said for each in _sub_configs(config) if (said := stored_quantization(each)) is not None), None)
    if first is not None:
        config.quantization_config = first
    return first is not None


def _parts_say(stored: dict[str, Any]) -> bool:
    """Whether a sub-configuration, of JSON types, says how its part was binarized."""
    tables = [value for value in stored.values() if isinstance(value, dict)]
    return any(stored_quantization(value) is not None or _parts_say(value) for value in tables)


def _take_from_composite(config: PreTrainedConfig, stored: dict[str, Any]) -> None:
    """Give the configuration of a part what that of the composite model says of it; older files say it there alone."""
    try:
        composite = AutoConfig.for_model(**copy.deepcopy(stored))
        if (loaded := loaded_folder()) is not None:
            folder, _, variant = loaded
            check_folder(folder, composite, variant)
        kind = getattr(transformers, stored["architectures"][0])
        said = to_config(stored["quantization_config"])
        with torch.device("meta"):
            model = kind._from_config(composite)
        to_latent(model, said)
    except Exception as error:
        raise CheckpointError(
            f"This checkpoint is of a composite model, {printable(str(stored.get('model_type')))}, whose configuration "
            f"alone says how it was binarized, and cannot be followed here ({type(error).__name__}: "
            f"{printable(str(error))}). Load it with its class, save it again, and load the part from there."
        ) from error
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    part = next((part for part in parts if type(part.config) is type(config)), None)
    if part is not None and (found := config_of(part)) is not None:
        config.quantization_config = found.replace(state=said.state)
