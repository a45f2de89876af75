"""Invent a quantizer pair, let the theory judge it, train with it: `python examples/custom_quantizer_pair.py`.

A vision transformer of two layers learns the digits of scikit-learn at one bit a weight, with an arctangent that gets
steeper. Under a minute on 2 CPU cores.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification, set_seed

import proxbit


def arctangent(p: torch.Tensor, mu: torch.Tensor | float) -> torch.Tensor:
    """T_mu(p) = (2 / pi) atan(mu p): smooth, and the sign in the limit. Its derivative is found automatically."""
    return 2 / torch.pi * torch.atan(mu * p)


def arctangent_pair(start: float = 0.5, end: float = 300.0) -> proxbit.QuantizerPair:
    """P is the identity, so F = T. The parameters are stored in config.json with the name."""
    return proxbit.compose(lambda w, mu: w, arctangent, mu_range=(1e-3, 1e6), schedule=("log", start, end))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs

    pair = proxbit.register_pair("arctangent", arctangent_pair)
    print(f"arctangent: {proxbit.decompose(pair).reason}")
    guess = proxbit.heuristic(lambda w, mu: torch.where(w >= 0, 1.0, -1.0).to(w.dtype), pair.backward)
    print(f"the sign with the same gradient: {proxbit.decompose(guess, mu=1.0).reason}")

    digits = load_digits()
    data = [
        {"pixel_values": torch.tensor(image, dtype=torch.float32)[None] / 8 - 1, "labels": int(label)}
        for image, label in zip(digits.images, digits.target, strict=True)
    ]
    set_seed(0)
    sizes = dict(image_size=8, patch_size=2, num_channels=1, num_labels=10)
    model = ViTForImageClassification(
        ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, **sizes)
    )
    config = proxbit.BinarizationConfig(weights="arctangent", pair_parameters={"end": 100.0})
    arguments = proxbit.ProxConnectArguments(
        "runs/custom", num_train_epochs=epochs, learning_rate=2e-3, per_device_train_batch_size=64, save_strategy="no"
    )
    trainer = proxbit.ProxConnectTrainer(proxbit.binarize(model, config), arguments, train_dataset=data[:1400])
    trainer.train()
    logits = trainer.predict(data[1400:]).predictions
    print(f"accuracy on 397 digits at one bit a weight: {(logits.argmax(1) == digits.target[1400:]).mean():.3f}")
    print(proxbit.summary(proxbit.pack(model)))


if __name__ == "__main__":
    main()
