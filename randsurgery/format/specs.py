"""What a recipe says about its networks beside their tensors: architecture, classifier, images."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from randsurgery.format.fields import Count, HexFloat, Seed, Text, Word


class Model(BaseModel):
    """Base of all parts: immutable, strict, and without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        for name, info in type(self).model_fields.items():
            if name not in ("kind", "format", "version") and getattr(self, name) == info.default:
                data.pop(name, None)
        return data

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; fields at their defaults are left out."""
        return self.model_dump(mode="json")


class ModelSpec(Model):
    """The architecture: a timm registry name and its arguments."""

    name: Text
    args: dict[Text, bool | Word | str | None] = {}  # floats travel as hexadecimal text


class HeadSpec(Model):
    """The classifier: module name, kind, and how many classes it has.

    A fixed kind (Hoffer et al.) has tensors ``weight`` (unit rows), ``scale`` and ``bias`` and sees
    its input normalised to length 1.
    """

    name: Text
    kind: Literal["linear", "orthonormal", "hadamard"] = "linear"
    scale: Literal["learned", "given"] = "learned"  # of a fixed kind
    seed: Seed = 0  # of orthonormal rows
    classes: Count


CropMode = Literal["center", "squash", "border"]
Interpolation = Literal["nearest", "bilinear", "bicubic"]


class InputSpec(Model):
    """What the network expects to see: preprocessing of an image."""

    size: tuple[Count, Count]  # height, width
    channels: Count
    mean: tuple[HexFloat, ...]  # a channel, for values in [0, 1]
    std: tuple[HexFloat, ...]
    interpolation: Interpolation = "bicubic"
    crop: HexFloat = (1.0).hex()  # share of the shorter side that is kept
    crop_mode: CropMode = "center"  # timm's

    @model_validator(mode="after")
    def _in_range(self) -> InputSpec:
        if min(*self.size, self.channels) < 1:
            raise ValueError("an image has a height, a width and channels of 1 at least")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std have {self.channels} values, one a channel")
        if not all(float.fromhex(value) > 0 for value in (*self.std, self.crop)):
            raise ValueError("std and crop are above 0")
        return self


class DatasetSpec(Model):
    """Where training and test images came from. Never a path."""

    name: Text
    train_split: Text = "train"
    test_split: Text = "validation"


class Calibration(Model):
    """A temperature by which logits are divided (Guo et al., 2017), and the images it was fitted
    on: a share of a dataset's test split, drawn by a seed."""

    temperature: HexFloat  # above 0
    dataset: Text
    split: Text = "validation"
    share: Text  # a decimal in (0, 1]
    seed: Seed = 0

    @model_validator(mode="after")
    def _in_range(self) -> Calibration:
        if not float.fromhex(self.temperature) > 0:
            raise ValueError("a temperature is above 0")
        if not re.fullmatch(r"0\.[0-9]{1,17}|1", self.share) or not float(self.share):
            raise ValueError("a share is a decimal above 0, up to 1")
        return self
