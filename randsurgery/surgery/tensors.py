"""torch tensors <-> raw tensors of the format, without copying where memory allows."""

from __future__ import annotations

import torch

from randsurgery.errors import IncompatibleError
from randsurgery.format.tensors import STORAGE, RawTensor

TORCH: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in TORCH.items()}

_VIA = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def equal_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """True if dtype, device, shape and every bit agree. Both have values; an accelerator waits."""
    if (first.dtype, first.device, first.shape) != (second.dtype, second.device, second.shape):
        return False
    words = _VIA[first.element_size()]
    return torch.equal(first.detach().view(words), second.detach().view(words))


def same_elements(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Where two tensors of one dtype and shape have the same bits."""
    words = _VIA[first.element_size()]
    return first.view(words) == second.view(words)


def transformed() -> bool:
    """True within torch.func's transforms, whose tensors have no memory to look at."""
    found: bool = torch._C._are_functorch_transforms_active()
    return found


def dtype_name(dtype: torch.dtype, what: str) -> str:
    """The format's name of a torch dtype. Raises IncompatibleError for complex and quantised."""
    if dtype not in NAMES:
        raise IncompatibleError(f"{what} has dtype {dtype}, which the format cannot hold")
    return NAMES[dtype]


def to_torch(raw: RawTensor) -> torch.Tensor:
    """The tensor on the CPU, sharing memory with ``raw`` unless that is read-only."""
    array = raw.array if raw.array.flags.writeable else raw.array.copy()
    words = array.reshape(-1).view(
        f"<i{array.dtype.itemsize}" if array.dtype.itemsize > 1 else "u1"
    )
    return torch.from_numpy(words).view(TORCH[raw.dtype]).reshape(raw.shape)


def from_torch(tensor: torch.Tensor, what: str = "tensor") -> RawTensor:
    """The raw tensor of a torch tensor, sharing memory if that is contiguous and on the CPU.

    Raises IncompatibleError for what has no plain elements.
    """
    name = dtype_name(tensor.dtype, what)
    if tensor.layout != torch.strided or tensor.is_meta:
        raise IncompatibleError(f"{what} is sparse or without values, which the format cannot hold")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    words = flat.view(_VIA[tensor.element_size()]).numpy()
    return RawTensor(name, words.view(STORAGE[name]).reshape(tuple(tensor.shape)))


def cast(raw: RawTensor, dtype: str) -> RawTensor:
    """The tensor in another floating dtype, as torch rounds it; the same object if it has it."""
    return raw if raw.dtype == dtype else from_torch(to_torch(raw).to(TORCH[dtype]))


def same_values(ours: RawTensor, theirs: RawTensor) -> bool:
    """True if the first, in the dtype of the second, has its bits: a network computes in another
    dtype than its file may have."""
    floating = TORCH[ours.dtype].is_floating_point and TORCH[theirs.dtype].is_floating_point
    if ours.dtype != theirs.dtype and floating and ours.shape == theirs.shape:
        return cast(ours, theirs.dtype).same_bits(theirs)
    return ours.same_bits(theirs)
