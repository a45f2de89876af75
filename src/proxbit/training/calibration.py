"""Calibration: a latent model fitted to images without labels, or only where its quantizers start."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from proxbit.config import BinarizationConfig
from proxbit.errors import ConfigError, ModelStateError
from proxbit.nn import Learned, RPReLU, binary_activations, dtype_around, learned_modules
from proxbit.patching import state_of
from proxbit.posttraining import CalibrationReport, Told, calibration_of, fit_weights
from proxbit.training.batches import CHUNK, batches_of, chunks_of, length
from proxbit.training.quantizer_start import start_quantizers

__all__ = ["IMAGES", "IMAGES_OF_SIGNS", "IMAGES_OF_STARTS", "calibrate", "was_calibrated"]

EMPTY = "There is nothing to calibrate with: the data is empty."
# Images that are looked at unless told otherwise: for weights, where activations are signs too, for quantizers.
IMAGES, IMAGES_OF_SIGNS, IMAGES_OF_STARTS = 256, 2048, 64


def calibrate(
    model: nn.Module,
    data: Any,
    *,
    weights: bool = True,
    num_images: int | None = None,
    processor: Any | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    r"""Make a latent model answer as its float weights do, from some images, without labels and without training.

    Layer by layer, in the order in which the model computes, with x the inputs that a layer has once all before it are
    binarized, and y what the float layer gives in the float model:

        W' = (T + r W)(H + r I)^{-1},  H = Cov(x, x),  T = Cov(y, x);  signs s and scales a of W' by compensation;
        bias = E y - a s E x;  latents whose signs are s and whose mean size is a

    Thresholds, steps and scales of activations and of probabilities are set on the way, batch norms take their
    statistics anew, an RPReLU gets slope and lift in least squares. See `docs/posttraining.md`.

    Args:
        model: a latent model, of `binarize` or `from_pretrained`, with its float weights; changed in place, after an
            error not at all. What is excluded from binarization stays as it is, except batch norms behind 1-bit layers.
        data: a dataset, a DataLoader, a list of PIL images or of tensors `[C, H, W]`; or batches, or one of them, as
            the model takes them. Labels are not looked at.
        weights: whether weights are fitted. If not, they stay, and thresholds, steps and scales start from float
            activations, as `ProxConnectTrainer` does it before a first training.
        num_images: how many are looked at; of single images they are drawn at random. None: 256, 2,048 where
            activations are signs, and 64 without weights.
        processor: the image processor for PIL images; None: the one beside the model.
        seed: of the draw.
        progress: whether a terminal shows a bar.

    Returns:
        The same model, with a `calibration_report`. With processes that are started by Accelerate, each looks at its
        part of the images, and all get the same weights.

    Raises:
        ModelStateError: if the model is not latent, or spread over processes.
        ConfigError: if there are no images, a layer is not reached, or is given NaN or infinite activations.

    Source:
        GPTQ: Frantar et al., ICLR 2023; GPTAQ: Li et al., ICML 2025; the rest is ours.
    """
    _check(model, num_images)
    if not weights and not any(True for _ in _quantizers(model)):
        return model
    count = num_images
    if count is None:
        count = IMAGES_OF_STARTS if not weights else IMAGES_OF_SIGNS if any(binary_activations(model)) else IMAGES
    batches = [_placed(model, batch) for batch in batches_of(model, data, images=count, processor=processor, seed=seed)]
    if weights:
        _fit(model, batches, data, progress)
    elif batches:
        start_quantizers(model, batches)
    else:
        raise ConfigError(EMPTY)
    return model


def _fit(model: nn.Module, batches: list[dict[str, Any]], data: Any, progress: bool) -> None:
    state = PartialState()
    chunks = _own(chunks_of(batches), data, state)
    images, ready = (int(each) for each in _summed([sum(map(length, chunks)), int(bool(chunks))]))
    if ready < state.num_processes:
        few = f"{images} images are too few for {state.num_processes} processes: each takes {CHUNK} at a time."
        raise ConfigError(few if images else EMPTY)
    with _bar(progress and state.is_main_process) as told:
        report = fit_weights(model, chunks, images=images, told=told, reduce=_reduced)
    _warn_of_few(report)
    if state.num_processes > 1:
        _as_in_the_first_process(model)
    for config in _configs(model):  # A training that begins there goes another way.
        config.calibration = {"images": report.images, "error": round(report.after, 6)}


def was_calibrated(model: nn.Module) -> bool:
    """Whether the weights of a latent model were fitted by `calibrate`, in this process or before it was saved."""
    return calibration_of(model) is not None or any(config.calibration for config in _configs(model))


def _configs(model: nn.Module) -> Iterator[BinarizationConfig]:
    """How the transformers models in a model were binarized."""
    for part in model.modules():
        config = getattr(getattr(part, "config", None), "quantization_config", None)
        if isinstance(part, PreTrainedModel) and isinstance(config, BinarizationConfig):
            yield config


def _check(model: nn.Module, num_images: int | None) -> None:
    state = state_of(model)
    if state != "latent":
        hint = {"float": " Call proxbit.binarize(model, config) first.", "packed": " Load its latent checkpoint."}
        raise ModelStateError(f"calibrate takes a latent model, this one is {state}.{hint[state]}")
    spread = [name for name, each in model.named_parameters() if isinstance(each, DTensor) or hasattr(each, "ds_id")]
    if spread:
        raise ModelStateError(
            f"calibrate needs the whole model in every process, and {spread[0]} is spread over processes: call it "
            "before accelerator.prepare, or the Trainer."
        )
    device = next(model.parameters()).device.type
    if device in ("mps", "meta"):
        why = "has no float64" if device == "mps" else "has no numbers"
        raise ModelStateError(f"calibrate cannot compute on the device {device!r}, which {why}: model.to('cpu') first.")
    if num_images is not None and (not isinstance(num_images, int) or isinstance(num_images, bool) or num_images < 1):
        raise ConfigError(f"num_images must be a whole number, at least 1, or None; not {num_images!r}.")


def _quantizers(model: nn.Module) -> Iterator[Learned]:
    """What starts from data where weights stay."""
    return (module for _, module in learned_modules(model) if not isinstance(module, RPReLU))


def _placed(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch where the model is, and in its dtype unless autocast sees to that."""
    like = next(each for each in model.parameters() if each.is_floating_point())
    dtype = None if torch.is_autocast_enabled(like.device.type) else dtype_around(model)

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(like.device, dtype if value.is_floating_point() else None)

    return {key: place(value) for key, value in batch.items()}


