"""What the interpreter of Triton has to be taught, in the process that it runs in."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def teach_bf16():
    """The interpreter keeps bf16 as its bits, multiplies these as if they were numbers, and cuts where GPUs round."""
    builder, tensor = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.cast_impl

    def exact(x):
        is_bf16 = x.dtype.scalar == tl.bfloat16
        return tensor((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if is_bf16 else x

    def rounding_cast(self, x, dtype):
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, dtype)
        bits = torch.from_numpy(np.array(x.data, order="C")).bfloat16().view(torch.uint16).numpy()
        return tensor(bits, tl.bfloat16)

    builder.create_dot = lambda self, a, b, *rest: dot(self, exact(a), exact(b), *rest)
    builder.cast_impl = rounding_cast
