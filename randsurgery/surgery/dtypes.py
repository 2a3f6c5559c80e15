"""Modules in other dtypes than their file's (``module.to(torch.bfloat16)``): what is stored.

A file keeps its own dtypes. What a tensor of the module says of it is put back into the file's
dtype, so that the file's tensor, cast to the module's dtype, has the module's bits.
"""

from __future__ import annotations

import torch

from randsurgery.errors import IncompatibleError
from randsurgery.format.tensors import RawTensor
from randsurgery.surgery.tensors import equal_bits, from_torch, same_elements, to_torch


def in_files_dtype(raw: RawTensor, before: RawTensor, name: str) -> RawTensor:
    """A module's tensor in the dtype of ``before``, which is what the file gives for it.

    Elements that are ``before``'s, rounded to the module's dtype, are ``before``'s again; others
    are converted if that loses nothing. If it would, the whole tensor becomes float32, into which
    half precision fits. Raises IncompatibleError for double values that would be rounded.
    """
    ours, theirs = to_torch(before), to_torch(raw)
    floating = ours.is_floating_point() and theirs.is_floating_point()
    if raw.dtype == before.dtype or not floating or ours.shape != theirs.shape:
        return raw
    same = same_elements(ours.to(theirs.dtype), theirs)
    converted = theirs.to(ours.dtype)
    exact = same | same_elements(converted.to(theirs.dtype), theirs)
    if bool(exact.all()):
        return from_torch(torch.where(same, ours, converted), name)
    if raw.dtype == "F64":
        raise IncompatibleError(
            f"{name} holds F64 values that {before.dtype}, the file's dtype, would round; call "
            ".float() on the module before it is saved"
        )
    return from_torch(theirs.float(), name)


def scores_to_store(scores: torch.Tensor, name: str) -> RawTensor:
    """Scores as the float32 values that a file keeps. Raises IncompatibleError for such as would
    be rounded."""
    stored = scores.detach().float()
    if not equal_bits(stored.to(scores.dtype), scores):
        raise IncompatibleError(
            f"the scores of {name} are F64 and would be rounded to F32; call .float() on the "
            "module before it is saved, or save without scores"
        )
    return from_torch(stored.clone(), name)
