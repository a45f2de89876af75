"""Loading what a name or a folder holds, as a model or into one: whatever lies there, none of its code runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, dynamic_module_utils

from proxbit.checkpoint.files import folder_files, tensor_headers
from proxbit.checkpoint.weights import as_saved
from proxbit.errors import CheckpointError, ProxbitError
from proxbit.foreign import printable
from proxbit.patching import check_latents

__all__ = ["UNREADABLE", "class_of", "load_pretrained", "load_weights", "make_model"]

# What transformers raises, beside OSError and ValueError, at files that hold anything else than they should.
UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


@contextmanager
def _no_code(name: Any) -> Iterator[None]:
    """Have transformers refuse code of a repository where it would ask whether to run it.

    `trust_remote_code=False` says so for the configuration that a call reads; for one inside of it, as of a backbone,
    transformers (5.15 to 5.23 at least) asks in spite of that, unless there is no time to answer.

    Raises:
        CheckpointError: if there is such code, and nothing else to load the model with.
    """
    waits = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    except ProxbitError:
        raise
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise CheckpointError(
            f"{printable(name)} cannot be loaded without code of its own (auto_map), which proxbit never runs. Whoever "
            "trusts that code loads the model in Python, from_pretrained(..., trust_remote_code=True), and hands it "
            "over: proxbit.pack(model), proxbit.push(model, ...)."
        ) from error
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = waits


def class_of(config: PreTrainedConfig, where: str | Path) -> type[PreTrainedModel] | None:
    """The class of a model that its configuration names.

    Args:
        config: of the model.
        where: it lies, for the message.

    Returns:
        The class; None where it names none, or one that transformers does not have.

    Raises:
        CheckpointError: if the name is that of something else than a model.
    """
    names = config.architectures or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f"config.json of {printable(where)}: architectures must be a list of names of classes, not "
            f"{printable(repr(names))}."
        )
    if not names:
        return None
    found = getattr(transformers, names[0], None)
    if found is not None and not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CheckpointError(
            f"config.json of {printable(where)}: architectures names {printable(names[0])}, which is no class of a "
            "model, such as ViTForImageClassification."
        )
    return found


def load_pretrained(kind: Any, name: str | Path, **arguments: Any) -> Any:
    """What a class of transformers reads from a folder or a repository: a model, a configuration, or what prepares
    images for one.

    Args:
        kind: the class, or one of the Auto classes.
        name: a folder, or a name on the Hub.
        **arguments: of `from_pretrained`.

    Raises:
        CheckpointError: if it takes code of the repository's own.
        OSError, and others of `UNREADABLE`: from transformers.
    """
    with _no_code(name):
        return kind.from_pretrained(name, trust_remote_code=False, **arguments)


def make_model(config: PreTrainedConfig, kind: type[PreTrainedModel] | None) -> PreTrainedModel:
    """A model with random weights.

    Args:
        config: of the model.
        kind: its class; None: that of an image classifier with this configuration.

    Raises:
        CheckpointError: if it takes code of the repository's own.
        Others of `UNREADABLE`: from transformers.
    """
    with _no_code(config.name_or_path):
        if kind is not None:
            return kind(config)
        made: PreTrainedModel = transformers.AutoModelForImageClassification.from_config(
            config, trust_remote_code=False
        )
        return made


def load_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Put the weights of a checkpoint into a model of the same kind and state.

    The Trainer of transformers (5.15 to 5.23 at least) reads checkpoints with `load_state_dict(strict=False)`, without
    the renaming that `save_pretrained` did, so resuming or loading the best model keeps the weights of renamed layers
    as they happen to be: https://github.com/huggingface/transformers/issues/48805. To be deleted once the oldest
    supported transformers applies weight conversions there.

    Args:
        model: float or latent; changed in place, parameters stay the same objects.
        folder: a checkpoint of the same layers and state.

    Raises:
        CheckpointError: naming the file, or what is missing, too much, or of another shape.
        LatentError: if a latent weight that was loaded cannot be binarized.
    """
    own = model.state_dict()
    names = _saved_names(model, own)
    if names is None:
        loaded = load_pretrained(type(model), folder)
        model.load_state_dict(loaded.state_dict())
        return
    found: dict[str, Tensor] = {}
    for file in folder_files(Path(folder)):
        tensor_headers(file)
        found |= {names.get(name, name): tensor for name, tensor in load_file(file).items()}
    _check_fit(found, own, set(model._keys_to_ignore_on_save or ()), folder)
    model.load_state_dict(found, strict=False)
    check_latents(model)


def _saved_names(model: PreTrainedModel, own: dict[str, Tensor]) -> dict[str, str] | None:
    """The names of a model's tensors by those that `save_pretrained` gives them; None if it does more than rename.

    A new model from the folder would have the names too, but only the layers that the configuration knows: not a head
    of one's own, and not fewer blocks.
    """
    names = {id(tensor): name for name, tensor in own.items()}
    saved = as_saved(model, own)
    found = {name: names[id(tensor)] for name, tensor in saved.items() if id(tensor) in names}
    return found if len(found) == len(saved) == len(own) else None


def _check_fit(found: dict[str, Tensor], own: dict[str, Tensor], unsaved: set[str], folder: str | Path) -> None:
    """Check that tensors of a folder are those of a model. Of tied ones `save_pretrained` writes only one."""
    loaded = {own[name].data_ptr() for name in found if name in own}
    missing = [name for name in own.keys() - found.keys() - unsaved if own[name].data_ptr() not in loaded]
    other = [name for name in found.keys() & own.keys() if found[name].shape != own[name].shape]
    problems = {"missing": missing, "not in the model": found.keys() - own.keys(), "of another shape": other}
    told = [
        f"{', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}: {what}"
        for what, names in problems.items()
        if names
    ]
    if told:
        raise CheckpointError(
            f"The weights in {folder} are not those of this model ({'; '.join(told)}). Load them into the model that "
            "was trained: the same layers, the same head, binarized in the same way."
        )
