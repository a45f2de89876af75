# /// script
# requires-python = ">=3.11"
# dependencies = ["proxbit[examples]"]
# ///
"""Train a 1-bit DeiT or ViT on ImageNet-1K, as papers on binarization do: on as many GPUs as there are.

    accelerate launch examples/imagenet.py --model facebook/deit-small-patch16-224 --recipe w1a32        # 100 epochs
    accelerate launch examples/imagenet.py --model facebook/deit-tiny-patch16-224 --from-scratch         # 300 epochs
    accelerate launch examples/imagenet.py --resume ...     # what was stopped goes on, with the other options as before
    python examples/imagenet.py --smoke                     # two steps on made pictures: does it run?

The pictures are streamed from the Hub (`--dataset`, which asks for a token where it is gated); nothing is kept on disk.
The teacher is the model itself, float. Packed, saved and evaluated at the end is a moving average of the weights. What
is resumed sees the pictures in another order than what was never stopped: to skip them, they would have to be read.
"""

import argparse
import copy
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Image, IterableDataset, load_dataset
from PIL import Image as Pictures
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    TrainerCallback,
    ViTImageProcessorPil,
)
from transformers.trainer_utils import get_last_checkpoint

import proxbit
from proxbit.errors import ProxbitError

TRAIN_PICTURES = 1_281_167


