# /// script
# requires-python = ">=3.11"
# dependencies = ["proxbit[examples]"]
# ///
"""Train the model of `proxbit demo`: a 1-bit vision transformer that reads handwritten digits.

    python examples/train_digits.py        # about 3 minutes on 2 CPU cores; writes runs/digits

Trains a float vision transformer on four fifths of the 1,797 digits of scikit-learn (8 x 8 grey pictures), makes it
latent, trains it with ProxConnect++ and distillation from the float model, packs it, and writes a release with its
cards, and the first test picture of each digit: what src/proxbit/demo/digits holds. Beside it lies the float model in
bf16, with 256 training pictures without labels and all test pictures, from which the demo makes a 1-bit model without
training: src/proxbit/demo/digits-float. model_cards/digits-vit-1bit.md is the model card of the release.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import EvalPrediction, ViTConfig, ViTForImageClassification, ViTImageProcessorPil, set_seed

import proxbit
from proxbit.analysis.latency import measure_latency
from proxbit.training import DistillationArguments, DistillationTrainer
from proxbit.training.metrics import classification_metrics

SIDE, FLOAT_EPOCHS, BINARY_EPOCHS, UNLABELLED = 8, 80, 60, 256
FACTS = {
    "model_id": "digits-vit-1bit",
    "license": "apache-2.0",
    "dataset": "Optical Recognition of Handwritten Digits (UCI), the 1,797 pictures that come with scikit-learn",
}


def pictures() -> tuple[list[Image.Image], np.ndarray]:
    """All digits as grey pictures, black on white as they were written, and their labels."""
    digits = load_digits()
    grey = np.clip(255 - 16 * digits.images, 0, 255).astype(np.uint8)
    return [Image.fromarray(one) for one in grey], digits.target


def make_model() -> tuple[ViTForImageClassification, ViTImageProcessorPil]:
    """A narrow ViT whose patches are 2 x 2 pixels, and its image processor."""
    names = [str(digit) for digit in range(10)]
    config = ViTConfig(
        image_size=SIDE,
        patch_size=2,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    return ViTForImageClassification(config), ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})


def rows(chosen: list[Image.Image], labels: np.ndarray, processor: ViTImageProcessorPil) -> list[dict]:
    """What a Trainer takes: pixels as the model's own processor makes them, and labels."""
    pixels = processor([one.convert("RGB") for one in chosen], return_tensors="pt")["pixel_values"]
    return [{"pixel_values": p, "labels": int(label)} for p, label in zip(pixels, labels)]


def arguments(kind, folder: Path, epochs: int):
    """The training arguments that both runs share."""
    return kind(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=128,
        per_device_eval_batch_size=128,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.05,
        logging_steps=60,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )


@torch.inference_mode()
def predictions(model: torch.nn.Module, examples: list[dict]) -> np.ndarray:
    """Logits for all examples."""
    return model.eval()(torch.stack([one["pixel_values"] for one in examples])).logits.numpy()


def sheet(chosen: list[Image.Image]) -> Image.Image:
    """Pictures side by side, 16 in a row."""
    made = Image.new("L", (16 * SIDE, -(-len(chosen) // 16) * SIDE), 255)
    for i, one in enumerate(chosen):
        made.paste(one, (i % 16 * SIDE, i // 16 * SIDE))
    return made


def write_float(model: torch.nn.Module, processor, folder: Path, train: list, test: list, labels: np.ndarray) -> None:
    """The float model in bf16, and what the demo binarizes it with."""
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)
    sheet(train[:UNLABELLED]).save(folder / "unlabelled.png")
    sheet(test).save(folder / "test.png")
    (folder / "test.txt").write_text("".join(map(str, labels)) + "\n")


def write_pictures(drawn: list[Image.Image], labels: np.ndarray, parts: dict[str, np.ndarray], folder: Path) -> None:
    """All pictures as files, in a folder for each part and digit, as the commands of proxbit read them."""
    for part, chosen in parts.items():
        for i in chosen:
            place = folder / part / str(labels[i])
            place.mkdir(parents=True, exist_ok=True)
            drawn[i].save(place / f"{i}.png")


def main() -> None:
    """Train, pack, and write the folders of the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="folder for the model and the samples")
    parser.add_argument("--smoke", action="store_true", help="one epoch on few pictures: does it run?")
    options = parser.parse_args()
    float_epochs, binary_epochs = (1, 1) if options.smoke else (FLOAT_EPOCHS, BINARY_EPOCHS)
    set_seed(0)
    drawn, labels = pictures()
    if options.smoke:
        drawn, labels = drawn[:100], labels[:100]
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    model, processor = make_model()
    data = {
        "train_dataset": rows([drawn[i] for i in train], labels[train], processor),
        "eval_dataset": rows([drawn[i] for i in test], labels[test], processor),
        "compute_metrics": classification_metrics,
    }
    args = arguments(DistillationArguments, options.out / "float", float_epochs)
    trainer = DistillationTrainer(model=model, args=args, **data)
    trainer.train()
    in_float = trainer.evaluate()["eval_accuracy"]

    parts = [[drawn[i] for i in part] for part in (train, test)]
    write_float(model, processor, options.out / "digits-float", *parts, labels[test])
    write_pictures(drawn, labels, {"train": train, "test": test}, options.out / "pictures")
    teacher = copy.deepcopy(model).eval()
    proxbit.binarize(model, proxbit.BinarizationConfig(weights="bnn++"))
    args = arguments(proxbit.ProxConnectArguments, options.out / "latent", binary_epochs)
    trainer = proxbit.ProxConnectTrainer(model=model, args=args, teacher=teacher, **data)
    trainer.train()
    trainer.evaluate()

    run = (
        trainer.run_record()
        | FACTS
        | {"split": "a fifth, stratified", "teacher": f"itself, {float_epochs} epochs float"}
    )
    proxbit.pack(model)
    found = predictions(model, data["eval_dataset"])
    packed = classification_metrics(EvalPrediction(found, labels[test]))["accuracy"]
    run["latency"] = measure_latency(model)
    run["metrics"] = (run["metrics"] or {}) | {"float": {"accuracy": in_float}, "packed": {"accuracy": packed}}
    folder = proxbit.write_release(model, options.out / "digits-vit-1bit", processing_class=processor, run=run)
    (options.out / "samples").mkdir(exist_ok=True)
    for digit in range(10):
        first = next(i for i in test if labels[i] == digit)
        drawn[first].save(options.out / "samples" / f"{digit}.png")
    print(proxbit.summary(model))
    print(f"accuracy on {len(test)} pictures: float {in_float:.1%}, packed {packed:.1%}")
    print(f"Wrote {options.out / folder.name}, {options.out / 'samples'}")


if __name__ == "__main__":
    main()
