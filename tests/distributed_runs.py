"""What the processes of the distributed tests run: one training, under any engine, and what came of it."""

import os
import runpy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import PrinterCallback, ViTForImageClassification

import proxbit
from proxbit.config import BinarizationConfig
from proxbit.plugin.sharded import full_weights, packed_copy
from proxbit.shards import gathered
from proxbit.training import ProxConnectArguments, ProxConnectTrainer
from proxbit.training.metrics import classification_metrics
from tiny_models import LABELS, vit

CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate_configs"


@contextmanager
def engine(settings: dict[str, str]) -> Iterator[None]:
    """Within the context, accelerate is set up as by `accelerate launch`.

    It has FSDP and DeepSpeed on accelerators only: for these it is told that there is one.
    """
    if "ACCELERATE_USE_DEEPSPEED" in settings:
        os.environ["DS_ACCELERATOR"] = "cpu"
        # It would compile a shortcut through shared memory.
        import_module("deepspeed").ops.__compatible_ops__.clear()
    before, prepare = dict(os.environ), PartialState._prepare_backend
    if not {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & settings.keys():
        settings = settings | {"ACCELERATE_USE_CPU": "true"}
    else:
        settings = settings | {"ACCELERATE_TORCH_DEVICE": "cpu"}
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    os.environ |= settings
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
        PartialState._prepare_backend = prepare
        AcceleratorState._reset_state(reset_partial_state=True)


def make(seed: int = 1, latent: bool = True, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = ViTForImageClassification(vit())
    nn.init.normal_(model.classifier.weight, std=0.1)
    model.to(dtype)
    return proxbit.binarize(model, BinarizationConfig(**changes)) if latent else model


def examples(pictures: torch.Tensor) -> list[dict[str, Any]]:
    return [{"pixel_values": picture, "labels": i % LABELS} for i, picture in enumerate(pictures)]


def prepare(folder, pictures: torch.Tensor, model: nn.Module, **changes: Any) -> ProxConnectTrainer:
    pictures = pictures.to(model.dtype)
    teacher = make(9, latent=False, dtype=model.dtype) if changes.pop("teacher", False) else None
    callbacks = changes.pop("callbacks", None)
    fixed = dict(
        report_to="none", disable_tqdm=True, save_strategy="no", use_cpu="ACCELERATE_TORCH_DEVICE" not in os.environ
    )
    training = dict(
        per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=50, learning_rate=1e-3, logging_steps=1
    )
    trainer = ProxConnectTrainer(
        model=model,
        teacher=teacher,
        args=ProxConnectArguments(str(folder), **(fixed | training | changes)),
        train_dataset=examples(pictures),
        eval_dataset=examples(pictures[:8]),
        compute_metrics=classification_metrics,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def curve(trainer) -> list[dict[str, float]]:
    names = ("step", "loss", "grad_norm", "learning_rate", "mu", "hardening_gap", "flip_ratio")
    return [{k: entry[k] for k in names if k in entry} for entry in trainer.state.log_history if "loss" in entry]


def fit(kind: str, folder, pictures, *, model: dict | None = None, resume: str | None = None, **changes: Any) -> dict:
    """Train, and say what came of it.

    Args:
        kind: "one", one process; or a file of `examples/accelerate_configs/`.
        folder: of the output.
        pictures: to train with, and the first of them to evaluate.
        model: what `make` takes.
        resume: a checkpoint.
        **changes: of the arguments.
    """
    with engine({} if kind == "one" else settings_of(str(CONFIGS / f"{kind}.yaml"))):
        trainer = prepare(folder, pictures, make(**(model or {})), **changes)
        trainer.train(resume_from_checkpoint=resume)
        return outcome(trainer)


def outcome(trainer) -> dict[str, Any]:
    evaluation = trainer.evaluate()
    return {
        "curve": curve(trainer),
        "evaluation": {key: value for key, value in evaluation.items() if "time" not in key and "second" not in key},
        "packed": packed_copy(trainer.model).state_dict(),
        "distributed": str(trainer.accelerator.distributed_type),
        "weights": whole_state(trainer.model),
    }


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights, wherever an engine has them."""
    with ExitStack() as gathered_for_zero:
        for module in model.modules():
            gathered_for_zero.enter_context(full_weights(module))
        return {name: gathered(value).detach().clone() for name, value in model.state_dict().items()}


def apart(first: list[dict[str, float]], second: list[dict[str, float]]) -> dict[str, float]:
    """The largest difference of each logged number."""
    assert len(first) == len(second) > 0
    return {name: max(abs(a[name] - b[name]) for a, b in zip(first, second)) for name in first[0]}


def other_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> tuple[int, int]:
    """How many of the packed bits differ, and of how many."""
    assert first.keys() == second.keys()
    packed = [name for name, value in first.items() if value.dtype == torch.uint8]
    changed = [first[name] ^ second[name] for name in packed]
    different = sum(int(sum(((bits >> place) & 1).sum() for place in range(8))) for bits in changed)
    return different, sum(8 * bits.numel() for bits in changed)


def settings_of(file: str, *options: str) -> dict[str, str]:
    """What `accelerate launch --config_file FILE` would put into the environment of its processes."""
    arguments = ["--config_file", file, "--main_process_port", "0", *options, "script.py"]
    args, defaults, mixed = _validate_launch_command(launch_command_parser().parse_args(arguments))
    if args.use_deepspeed:
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if mixed else [])]
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        environment = prepare_deepspeed_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args)
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_", "PARALLEL"))}


def run_example(settings: dict[str, str], file: str, *argv: str) -> dict[str, float]:
    """Run `main` of an example."""
    with engine(settings):
        return runpy.run_path(file)["main"](list(argv))


def traffic(pictures: torch.Tensor, latent: bool, hook: str) -> int:
    """Bytes that a process hands over for the gradients of one step of DDP, with a hook of torch."""
    model = DistributedDataParallel(make(latent=latent))
    hooks = {
        "none": (None, default_hooks.allreduce_hook),
        "fp16": (None, default_hooks.fp16_compress_hook),
        "powerSGD": (PowerSGDState(None, 1, start_powerSGD_iter=2, use_error_feedback=False), powerSGD_hook),
    }
    model.register_comm_hook(*hooks[hook])
    sent, send = [], torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda tensor, *args, **kwargs: (
        sent.append(tensor.nbytes),
        send(tensor, *args, **kwargs),
    )[1]
    try:
        for _ in range(4):  # PowerSGD begins after the second
            sent.clear()
            model(pictures[:4], labels=torch.arange(4) % LABELS).loss.backward()
    finally:
        torch.distributed.all_reduce = send
    return sum(sent)


def calibrate_and_answer(pictures: torch.Tensor, activations: str) -> dict[str, Any]:
    """A calibrated model's answers, and how many pictures it says it has seen."""
    model = proxbit.calibrate(make(activations=activations), pictures)
    with torch.no_grad():
        answers = model.eval()(pixel_values=pictures).logits
    return {"images": model.calibration_report.images, "answers": answers}
