"""Tensors as the compiled kernels read them: pointers to memory that is there, as long as it should be, and aligned."""

import torch
from torch import Tensor

from proxbit.errors import PackedFormatError

__all__ = [
    "address_of",
    "address_of_floats",
    "aligned",
    "is_dense",
    "is_plain",
    "mu_of",
    "version_of",
    "within_storage",
]


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None if it was made in inference mode, where nobody counts."""
    return None if tensor.is_inference() else tensor._version


def is_dense(tensor: Tensor) -> bool:
    """Whether its numbers are all that there is to a tensor: contiguous, not empty, of no subclass."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and tensor.is_contiguous() and not tensor.is_neg() and tensor.numel() > 0


def is_plain(tensor: Tensor) -> bool:
    """Whether the library can read a tensor as it is: dense, in fp32, on the CPU."""
    return tensor.is_cpu and tensor.dtype is torch.float32 and is_dense(tensor) and tensor.data_ptr() % 4 == 0


def aligned(tensor: Tensor) -> Tensor:
    """The same numbers at an address where the processor can read them, as those of files and buffers need not be."""
    return tensor.clone() if tensor.is_cpu and tensor.data_ptr() % tensor.element_size() else tensor


def mu_of(mu: Tensor) -> Tensor:
    """A sharpness as the library reads it; to read it in Python would show as a wait for an accelerator."""
    return aligned(mu.to("cpu", torch.float64))


def address_of(tensor: Tensor | None) -> int:
    """Where the data are: the one place where the library gets a pointer from.

    Raises:
        PackedFormatError: for a tensor of another device, whose storage was freed, or that is not `aligned`.
    """
    if tensor is None:
        return 0
    address = tensor.data_ptr() if tensor.is_cpu else 0
    if address % tensor.element_size():
        raise PackedFormatError(
            f"The kernels of the CPU were given a tensor {list(tensor.shape)} of {tensor.dtype} at an address that is "
            f"no multiple of {tensor.element_size()}."
        )
    if not address and (not tensor.is_cpu or tensor.numel()):
        what = "whose storage was freed" if tensor.is_cpu else f"on the device {tensor.device}"
        raise PackedFormatError(f"The kernels of the CPU were given a tensor {list(tensor.shape)} {what}.")
    return address


def address_of_floats(numbers: Tensor | None, held: list[Tensor]) -> int:
    """Where numbers are in fp32, contiguous and aligned; 0 for None. What has to be converted is added to `held`, which
    must live as long as the address is read.

    Raises:
        PackedFormatError: as `address_of` does.
    """
    if numbers is None:
        return 0
    if numbers.dtype is not torch.float32 or not numbers.is_contiguous() or numbers.is_neg():
        numbers = numbers.resolve_neg().to(torch.float32).contiguous()
        held.append(numbers)
    address = numbers.data_ptr() if numbers.is_cpu else 0
    if address and not address % 4:
        return address
    numbers = aligned(numbers)
    held.append(numbers)
    return address_of(numbers)


def within_storage(tensor: Tensor) -> Tensor:
    """The same tensor, whose storage is as long as its shape and strides say.

    Raises:
        PackedFormatError: if it is not, or is on another device.
    """
    if not tensor.is_cpu:
        address_of(tensor)
    reach = tensor.numel()
    if not tensor.is_contiguous():
        reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() and (tensor.storage_offset() + reach) * tensor.element_size() > held:
        raise PackedFormatError(
            f"A tensor {list(tensor.shape)} of {tensor.dtype} reaches beyond its storage of {held} bytes."
        )
    return tensor
