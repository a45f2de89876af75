"""Packing a model that FSDP2 or DeepSpeed shards over processes: bits are gathered, float weights never are."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from proxbit.errors import ModelStateError
from proxbit.nn import LatentWeight, latent_layers
from proxbit.packing import pack_signs
from proxbit.patching import state_of, to_latent, to_packed
from proxbit.plugin.hf_quantizer import update_configs
from proxbit.shards import gathered

__all__ = ["full_latents", "full_weights", "is_sharded", "packed_copy"]

# What activation checkpointing adds to the names of modules.
_WRAPPER = "_checkpoint_wrapped_module."


def is_sharded(model: nn.Module) -> bool:
    """Whether no process holds all of the weights, under FSDP2 or ZeRO-3."""
    return isinstance(model, FSDPModule) or any(map(_is_partitioned, model.parameters()))


def _is_partitioned(parameter: Tensor) -> bool:
    return "ds_tensor" in vars(parameter)


@contextmanager
def full_weights(module: nn.Module) -> Iterator[None]:
    """Within the context, the parameters of one module that ZeRO-3 shards are full; every process enters it."""
    parameters = [parameter for parameter in module.parameters(recurse=False) if _is_partitioned(parameter)]
    if not parameters:
        yield
        return
    deepspeed = import_module("deepspeed")  # Not above: it prints when it is imported.
    with deepspeed.zero.GatheredParameters(parameters):
        yield


def full_latents(model: nn.Module) -> Iterator[tuple[str, LatentWeight]]:
    """The layers with latent weights, with their names, one after the other in their `full_weights`."""
    for name, layer in latent_layers(model):
        with full_weights(layer):
            yield name, layer


def packed_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A packed copy of a latent model, sharded over processes or not; the model stays as it is.

    Each process packs the rows that it has, and bits, scales, and what is no latent weight, are gathered: one layer at
    a time. Every process calls this.

    Args:
        model: a latent model, as FSDP2 or DeepSpeed hold it, or a plain one.

    Returns:
        A packed model on the CPU, the same in every process.

    Raises:
        ModelStateError: if the model is not latent, is none of transformers, or has other modules than its class makes
            from its configuration.
        LatentError: for NaN or infinite latents, or rows that are all zero.
    """
    if state_of(model) != "latent":
        raise ModelStateError(f"packed_copy takes a latent model, this one is {state_of(model)}.")
    if not isinstance(model, PreTrainedModel):
        raise ModelStateError(f"packed_copy takes a model of transformers, not a {type(model).__name__}.")
    config = model.config.quantization_config
    kind: type[PreTrainedModel] = next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))
    with torch.device("meta"):
        copy = kind(deepcopy(model.config))
    to_latent(copy, config)
    to_packed(copy)
    update_configs(copy)
    modules = {f"{name}.".replace(_WRAPPER, "").removesuffix("."): module for name, module in model.named_modules()}
    if other := modules.keys() ^ dict(copy.named_modules()).keys():
        raise ModelStateError(
            f"{min(other)}: this model and a {kind.__name__} made from its configuration differ there, so it could not "
            "be loaded again. Change the class or the configuration, not the model."
        )
    for name, module in modules.items():
        with full_weights(module), torch.no_grad():
            own = copy.get_submodule(name)
            for key, value in _packed_tensors(name, module):
                _put(own, key, gathered(value).detach().cpu().clone())
    copy.tie_weights()
    return copy.eval()


def _packed_tensors(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module itself, as the packed model has them."""
    for key, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if key != "weight" or not isinstance(module, LatentWeight):
            yield key, value
            continue
        module.check_latent(name)
        rows = module.hard_rows()
        stored = {"weight": pack_signs(rows.values), "weight_scale": rows.scale, "weight_offset": rows.offset}
        yield from ((part, tensor) for part, tensor in stored.items() if tensor is not None)


def _put(module: nn.Module, key: str, value: Tensor) -> None:
    """Replace a parameter or a buffer of the meta device."""
    if key in dict(module.named_parameters(recurse=False)):
        setattr(module, key, nn.Parameter(value, requires_grad=getattr(module, key).requires_grad))
    else:
        setattr(module, key, value)
