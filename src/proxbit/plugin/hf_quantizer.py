"""The plug-in: how `from_pretrained` and `save_pretrained` meet latent and packed models."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

from proxbit.checkpoint.checks import (
    check_complete,
    check_dtypes,
    check_folder,
    check_learned,
    check_loaded,
    check_packed_files,
    check_size,
    is_of_saved_class,
    reset_learned,
)
from proxbit.checkpoint.files import tensor_headers
from proxbit.checkpoint.weights import check_storable
from proxbit.config import QUANT_METHOD, BinarizationConfig
from proxbit.errors import CheckpointError, ConfigError, ModelStateError
from proxbit.nn import learned_modules
from proxbit.patching import (
    check_latents,
    check_packed_layers,
    config_of,
    make_packed,
    matches,
    packed_layers,
    report_packed,
    state_of,
    to_float,
    to_latent,
)
from proxbit.plugin.compat import (
    loaded_folder,
    missing_tensors,
    restore_specs,
    stored_config,
    tensor_specs,
    wrap_loading,
    wrap_saving,
)
from proxbit.plugin.downloads import check_against_card, check_downloads
from proxbit.plugin.model_configs import part_configs, restore_config, stored_quantization, to_config, true_configs
from proxbit.plugin.placement import check_not_split, check_trainable_places

__all__ = ["METHODS", "ProxbitHfQuantizer", "update_configs"]

# What latent and packed models have in the place of methods of transformers, by name; whoever imports this adds to it.
METHODS: dict[str, Callable[..., Any]] = {}

register_quantization_config(QUANT_METHOD)(BinarizationConfig)


@register_quantizer(QUANT_METHOD)
class ProxbitHfQuantizer(HfQuantizer):
    """Makes the skeleton latent or packed before the weights are loaded, and checks them afterwards.

    A float checkpoint with `quantization_config=BinarizationConfig(...)` becomes a latent model; a checkpoint of
    proxbit is latent or packed as its configuration says.
    """

    quantization_config: BinarizationConfig
    # What `save_pretrained` was given to write, while it runs: transformers (5.15 to 5.23 at least) asks a quantizer
    # for the tensors, and forgets its own argument `state_dict`.
    gathered_state: dict[str, Any] | None = None
    # Whether it is the parts of the model whose configurations say how they were binarized, and not the model's.
    by_parts = False

    def __init__(self, quantization_config: BinarizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized and quantization_config.state != "latent":
            raise ConfigError(
                "A float checkpoint can be loaded as a latent model only; leave BinarizationConfig.state alone, train, "
                "then call proxbit.pack(model)."
            )

    def validate_environment(self, *args: Any, weights_only: bool | None = None, **kwargs: Any) -> None:
        """What is asked first of all, so that nothing is opened that was not looked at.

        Raises:
            ConfigError: if unpickling of a checkpoint of proxbit is asked for.
            CheckpointError: for a folder whose index, weight files or number of layers cannot be right.
        """
        if not self.pre_quantized:
            return
        if weights_only is False:
            raise ConfigError("weights_only=False is for pickles; proxbit has none: leave it out.")
        if (loaded := loaded_folder()) is not None:
            check_folder(*loaded)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        state = self.quantization_config.state
        if not self.pre_quantized:  # Whatever the configuration was of before, these weights are of a float file.
            self.quantization_config = self.quantization_config.replace(calibration=None)
        if self.pre_quantized:
            check_downloads(checkpoint_files or [])
            for file in checkpoint_files or []:
                tensor_headers(file)
            check_against_card(checkpoint_files or [], model.config.name_or_path)
            self._restore_layers(model)
        else:
            check = partial(check_storable, model)
            to_latent(model, self.quantization_config, check)
        if not self.pre_quantized:
            # What is learned beside the weights is in no float checkpoint: it starts at its defaults.
            own = [rf"^{re.escape(name)}\." for name, _ in learned_modules(model)]
            model._keys_to_ignore_on_load_missing = [*(model._keys_to_ignore_on_load_missing or ()), *own]
        if state == "packed":
            report_packed(model)
        if checkpoint_files is not None:  # Tensors may be in hand.
            if state == "packed":
                check_packed_files(checkpoint_files, packed_layers(model), is_of_saved_class(model))
            if self.pre_quantized:
                check_size(checkpoint_files, model)
        self.quantization_config = config_of(model) or self.quantization_config
        self._specs = tensor_specs(model)
        return model

    def _restore_layers(self, model: PreTrainedModel) -> None:
        """Make the layers of a model without data latent or packed, as its configuration or those of its parts say."""
        said = {model: self.quantization_config}
        if self.by_parts:
            inside = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
            read = {part: stored_quantization(part.config) for part in inside if part.config is not model.config}
            said = {part: to_config(stored) for part, stored in read.items() if stored is not None}
        for part, config in said.items():
            if config.state != self.quantization_config.state:
                raise CheckpointError("config.json says that some parts of the model are latent and some packed.")
            if state_of(part) == "float":  # Not a part of the one before.
                make = make_packed if config.state == "packed" else to_latent
                make(part, _fit_patterns(part, config))

    def update_device_map(self, device_map: Any) -> Any:
        """What is asked before a device is given anything; see `check_trainable_places`."""
        if self.quantization_config.state == "latent":
            check_trainable_places(device_map)
        return device_map

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_not_split(model)
        if self.quantization_config.state == "latent":
            check_trainable_places(getattr(model, "hf_device_map", None))
        restore_specs(model, self._specs)
        check_loaded(packed_layers(model))
        if self.pre_quantized:
            check_learned(model)
            if missing := missing_tensors():
                check_complete(model, missing, stored_config())
            check_dtypes(model, self._specs)
        else:
            reset_learned(model)
        check_latents(model)
        check_packed_layers(model)
        update_configs(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        to_float(model)
        update_configs(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Latent and packed models are saved as they are."""
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """What `save_pretrained` writes: the model's own tensors, or those of `gathered_state`."""
        return self.gathered_state, {}

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the model: always."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether its own weights can be trained: as long as it is latent."""
        return self.quantization_config.state == "latent"

    @property
    def is_compileable(self) -> bool:
        """Latent and packed layers have no graph breaks."""
        return True


