"""Recipes: every one works, gives way to what is given, and says what it sets."""

import dataclasses

import pytest

import proxbit
from proxbit.errors import ConfigError, ModelStateError, UnknownNameError
from proxbit.nn import BinaryLinear
from proxbit.training import RECIPES, ProxConnectArguments, Recipe, get_recipe, register_recipe
from tiny_models import FAMILIES, SIDE

every = pytest.mark.parametrize("name", list(RECIPES))


@every
def test_a_recipe_is_data_that_is_valid(name):
    recipe = get_recipe(name)
    fields = {item.name for item in dataclasses.fields(ProxConnectArguments)}
    assert set(recipe.training) <= fields and recipe.summary and recipe.source
    assert isinstance(recipe.binarization(), proxbit.BinarizationConfig)
    with pytest.raises(TypeError):
        recipe.training["hard_fraction"] = 0.5


@every
def test_a_float_model_is_binarized_trained_and_packed(name, crops, tmp_path):
    examples = [{"pixel_values": pixels, "labels": i % 3} for i, pixels in enumerate(crops(8, SIDE))]
    arguments = ProxConnectArguments(str(tmp_path), recipe=name, max_steps=4, hard_fraction=0.25, report_to="none")
    teacher = FAMILIES["vit"]()
    trainer = proxbit.ProxConnectTrainer(
        model=FAMILIES["vit"](), args=arguments, teacher=teacher, train_dataset=examples, eval_dataset=examples
    )
    config = trainer.model.config.quantization_config
    assert config.activations == get_recipe(name).config.get("activations", "float")
    trainer.train()
    assert trainer.evaluate()["eval_gap_loss"] == pytest.approx(0, abs=0.05)
    assert not any(isinstance(module, BinaryLinear) for module in proxbit.pack(trainer.model).modules())


def test_what_is_given_takes_the_place(tmp_path):
    arguments = ProxConnectArguments(str(tmp_path), recipe="w1a1-two-stage")
    assert (arguments.activations_first, arguments.distillation_weight) == (0.5, 0.5)
    arguments = ProxConnectArguments(
        str(tmp_path),
        recipe="w1a1-two-stage",
        activations_first=0.0,
        distillation_weight=0.0,
        progression="front-to-back",
    )
    assert (arguments.activations_first, arguments.distillation_weight) == (0.0, 0.0)
    assert arguments.progression == "front-to-back"
    assert get_recipe("w1a1").binarization(activations="int8", residual=False).activations == "int8"


def test_without_a_recipe(tmp_path):
    arguments = ProxConnectArguments(str(tmp_path))
    assert (arguments.hard_fraction, arguments.distillation_weight, arguments.distillation_temperature) == (
        0.1,
        0.5,
        2.0,
    )
    with pytest.raises(ModelStateError, match="or name a recipe"):
        proxbit.ProxConnectTrainer(model=FAMILIES["vit"](), args=arguments)


def test_a_latent_model_keeps_its_own_configuration(tmp_path):
    model = proxbit.binarize(FAMILIES["vit"](), proxbit.BinarizationConfig(weights="bnn"))
    trainer = proxbit.ProxConnectTrainer(model=model, args=ProxConnectArguments(str(tmp_path), recipe="w1a1"))
    assert trainer.model.config.quantization_config.weights == "bnn"


def test_a_recipe_of_your_own(tmp_path):
    name = "test-own-recipe"
    register_recipe(name, Recipe("mine", {"weights": "parq"}, {"hard_fraction": 0.3}))
    assert ProxConnectArguments(str(tmp_path), recipe=name).hard_fraction == 0.3
    with pytest.raises(UnknownNameError, match="already registered"):
        register_recipe(name, Recipe("again"))
    register_recipe("test-wrong-recipe", Recipe("wrong", training={"learning_rate": 0.3}))
    with pytest.raises(
        ConfigError, match=r"'test-wrong-recipe' sets \['learning_rate'\]; a recipe sets some of .*'hard_fraction'"
    ):
        ProxConnectArguments(str(tmp_path), recipe="test-wrong-recipe")
    with pytest.raises(ConfigError, match="activations must be one of"):
        Recipe("wrong", {"activations": "int3"})


def test_unknown_recipes_are_refused(tmp_path):
    with pytest.raises(UnknownNameError, match=r"Unknown recipe 'w1a9'. Did you mean"):
        ProxConnectArguments(str(tmp_path), recipe="w1a9")
