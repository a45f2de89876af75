"""Operators on packed weights. Importing this package registers them with torch."""

from proxbit.kernels.ops import linear_w1, linear_w1_kernel, unpack_weight

__all__ = ["linear_w1", "linear_w1_kernel", "unpack_weight"]
