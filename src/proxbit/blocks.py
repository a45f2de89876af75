"""Rows in blocks: between two operations of a long chain, a block stays in the cache of a CPU."""

import torch

__all__ = ["row_blocks"]

# Elements a CPU thread works on at a time.
BLOCK = 262144


def row_blocks(rows: int, width: int, device: torch.device) -> list[slice]:
    """Slices of consecutive rows, which cover all of them.

    One slice where a compiler fuses the chain, where autograd records it, and on accelerators, where starting a kernel
    is what costs.

    Args:
        rows: how many there are.
        width: elements of a row, at the widest place of the chain.
        device: where the rows are.
    """
    if device.type != "cpu" or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return [slice(None)]
    step = max(1, BLOCK * torch.get_num_threads() // max(1, width))
    return [slice(start, start + step) for start in range(0, max(1, rows), step)]
