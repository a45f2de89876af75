"""How proxbit has transformers read what a name or a folder holds: whatever lies there, none of its code runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel, dynamic_module_utils

from proxbit.errors import CheckpointError, ProxbitError
from proxbit.foreign import printable

__all__ = ["UNREADABLE", "class_of", "load_pretrained", "make_model"]

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
    pictures for one.

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