def _own(chunks: list[dict[str, Any]], data: Any, state: PartialState) -> list[dict[str, Any]]:
    """What this process looks at: a DataLoader gives each process its own, of all else it takes every n-th chunk."""
    if isinstance(data, DataLoader) or state.num_processes == 1:
        return chunks
    return chunks[state.process_index :: state.num_processes]


def _reduced(tensors: list[Tensor]) -> list[Tensor]:
    """Sums over processes."""
    if PartialState().num_processes == 1:
        return tensors
    return [reduce(each.to(PartialState().device), "sum").to(each.device) for each in tensors]


def _summed(numbers: list[int]) -> list[Tensor]:
    return _reduced([torch.tensor(number, dtype=torch.float64) for number in numbers])


@torch.no_grad()
def _as_in_the_first_process(model: nn.Module) -> None:
    """Whatever a process made of the same sums, to the last bit that of the first."""
    device = PartialState().device
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.copy_(broadcast(tensor.detach().to(device)).to(tensor.device))


@contextmanager
def _bar(shown: bool) -> Iterator[Told]:
    """A bar on a terminal: the block that is fitted, and how long the rest will take."""
    console = Console(stderr=True)
    columns = (
        TextColumn("Calibrating"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not shown or not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda name, share: bar.update(task, advance=share, description=name)


def _warn_of_few(report: CalibrationReport) -> None:
    """Say so where there were fewer tokens than inputs."""
    few = [layer for layer in report.layers if layer.tokens < layer.columns]
    if few:
        warnings.warn(
            f"{len(few)} of {len(report.layers)} layers were fitted to fewer tokens than they have inputs, the first "
            f"{few[0].name} to {few[0].tokens} with {few[0].columns} inputs: what the images do not show stays as the "
            "float weights say it. Give more than these images.",
            stacklevel=4,
        )
