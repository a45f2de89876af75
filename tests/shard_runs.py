"""What the processes of `test_shards.py` run: quantizing and packing of weights that are spread by rows or columns."""

import itertools

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from proxbit.packing import pack_signs
from proxbit.quantizers import get_pair, hard_rows, quantize
from proxbit.quantizers.row_units import CENTERINGS, NORMALIZATIONS, SCALES, check_rows
from proxbit.shards import sum_of_rows

# Neither divides by two.
ROWS, COLUMNS = 7, 21
PAIRS = ("bnn++", "parq", "fda++", "biper-sine", "dsq", "adabin")


def cases():
    """Every way of scaling with one pair, and every pair with one way of scaling."""
    ways = list(itertools.product(NORMALIZATIONS, SCALES, CENTERINGS))
    return [("bnn++", *way) for way in ways] + [(pair, "row", "ls", "none") for pair in PAIRS]


def grouped() -> list:
    """As `compare`, of rows that are spread within groups of processes, as hybrid sharding does it."""
    return compare(0, groups=torch.distributed.get_world_size())


def compare(dim: int, groups: int = 1) -> list[tuple[tuple[str, ...], bool, list[int]]]:
    """For each case, the largest differences from the whole weight, and how many collectives were called.

    Returns:
        The case; the largest difference of weight, gradient, scale; whether the bits are the same; the number of
        collectives of the forward and backward pass, and of `hard_rows` with `pack_signs`.
    """
    mesh = init_device_mesh("cpu", (groups, torch.distributed.get_world_size() // groups))
    weight, grad = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS)
    spread, spread_grad = (distribute_tensor(value, mesh, [Replicate(), Shard(dim)]) for value in (weight, grad))
    found = []
    for case in cases():
        pair = get_pair(case[0])
        units = dict(zip(("normalize", "scale", "center"), case[1:]))
        mu = torch.tensor(pair.schedule[1], dtype=torch.float64)
        leaf, spread_leaf = weight.clone().requires_grad_(), spread.detach().clone().requires_grad_()
        expected = quantize(leaf, mu, pair, **units)
        expected.backward(grad)
        with CommDebugMode() as step:
            made = quantize(spread_leaf, mu, pair, **units)
            made.backward(spread_grad)
        with CommDebugMode() as packing:
            rows = hard_rows(spread, **units)
            bits = pack_signs(rows.values)
        whole = hard_rows(weight, **units)
        pairs = ((made, expected), (spread_leaf.grad, leaf.grad), (rows.scale, whole.scale))
        difference = max(float((got.full_tensor() - want).abs().max()) for got, want in pairs)
        same = torch.equal(bits.full_tensor(), pack_signs(whole.values)) and made.placements == spread.placements
        found.append((case, difference, same, [step.get_total_counts(), packing.get_total_counts()]))
    return found


def broken_rows(dim: int) -> str:
    """The message about a weight whose row 5 holds a NaN, in every process."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    weight = torch.randn(ROWS, COLUMNS)
    weight[5, 20] = float("nan")
    try:
        check_rows(distribute_tensor(weight, mesh, [Shard(dim)]), "none", "w", "it out")
    except ValueError as error:
        return str(error)
    return ""


def positives(dim: int) -> tuple[int, int]:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    weight = torch.randn(ROWS, COLUMNS)
    spread = distribute_tensor(weight, mesh, [Shard(dim)])
    return int(sum_of_rows(lambda rows: (rows > 0).sum(), spread)), int((weight > 0).sum())