class MovingAverage(TrainerCallback):
    """Keeps a moving average of the parameters, latents among them, and gives it to the model at the end.

    With each checkpoint it is saved beside it, before that: a complete checkpoint has its average.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @staticmethod
    def file(args, step: int) -> Path:
        return Path(args.output_dir) / f"average-{step}.safetensors"

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step:
            self.average.load_state_dict(load_file(self.file(args, state.global_step)))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.average.update_parameters(self.model)
        if control.should_save and state.is_world_process_zero:
            file = self.file(args, state.global_step)
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            save_file(self.average.state_dict(), part)
            part.rename(file)

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            kept = {self.file(args, int(each.name.split("-")[1])) for each in folder.glob("checkpoint-*")}
            for file in set(folder.glob("average-*")) - kept:
                file.unlink()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        with torch.no_grad():
            for own, mean in zip(self.model.parameters(), self.average.module.parameters(), strict=True):
                own.copy_(mean)


def crop(picture: Pictures.Image, side: int, generator: np.random.Generator) -> Pictures.Image:
    """A random part of 8 to 100 % of the area, 3:4 to 4:3, and in half of all cases its mirror image."""
    width, height = picture.size
    for _ in range(10):
        area = generator.uniform(0.08, 1.0) * width * height
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = generator.integers(0, width - w + 1), generator.integers(0, height - h + 1)
            picture = picture.crop((left, top, left + w, top + h))
            break
    picture = picture.resize((side, side), Pictures.Resampling.BICUBIC)
    return picture.transpose(Pictures.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else picture


def prepare(batch: dict, processor, side: int, training: bool) -> dict:
    """Pictures as the model takes them. What was cropped has the size already: the processor only normalizes it."""
    generator = np.random.default_rng()
    pictures = [picture.convert("RGB") for picture in batch["image"]]
    cropped = {}
    if training:
        pictures = [crop(picture, side, generator) for picture in pictures]
        cropped = {"do_resize": False, "do_center_crop": False}
    pixels = processor(pictures, return_tensors="pt", **cropped)["pixel_values"]
    return {"pixel_values": list(pixels), "labels": batch["label"]}


@torch.no_grad()
def accuracy(model: torch.nn.Module, batches: DataLoader, device: torch.device) -> tuple[float, int]:
    """Of a model, and on how many pictures. By one process, for several that stream meet some pictures twice."""
    model.to(device).eval()
    right = [model(batch["pixel_values"].to(device)).logits.argmax(1).cpu() == batch["labels"] for batch in batches]
    return float(torch.cat(right).float().mean()), sum(map(len, right))


def made_pictures() -> Dataset:
    """Noise of several sizes, for the smoke test."""
    generator = np.random.default_rng(0)
    sizes = [(40, 50), (64, 48), (33, 70), (48, 48)] * 2
    pictures = [Pictures.fromarray(generator.integers(0, 255, (*size, 3), np.uint8)) for size in sizes]
    return Dataset.from_dict({"image": pictures, "label": [0, 1] * 4}).cast_column("image", Image())


def load(options: argparse.Namespace, split: str) -> IterableDataset:
    if options.smoke:
        return made_pictures().to_iterable_dataset(num_shards=3)
    return load_dataset(options.dataset, split=split, streaming=True)


def make_model(options: argparse.Namespace):
    """The pretrained model and its processor; with --from-scratch the same architecture with random weights."""
    if options.smoke:
        config = DeiTConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32
        )
        return DeiTForImageClassification(config), ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor = AutoImageProcessor.from_pretrained(options.model)
    model = AutoModelForImageClassification.from_pretrained(options.model)
    return model, processor


def main() -> None:
    """Read the command line, train, evaluate, pack, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="facebook/deit-small-patch16-224")
    parser.add_argument("--dataset", default="ILSVRC/imagenet-1k")
    parser.add_argument("--recipe", default="w1a32", help="see `proxbit recipes`")
    parser.add_argument(
        "--from-scratch", action="store_true", help="random weights, 300 epochs; the teacher stays trained"
    )
    parser.add_argument("--epochs", type=int, help="default: 100, or 300 from scratch")
    parser.add_argument("--batch", type=int, default=128, help="pictures a step and process")
    parser.add_argument(
        "--learning-rate", type=float, help="for 512 pictures a step; default: 3e-4, or 5e-4 from scratch"
    )
    parser.add_argument("--ema", type=float, default=0.9999, help="decay of the moving average of the weights")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--smoke", action="store_true", help="two steps on made pictures: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/imagenet"))
    options = parser.parse_args()
    try:
        proxbit.get_recipe(options.recipe)
    except ProxbitError as error:
        parser.error(str(error))
    epochs = (300 if options.from_scratch else 100) if options.epochs is None else options.epochs
    usual = 5e-4 if options.from_scratch else 3e-4
    rate = usual if options.learning_rate is None else options.learning_rate
    if min(epochs, options.batch) < 1 or rate <= 0 or not 0 <= options.ema <= 1:
        parser.error("--epochs and --batch must be at least 1, --learning-rate above 0, --ema from 0 to 1")
    teacher, processor = make_model(options)
    teacher.eval()
    model = copy.deepcopy(teacher)
    if options.from_scratch:
        model = type(teacher)(teacher.config)
    side = teacher.config.image_size
    batch = 4 if options.smoke else options.batch
    arguments = proxbit.ProxConnectArguments(
        str(options.out),
        recipe=options.recipe,
        per_device_train_batch_size=batch,
        max_steps=1,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        bf16=torch.cuda.is_available(),
        dataloader_num_workers=0 if options.smoke else 8,
        remove_unused_columns=False,
        save_steps=1 if options.smoke else 5000,
        save_total_limit=2,
        ignore_data_skip=True,
        logging_steps=1 if options.smoke else 100,
        label_smoothing_factor=0.1,
        report_to="none",
        accelerator_config={"split_batches": False, "dispatch_batches": False},
    )
    pictures_a_step = batch * arguments.world_size
    steps = 2 if options.smoke else epochs * TRAIN_PICTURES // pictures_a_step
    arguments.max_steps = steps
    arguments.warmup_steps = 0 if options.smoke else 5 * steps // epochs
    arguments.learning_rate = rate * pictures_a_step / 512
    last = get_last_checkpoint(options.out) if options.resume and options.out.is_dir() else None
    order = int(last.rsplit("-", 1)[1]) if last else 0  # not the first pictures once more
    train = load(options, "train").shuffle(seed=order, buffer_size=8 if options.smoke else 10_000)
    test = load(options, "validation")
    make = partial(prepare, processor=processor, side=side)
    trainer = proxbit.ProxConnectTrainer(
        model=model,
        args=arguments,
        teacher=teacher,
        train_dataset=train.map(partial(make, training=True), batched=True, remove_columns=["image", "label"]),
    )
    trainer.add_callback(MovingAverage(trainer.model, options.ema))
    trainer.train(resume_from_checkpoint=options.resume or None)
    if trainer.is_world_process_zero():
        packed, folder = proxbit.pack(trainer.model), options.out / "packed"
        packed.save_pretrained(folder)
        processor.save_pretrained(folder)
        pictures = test.map(partial(make, training=False), batched=True, remove_columns=["image", "label"])
        batches = DataLoader(pictures, batch, num_workers=arguments.dataloader_num_workers)
        share, number = accuracy(packed, batches, arguments.device)
        print(f"accuracy of the packed model: {100 * share:.2f} % of {number:,} pictures; saved in {folder}")


if __name__ == "__main__":
    main()
