"""A model and the parts it is made of say the same of how they are binarized: when they are saved, and when loaded."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from proxbit.checkpoint.checks import check_folder
from proxbit.errors import CheckpointError, ModelStateError
from proxbit.foreign import printable
from proxbit.patching import config_of, is_binarized, origin_of, state_of, to_latent
from proxbit.plugin.compat import ask_before_loading, ask_before_saving, loaded_folder, stored_config
from proxbit.plugin.hf_quantizer import ProxbitHfQuantizer, as_config, claim_of, claims

__all__ = ["find_claim", "saving", "truth"]


@contextmanager
def truth(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, the configurations of a model and of its parts say what their layers are, whatever was done
    to the parts; then, what they said before: others may be made of the same objects.

    Raises:
        ModelStateError: if no configuration can say it, see `patching.config_of`; or if there are latent or packed
            layers that neither `binarize` made, nor the class of the model makes.
    """
    _check_origins(model)
    said: dict[int, tuple[PreTrainedConfig, Any]] = {
        id(config): (config, None) for config in (model.config, *_inside(model.config))
    }
    said |= {id(part.config): (part.config, config) for part, config in claims(model, strict=True)}
    changed = [(config, claim_of(config), right) for config, right in said.values() if claim_of(config) != right]
    if changed and state_of(model) == "float":
        warnings.warn(
            f"{type(model).__name__} is float, though its configuration says that it is binarized, as after "
            "from_config, which makes the layers of the class. It is saved as a float model.",
            stacklevel=5,
        )
    for config, _, right in changed:
        _say(config, right)
    try:
        yield
    finally:
        for config, before, _ in changed:
            _say(config, before)


def _say(config: PreTrainedConfig, claim: Any) -> None:
    if claim is not None:
        config.quantization_config = claim
    elif claim_of(config) is not None:
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


def _inside(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The configurations of parts in that of a whole."""
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield value
            yield from _inside(value)


@contextmanager
def saving(model: PreTrainedModel, state_dict: dict[str, Any] | None) -> Iterator[None]:
    """A context to save a model in, which writes these tensors, and a configuration that is true.

    Args:
        model: any.
        state_dict: as `save_pretrained` takes it; None: the model's own.

    Raises:
        ModelStateError: as by `truth`, or if the tensors are not those of a model in this state.
    """
    if getattr(model, "_hf_peft_config_loaded", False):  # Adapters are saved, and no configuration.
        yield
        return
    quantizer = vars(model).get("hf_quantizer")
    given = state_dict if isinstance(quantizer, ProxbitHfQuantizer) else None
    if given is not None:
        _check_state(model, given)
    with truth(model), _writing(quantizer, given):
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
    """Check that tensors are those of a model in this state. Of one that is spread over processes, only one has all."""
    for name, tensor in model.state_dict().items():
        other = given.get(name)
        if isinstance(other, Tensor) and (other.dtype == torch.uint8) != (tensor.dtype == torch.uint8):
            raise ModelStateError(
                f"state_dict: {name} is {other.dtype}, and that of this model is {tensor.dtype}: they are not in the "
                "same state. Load the tensors into a latent model, load_state_dict, and pack that."
            )


def find_claim(config: PreTrainedConfig) -> bool:
    """Give a configuration that is about to be loaded what its checkpoint says of how it was binarized, where that is
    not in it: it is of a part, was written by another program, or by an older proxbit.

    Args:
        config: changed in place.

    Returns:
        Whether the parts say it, each of itself.

    Raises:
        CheckpointError: if the checkpoint is of a whole which says it in a way that cannot be followed.
    """
    if getattr(config, "quantization_config", None) is not None and claim_of(config) is None:
        return False
    stored = stored_config() or {}
    if (said := claim_of(stored)) is not None:
        if stored.get("model_type") == config.model_type:
            own = claim_of(config)
            if own is None or as_config(own).state != as_config(said).state:
                config.quantization_config = said
        elif claim_of(config) is None and not _parts_say(stored):
            _take_from_whole(config, stored)
        return False
    if claim_of(config) is not None:
        return False
    first = next((claim for each in _inside(config) if (claim := claim_of(each)) is not None), None)
    if first is not None:
        config.quantization_config = first
    return first is not None


def _parts_say(stored: dict[str, Any]) -> bool:
    """Whether the configuration of a part, in that of a whole as JSON types, says how it was binarized."""
    tables = [value for value in stored.values() if isinstance(value, dict)]
    return any(claim_of(value) is not None or _parts_say(value) for value in tables)


def _take_from_whole(config: PreTrainedConfig, stored: dict[str, Any]) -> None:
    """Give the configuration of a part what that of the whole says of it; older files say it there alone."""
    try:
        whole = AutoConfig.for_model(**copy.deepcopy(stored))
        if (loaded := loaded_folder()) is not None:
            folder, _, variant = loaded
            check_folder(folder, whole, variant)
        kind = getattr(transformers, stored["architectures"][0])
        said = as_config(stored["quantization_config"])
        with torch.device("meta"):
            model = kind._from_config(whole)
        to_latent(model, said)
    except Exception as error:
        raise CheckpointError(
            f"This checkpoint is of a whole, {printable(str(stored.get('model_type')))}, which alone says how it was "
            f"binarized, and that cannot be followed here ({type(error).__name__}: {printable(str(error))}). Load it "
            "with its class, save it again, and load the part from there."
        ) from error
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    part = next((part for part in parts if type(part.config) is type(config)), None)
    if part is not None and (found := config_of(part)) is not None:
        config.quantization_config = found.replace(state=said.state)


ask_before_saving(saving)
ask_before_loading(find_claim)
