"""`model.push_to_hub`, of every state a model can be in."""

import copy

import pytest
import torch
import transformers as hf

import proxbit
from proxbit.checkpoint.files import CARD_NAME
from proxbit.errors import ModelStateError
from tiny_models import vit


def latent(seed=0):
    torch.manual_seed(seed)
    return proxbit.binarize(hf.ViTForImageClassification(vit()))


def packed(seed=0):
    return proxbit.pack(latent(seed)).eval()


def pull(repo="me/tiny", **changes):
    return hf.AutoModelForImageClassification.from_pretrained(repo, **changes)


def same(model, other):
    mine, others = model.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(others[key], value) for key, value in mine.items())


def test_the_method_of_a_packed_model(hub):
    """As everybody knows it from transformers; in one piece, and in several; of a copy, and of what was loaded."""
    model = packed()
    model.push_to_hub("me/tiny", private=True, tags=["birds"], commit_message="Mine")
    copy.deepcopy(model).push_to_hub("me/pieces", max_shard_size="10KB")
    tiny, pieces = (hub.hub.repositories[name] for name in ("me/tiny", "me/pieces"))
    assert sum(name.endswith(".safetensors") for name in pieces.files()) == 3
    assert tiny.private and tiny.titles[-1] == "Mine" and b"- birds" in tiny.files()["README.md"]
    assert {"README.md", CARD_NAME} < set(tiny.files()) & set(pieces.files())
    assert same(model, pull()) and same(model, pull("me/pieces"))
    pull().push_to_hub("me/again")
    assert same(model, pull("me/again")) and CARD_NAME in hub.hub.repositories["me/again"].files()


def test_the_method_of_a_latent_model_asks_first(hub):
    with pytest.raises(ModelStateError, match="Pack it first"):
        latent().push_to_hub("me/tiny")
    assert hub.hub.repositories == {}


def test_the_method_of_a_float_model_is_that_of_transformers(hub):
    """Whichever way it became float."""
    for back in (proxbit.dequantize, lambda model: model.dequantize()):
        model = back(packed())
        assert "push_to_hub" not in vars(model)
    model.push_to_hub("me/float")
    assert CARD_NAME not in hub.hub.repositories["me/float"].files()


def test_a_pull_request(hub):
    first, other = packed(), packed(1)
    first.push_to_hub("me/tiny")
    before = hub.hub.repositories["me/tiny"].branches["main"]
    other.push_to_hub("me/tiny", create_pr=True, commit_description="Trained for longer.")
    assert hub.hub.repositories["me/tiny"].branches["main"] == before
    assert same(other, pull(revision="refs/pr/1")) and same(first, pull())
