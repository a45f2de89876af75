"""Triton without a GPU: what its interpreter has to be taught, in the process that it runs in, and its compiler."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
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


@contextmanager
def interpreter_process() -> Iterator[Callable]:
    """Runs a function of a module of kernels on the interpreter, of tensors on the CPU. That is chosen when Triton is
    imported, hence the process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, initializer=teach_bf16) as pool:
            yield lambda function, *arguments: pool.submit(function, *arguments).result()


def assembly(kernel, capability, values, tile):
    """The assembly of a kernel, made without a GPU, for arguments aligned as those of most layers are."""
    signature = {name: values.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(tile, "constexpr")
    options = {name: tile[name] for name in ("num_warps", "num_stages") if name in tile}
    constants = {name: value for name, value in tile.items() if name not in options}
    constants |= {name: None for name, kind in values.items() if kind == "constexpr"}
    signature = {name: kind for name, kind in signature.items() if name not in options}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options["enable_fp_fusion"] = False
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
