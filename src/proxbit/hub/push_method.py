"""`model.push_to_hub` of latent and packed models."""

from importlib import import_module
from types import MethodType

from transformers import PreTrainedModel

__all__ = ["give_push", "take_push"]

NAME = "push_to_hub"


def push_to_hub(
    self: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: list[str] | None = None,
) -> str:
    """Upload a packed model with its cards, by `proxbit.push`; arguments as in `transformers.PreTrainedModel`.

    Returns:
        The address of the commit.

    Raises:
        ModelStateError: if the model is latent; `proxbit.push(model, repo_id, latent=True)` uploads that.
        HubError: if the Hub refuses, or is not reached.
    """
    # Writing cards takes much that running a model does not.
    address: str = import_module("proxbit.hub.push").push(
        self,
        repo_id,
        message=commit_message,
        description=commit_description,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        max_shard_size=max_shard_size,
        tags=tuple(tags or ()),
    )
    return address


def give_push(model: PreTrainedModel) -> None:
    """Put this `push_to_hub` in the place of that of transformers, which uploads latent weights unasked, and no
    quantization card."""
    setattr(model, NAME, MethodType(push_to_hub, model))


def take_push(model: PreTrainedModel) -> None:
    """Undo `give_push`."""
    vars(model).pop(NAME, None)
