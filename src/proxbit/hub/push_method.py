"""`model.push_to_hub` of latent and packed models: that of transformers uploads latent weights unasked, and no
quantization card.
"""

from importlib import import_module

from transformers import PreTrainedModel

from proxbit.plugin.hf_quantizer import METHODS

__all__ = ["push_to_hub"]


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


METHODS["push_to_hub"] = push_to_hub