def _fit_patterns(model: PreTrainedModel, config: BinarizationConfig) -> BinarizationConfig:
    """The stored patterns for another head: a backbone may be loaded from a task model's folder, and the reverse.

    What another class lacks is left out. A checkpoint that says nothing of learned attention has none, however it is
    run.
    """
    config = config.replace(learned_attention=config.learned_attention or [])
    if config.include is None:
        return config
    is_saved_class = is_of_saved_class(model)
    prefix = f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_modules()]

    def fitted(patterns: Iterable[str]) -> dict[str, str]:
        """The patterns as this model spells them, by stored pattern."""
        found = {}
        for pattern in patterns:
            spellings = (pattern, pattern.removeprefix(prefix), prefix + pattern)
            here = next((s for s in spellings if any(matches(name, s) for name in names)), None)
            if here is not None or is_saved_class:
                found[pattern] = here or pattern
        return found

    overrides = {here: (config.overrides or {})[pattern] for pattern, here in fitted(config.overrides or ()).items()}
    return config.replace(
        include=list(fitted(config.include).values()) or config.include,
        overrides=overrides or None,
        learned_attention=list(fitted(config.learned_attention or ()).values()),
    )


def update_configs(model: nn.Module) -> None:
    """Make the transformers models in a module say how their layers are binarized, in their configurations, and treat
    them as `from_pretrained` would have; those that are float say nothing.

    Of models that have one configuration together it tells of the outermost.
    """
    for part, config in list(part_configs(model)):
        quantizer = vars(part).get("hf_quantizer")
        if config is not None:
            part.config.quantization_config = config
            part.hf_quantizer = ProxbitHfQuantizer(config, pre_quantized=True)
            part.quantization_method = QUANT_METHOD
            part.is_quantized = True
            vars(part).update({name: MethodType(method, part) for name, method in METHODS.items()})
        elif isinstance(quantizer, ProxbitHfQuantizer):
            quantizer.remove_quantization_config(part)
            for name in METHODS:
                vars(part).pop(name, None)
        elif stored_quantization(part.config) is not None:
            del part.config.quantization_config


@contextmanager
def saving(model: PreTrainedModel, state_dict: dict[str, Any] | None) -> Iterator[None]:
    """A context to save a model in, which writes these tensors, and a configuration that is true.

    Args:
        model: any.
        state_dict: as `save_pretrained` takes it; None: the model's own.

    Raises:
        ModelStateError: as by `true_configs`, or if the tensors are not those of a model in this state.
    """
    if getattr(model, "_hf_peft_config_loaded", False):  # Adapters are saved, and no configuration.
        yield
        return
    quantizer = vars(model).get("hf_quantizer")
    given = state_dict if isinstance(quantizer, ProxbitHfQuantizer) else None
    if given is not None:
        _check_state(model, given)
    with true_configs(model), _writing(quantizer, given):
        yield


@contextmanager
def _writing(quantizer: Any, state_dict: dict[str, Any] | None) -> Iterator[None]:
    """Within the context, a quantizer gives these tensors to `save_pretrained`; None: whatever it gives."""
    if state_dict is None:
        yield
        return
    before, quantizer.gathered_state = quantizer.gathered_state, state_dict
    try:
        yield
    finally:
        quantizer.gathered_state = before


def _check_state(model: PreTrainedModel, given: dict[str, Any]) -> None:
    """Check that tensors are those of a model in this state. Of a sharded model one process has all of them."""
    for name, tensor in model.state_dict().items():
        other = given.get(name)
        if isinstance(other, Tensor) and (other.dtype == torch.uint8) != (tensor.dtype == torch.uint8):
            raise ModelStateError(
                f"state_dict: {name} is {other.dtype}, and that of this model is {tensor.dtype}: they are not in the "
                "same state. Load the tensors into a latent model, load_state_dict, and pack that."
            )


wrap_saving(saving)
wrap_loading(restore_config)
