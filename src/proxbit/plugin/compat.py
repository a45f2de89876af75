"""Work-arounds for faults of dependencies, each with the issue and the condition under which it can go."""

import functools
import inspect
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import DistError
from transformers import PreTrainedConfig, PreTrainedModel, modeling_utils
from transformers.utils import CONFIG_NAME, cached_file

from proxbit.errors import CheckpointError

__all__ = [
    "download_arguments",
    "is_lost_process",
    "loaded_folder",
    "missing_tensors",
    "restore_specs",
    "stored_config",
    "tensor_specs",
    "wrap_loading",
    "wrap_saving",
]


def _running(name: str) -> Any:
    """A variable of the innermost `from_pretrained` of a model that is running; None if there is none.

    transformers (5.15 to 5.23 at least) computes these in `from_pretrained` and passes them to no method of a
    quantizer, whose interface goes back to https://github.com/huggingface/transformers/pull/26610: the base model that
    an adapter's folder leads to, the commit that a revision was resolved to, the configuration in hand, and the keys
    that were missing. The arguments of the call are other values, so that wrapping it, as saving is wrapped below,
    would not give them. To be deleted once a quantizer is told.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "from_pretrained" and "download_kwargs" in frame.f_locals:
            return frame.f_locals.get(name)
        frame = frame.f_back
    return None


def download_arguments() -> dict[str, Any]:
    """Keyword arguments of `cached_file` (token, revision, cache_dir and the like) with which the running
    `from_pretrained` downloads; none where there is no such call.
    """
    return dict(_running("download_kwargs") or {})


def loaded_folder() -> tuple[Path, Any, str | None] | None:
    """The folder on this machine that the running `from_pretrained` loads, its configuration, and the variant; None
    where there is no such call, or it loads no folder.
    """
    folder, config = _running("pretrained_model_name_or_path"), _running("config")
    if folder is None or config is None or _running("gguf_file") or not Path(folder).is_dir():
        return None
    return Path(folder) / (_running("subfolder") or ""), config, _running("variant")


def missing_tensors() -> list[str]:
    """The names of the tensors that the running `from_pretrained` filled at random, because the files lack them."""
    return sorted(getattr(_running("loading_info"), "missing_keys", ()))


def stored_config() -> dict[str, Any] | None:
    """What `config.json` of the checkpoint holds that the running `from_pretrained` loads; None if it has none. The
    configuration in hand is that of a part of it, or another one that was given.
    """
    name = _running("pretrained_model_name_or_path")
    if name is None or _running("gguf_file"):
        return None
    # It has been fetched before.
    arguments = download_arguments() | {"local_files_only": True, "force_download": False}
    try:
        file = cached_file(name, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **arguments)
        found = None if file is None else json.loads(Path(file).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None  # transformers reads it too, where it needs it, and says what is wrong.
    return found if isinstance(found, dict) else None


def wrap_saving(context: Callable[[PreTrainedModel, dict[str, Any] | None], AbstractContextManager[None]]) -> None:
    """Have `save_pretrained` of every model run in a context.

    transformers (5.15 to 5.23 at least) asks only a model's own quantizer, which a model around a binarized part does
    not have, and drops the argument `state_dict` where there is one. To be deleted once it does neither.

    Args:
        context: given the model and `state_dict`.
    """
    original = PreTrainedModel.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(self, *args, **kwargs).arguments
        with context(self, given.get("state_dict")):
            return original(self, *args, **kwargs)

    PreTrainedModel.save_pretrained = save_pretrained


def wrap_loading(complete: Callable[[PreTrainedConfig], bool]) -> None:
    """Have every configuration completed before `from_pretrained` looks for a quantizer in it.

    transformers (5.15 to 5.23 at least) looks only at the top level of a configuration. To be deleted once a plug-in
    can look by itself.

    Args:
        complete: given the configuration, which it may change; what it returns becomes `by_parts` of the quantizer.
    """
    original = modeling_utils.get_hf_quantizer

    @functools.wraps(original)
    def get_hf_quantizer(config: PreTrainedConfig, *args: Any, **kwargs: Any) -> Any:
        by_parts = complete(config)
        found = original(config, *args, **kwargs)
        if by_parts:
            found[0].by_parts = True
        return found

    modeling_utils.get_hf_quantizer = get_hf_quantizer


def tensor_specs(model: PreTrainedModel) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every parameter and buffer, for `restore_specs`.

    Args:
        model: before its weights are loaded, while the default dtype is the one that it is loaded in. What it keeps in
            fp32 even so, `_keep_in_fp32_modules`, has that dtype.
    """
    planned = model._get_dtype_plan(torch.get_default_dtype())
    kept = {re.compile(pattern.replace("*", ".*")): each for pattern, each in planned.items()}
    found = {}
    for name, tensor in model.state_dict().items():
        wider = next((each for pattern, each in kept.items() if pattern.search(name)), tensor.dtype)
        found[name] = (tensor.shape, wider if tensor.is_floating_point() else tensor.dtype)
    return found


def restore_specs(model: nn.Module, wanted: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Give floats that were loaded the dtype that was asked for, and refuse other shapes.

    transformers 5.15 and 5.16 take both from the file where there is a quantizer; later ones take them from the model,
    as for float models. To be deleted once the oldest supported transformers does.

    Args:
        model: after loading; changed in place.
        wanted: its `tensor_specs` before loading.

    Raises:
        CheckpointError: naming the tensor.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        shape, dtype = wanted.get(name, (tensor.shape, tensor.dtype))
        if tensor.shape != shape:
            raise CheckpointError(
                f"{name} is {list(tensor.shape)} in the checkpoint, and the model asks for {list(shape)}. For a new "
                "head, with other labels: pip install --upgrade transformers, and ignore_mismatched_sizes=True."
            )
        if tensor.dtype != dtype and tensor.is_floating_point() and dtype.is_floating_point:
            tensor.data = tensor.data.to(dtype)


def is_lost_process(error: BaseException) -> bool:
    """Whether a collective operation failed because another process has ended, or cannot be reached.

    For gloo torch (2.10 to 2.15 at least) raises a plain RuntimeError, whose text names the file of gloo. To be deleted
    once it raises a DistError.
    """
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))
