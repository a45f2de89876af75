# /// script
# dependencies = ["proxbit", "scikit-learn"]
# ///
"""A plain Accelerate loop, without the Trainer: a 1-bit model learns handwritten digits, on one device or many.

    accelerate launch --config_file examples/accelerate_configs/fsdp2_full.yaml examples/accelerate_loop.py

The engine is the file's matter, not this one's: `examples/accelerate_configs/` has one for each.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

import proxbit
from proxbit.quantizers import MuSchedule
from proxbit.training import hardening_gap


def digits() -> TensorDataset:
    """1,797 pictures of handwritten digits, `[1, 8, 8]` in [-1, 1], with their labels."""
    pictures, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(pictures).float().view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels))


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of the optimizer")
    parser.add_argument("--batch", type=int, default=32, help="pictures in a step, in each process")
    parser.add_argument("--out", default="digits-1bit", help="folder of the packed model")
    args = parser.parse_args(argv)
    if min(args.steps, args.batch) < 1:
        parser.error("--steps and --batch must be at least 1")
    if Path(args.out).is_file():
        parser.error(f"--out: {args.out} is a file; name a folder")

    accelerator = Accelerator()
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes)
    model = proxbit.binarize(ViTForImageClassification(config))  # before prepare: engines see ordinary parameters
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    loader = DataLoader(digits(), batch_size=args.batch, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    schedule = MuSchedule("log", 0.3, 30.0, steps=args.steps, hard_fraction=0.1)

    if not len(loader):
        raise SystemExit(
            f"--batch {args.batch}: the processes together have no batch that is full; take a smaller one."
        )
    step, losses = 0, []
    model.train()
    while step < args.steps:
        for pictures, labels in loader:
            proxbit.set_mu(model, schedule.mu(step), hard=schedule.is_hard(step))
            loss = model(pixel_values=pictures, labels=labels).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            step += 1
            if step == args.steps:
                break

    gap = hardening_gap(model)
    packed = proxbit.packed_copy(accelerator.unwrap_model(model))  # every process packs what it has; bits are gathered
    pictures, labels = digits()[:500]
    with torch.inference_mode():
        accuracy = (packed(pictures).logits.argmax(1) == labels).float().mean().item()
    if accelerator.is_main_process:
        packed.save_pretrained(args.out)
    found = {"first loss": losses[0], "last loss": losses[-1], "hardening gap": gap, "accuracy": accuracy}
    accelerator.print(found)
    return found


if __name__ == "__main__":
    main()
