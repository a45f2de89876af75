"""The arguments: what is valid, what is said about what is not, and a help text for every field."""

from dataclasses import fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

from proxbit.errors import ConfigError, UnknownNameError
from proxbit.training import DistillationArguments, ProxConnectArguments

OWN = {
    "detect_anomalies",
    "activations_first",
    "distillation_gram",
    "distillation_tokens",
    "overflow_penalty",
    "progression",
    "recipe",
    "distillation_weight",
    "distillation_temperature",
    "mu_schedule",
    "mu_start",
    "mu_end",
    "hard_fraction",
    "latent_learning_rate_factor",
}
SCHEDULES = ["constant", "linear", "log", "sigmoid", "aggregate"]


def test_every_schedule_is_taken(tmp_path):
    assert [ProxConnectArguments(str(tmp_path), mu_schedule=name).mu_schedule for name in SCHEDULES] == SCHEDULES


def test_an_unknown_schedule_lists_every_valid_one(tmp_path):
    with pytest.raises(UnknownNameError, match="quadratic") as error:
        ProxConnectArguments(str(tmp_path), mu_schedule="quadratic")
    assert [name for name in SCHEDULES if name not in str(error.value)] == []


@pytest.mark.parametrize(
    ("kind", "value"),
    [(DistillationArguments, -0.1), (ProxConnectArguments, 1.5), (DistillationArguments, float("nan"))],
)
def test_the_distillation_weight_is_a_fraction(tmp_path, kind, value):
    with pytest.raises(ConfigError, match=r"distillation_weight must be in \[0, 1\], not"):
        kind(str(tmp_path), distillation_weight=value)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_the_hard_part_is_a_fraction(tmp_path, value):
    with pytest.raises(ConfigError, match=r"hard_fraction must be in \[0, 1\], not"):
        ProxConnectArguments(str(tmp_path), hard_fraction=value)


@pytest.mark.parametrize(
    ("name", "value"), [("distillation_weight", 0.0), ("distillation_weight", 1.0), ("hard_fraction", 1.0)]
)
def test_the_ends_of_a_fraction_are_valid(tmp_path, name, value):
    assert getattr(ProxConnectArguments(str(tmp_path), **{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("distillation_temperature", 0.0),
        ("latent_learning_rate_factor", -2.0),
        ("distillation_temperature", float("nan")),
    ],
)
def test_temperature_and_factor_are_positive(tmp_path, name, value):
    with pytest.raises(ConfigError, match=f"{name} must be positive, not {value}"):
        ProxConnectArguments(str(tmp_path), **{name: value})


@pytest.mark.parametrize("name", ["distillation_temperature", "latent_learning_rate_factor"])
def test_temperature_and_factor_are_finite(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name} must be finite"):
        ProxConnectArguments(str(tmp_path), **{name: float("inf")})


def test_the_own_fields_are_known_and_have_a_help_text():
    inherited = {item.name for item in fields(TrainingArguments)}
    helps = {item.name: item.metadata.get("help", "") for item in fields(ProxConnectArguments)}
    assert set(helps) - inherited == OWN
    assert [name for name in OWN if len(helps[name]) < 20] == []


def test_a_command_line_fills_the_fields(tmp_path):
    line = (
        f"--output_dir {tmp_path} --mu_schedule linear --mu_start 0.5 --hard_fraction 0.25 --distillation_weight 0.75"
    )
    (arguments,) = HfArgumentParser(ProxConnectArguments).parse_args_into_dataclasses(line.split())
    assert (arguments.mu_schedule, arguments.mu_start, arguments.mu_end) == ("linear", 0.5, None)
    assert (arguments.hard_fraction, arguments.distillation_weight) == (0.25, 0.75)


def test_nothing_is_written_for_invalid_arguments(tmp_path):
    with pytest.raises(ConfigError, match="hard_fraction"):
        ProxConnectArguments(str(tmp_path / "out"), hard_fraction=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_strategies_that_publish_checkpoints_are_refused(tmp_path, strategy):
    with pytest.raises(
        ConfigError, match=f"'{strategy}' would publish .*latent weights and pickles. Take 'end' or 'every"
    ):
        ProxConnectArguments(str(tmp_path), push_to_hub=True, hub_strategy=strategy)
    ProxConnectArguments(str(tmp_path), hub_strategy=strategy)  # nothing is pushed
    for right in ("end", "every_save"):
        ProxConnectArguments(str(tmp_path), push_to_hub=True, hub_strategy=right)


@pytest.mark.parametrize(
    ("given", "meant"), [("last", True), ("true", True), ("False", None), ("out/checkpoint-3",) * 2]
)
def test_what_is_resumed_may_be_a_word(tmp_path, given, meant):
    (args,) = HfArgumentParser(ProxConnectArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--resume_from_checkpoint", given]
    )
    assert args.resume_from_checkpoint == (given if meant is ... else meant)
