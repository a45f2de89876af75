"""`trainer.push_to_hub`: the packed model goes to the Hub, the latent one stays and learns on."""

import json

import pytest
import torch
from transformers import AutoModelForImageClassification, ViTForImageClassification, ViTImageProcessorPil
from transformers.trainer_utils import HubStrategy

import proxbit
from hub_server import Fault
from proxbit.checkpoint.files import CARD_NAME
from proxbit.errors import CardError, ConfigError, HubError
from proxbit.nn import latent_layers
from proxbit.patching import state_of
from proxbit.training import ProxConnectArguments, ProxConnectTrainer
from tiny_models import LABELS, SIDE, vit

RELEASE = {".gitattributes", "README.md", "config.json", "model.safetensors", "preprocessor_config.json", CARD_NAME}


@pytest.fixture
def prepare(hub, tmp_path, crops):
    """A function that makes a trainer of a tiny model."""

    def make(**changes):
        fixed = dict(report_to="none", disable_tqdm=True, use_cpu=True, logging_strategy="no", max_steps=2)
        examples = [{"pixel_values": image, "labels": i % LABELS} for i, image in enumerate(crops(4, SIDE))]
        return ProxConnectTrainer(
            model=proxbit.binarize(ViTForImageClassification(vit())),
            args=ProxConnectArguments(str(tmp_path / "vit-1bit"), **fixed | changes),
            train_dataset=examples,
            processing_class=ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        )

    return make


def pull(repo="me/vit-1bit", **changes):
    return AutoModelForImageClassification.from_pretrained(repo, **changes)


def test_the_packed_model_with_its_cards(hub, prepare):
    """What is on the Hub computes what the trainer's own model does when it is packed; that one is still latent."""
    trainer = prepare()
    trainer.train()
    before = {name: layer.weight.clone() for name, layer in latent_layers(trainer.model)}
    address = trainer.push_to_hub()
    repository = hub.hub.repositories["me/vit-1bit"]
    assert address == f"{hub.url}/me/vit-1bit/commit/{repository.branches['main']}"
    assert set(repository.files()) == RELEASE and repository.titles[-1] == "End of training"
    card = json.loads(repository.files()[CARD_NAME])
    assert (card["model_id"], card["state"], card["labelled_samples"]) == ("me/vit-1bit", "packed", 4)

    after = dict(latent_layers(trainer.model))
    assert after.keys() == before.keys() and all(torch.equal(after[name].weight, before[name]) for name in before)
    assert state_of(trainer.model) == "latent"
    trainer.args.max_steps = 3
    trainer.train()
    assert any(not torch.equal(after[name].weight, before[name]) for name in before)


def test_what_is_on_the_hub_is_what_was_trained(hub, prepare):
    trainer = prepare()
    trainer.train()
    trainer.push_to_hub()
    loaded, packed = pull().state_dict(), proxbit.pack(trainer.model).state_dict()
    assert loaded.keys() == packed.keys() and all(torch.equal(loaded[key], packed[key]) for key in packed)


def test_arguments_of_the_trainer_and_of_the_call(hub, prepare, monkeypatch):
    hub.sign_in(monkeypatch, None)
    trainer = prepare(hub_model_id="me/named", hub_token="hf_me", hub_private_repo=True, hub_revision="next")
    trainer.push_to_hub("mine", run={"license": "mit", "dataset": "crops"})
    repository = hub.hub.repositories["me/named"]
    assert repository.private and repository.titles[-1] == "mine"
    assert b"license: mit" in repository.files("next")["README.md"]
    trainer.push_to_hub(revision="other", token="hf_me")
    assert set(repository.files("other")) == RELEASE


def test_latent_when_asked(hub, prepare):
    trainer = prepare()
    trainer.push_to_hub(latent=True)
    assert state_of(pull()) == "latent"
    trainer.push_to_hub()
    assert state_of(pull()) == "packed"


def test_in_the_background(hub, prepare):
    future = prepare().push_to_hub(blocking=False)
    assert future.result(timeout=30).endswith(hub.hub.repositories["me/vit-1bit"].branches["main"])
    assert state_of(pull()) == "packed"


def test_at_every_save_the_packed_model(hub, prepare):
    trainer = prepare(push_to_hub=True, save_strategy="steps", save_steps=1, hub_always_push=True)
    trainer.train()
    trainer._finish_current_push()
    repository = hub.hub.repositories["me/vit-1bit"]
    assert repository.titles == ["initial commit", *(f"Training in progress, step {step}" for step in (1, 2))]
    assert all(set(files) == RELEASE for files in list(repository.commits.values())[1:])
    assert state_of(pull()) == "packed"
    trainer.save_model()
    assert repository.titles[-1] == "Model save"


def test_only_at_the_end(hub, prepare):
    prepare(push_to_hub=True, save_strategy="steps", save_steps=1, hub_strategy=HubStrategy.END).train()
    assert hub.hub.repositories["me/vit-1bit"].titles == ["initial commit"]


@pytest.mark.parametrize("strategy", [HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS])
def test_latent_checkpoints_are_not_published(hub, prepare, strategy):
    """Also where the strategy was set after the arguments were made."""
    asked = dict(push_to_hub=True, save_strategy="steps", save_steps=2)
    trainer = prepare(**asked)
    trainer.args.hub_strategy = strategy
    with pytest.raises(ConfigError, match="would publish checkpoints: latent weights and pickles"):
        trainer.train()
    assert set(hub.hub.repositories["me/vit-1bit"].files()) <= {".gitattributes"}


def test_of_a_model_that_is_spread_over_processes_only_bits_are_gathered(hub, prepare, monkeypatch):
    """That it is spread is played here; `tests/training/test_distributed.py` packs one that is."""
    trainer = prepare()
    monkeypatch.setattr("proxbit.training.upload.is_sharded", lambda model: True)
    with pytest.raises(ConfigError, match=r"No process holds the float weights.*trainer.save_model.*latent=True"):
        trainer.push_to_hub(latent=True)
    trainer.push_to_hub()
    assert "model.safetensors" in hub.hub.repositories["me/vit-1bit"].files()


def test_refusals_are_one_line_and_training_is_not_lost(hub, prepare):
    trainer = prepare()
    with pytest.raises(CardError, match="licence"):
        trainer.push_to_hub(run={"licence": "mit"})
    hub.faults = [Fault("POST", "/commit/", status=500)]
    with pytest.raises(HubError, match=r"^me/vit-1bit was not uploaded: the Hub failed \(500\)"):
        trainer.push_to_hub()
    assert state_of(trainer.model) == "latent"
    trainer.push_to_hub()
