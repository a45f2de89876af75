"""The ProxConnect step as a `torch.optim.Optimizer`, for training loops of one's own."""

from proxbit.optim.proxconnect import ProxConnect

__all__ = ["ProxConnect"]
