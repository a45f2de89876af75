"""`examples/accelerate_loop.py` with each file of `examples/accelerate_configs/`, in two processes on the CPU."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from distributed_runs import run_example, settings_of
from proxbit.patching import state_of

pytestmark = pytest.mark.xdist_group("processes")

EXAMPLES = Path(__file__).parents[1] / "examples"
ALL = sorted(file.stem for file in (EXAMPLES / "accelerate_configs").glob("*.yaml"))
# The others need a package that is none of the test environment's, or four processes.
FILES = [name for name in ALL if "deepspeed" not in name and name != "fsdp2_hybrid"]


@pytest.fixture(scope="module")
def reference(processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    return run(processes, "ddp", folder), folder


def run(processes, file, folder):
    settings = settings_of(str(EXAMPLES / "accelerate_configs" / f"{file}.yaml"))
    argv = ("--steps", "10", "--batch", "8", "--out", str(folder))
    first, second = processes(run_example, settings, str(EXAMPLES / "accelerate_loop.py"), *argv)
    assert first == second
    return first


@pytest.mark.parametrize("file", FILES)
def test_every_setting_trains_the_same_model(tmp_path, processes, reference, file):
    """As DDP, to 1e-5; those with bf16 to its rounding."""
    expected, folder = reference
    found = run(processes, file, tmp_path)
    tolerance = 0.05 if "bf16" in file else 1e-5
    assert found["first loss"] == pytest.approx(expected["first loss"], abs=tolerance)
    assert found["last loss"] == pytest.approx(expected["last loss"], abs=tolerance)
    made, other = (AutoModelForImageClassification.from_pretrained(each) for each in (tmp_path, folder))
    assert state_of(made) == "packed"
    if "bf16" not in file:
        bits = [
            (value, other.state_dict()[name]) for name, value in made.state_dict().items() if value.dtype == torch.uint8
        ]
        assert bits and all(torch.equal(a, b) for a, b in bits)


@pytest.mark.parametrize(
    "file, expected",
    [
        (
            "fsdp2_hybrid",
            {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2", "FSDP_VERSION": "2"},
        ),
        *((f"deepspeed_zero{stage}", {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}) for stage in (1, 2, 3)),
    ],
)
def test_settings_that_are_read_and_not_run(file, expected):
    settings = settings_of(str(EXAMPLES / "accelerate_configs" / f"{file}.yaml"))
    assert expected.items() <= settings.items()


def test_no_setting_is_without_a_test():
    assert set(ALL) == {*FILES, "fsdp2_hybrid", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"}
