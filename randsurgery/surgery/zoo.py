"""The papers' small networks, entered in timm's registry on import.

``conv2`` .. ``conv8``: Ramanujan et al., Table 1 (after Frankle & Carbin): pairs of 3x3
convolutions of 64, 128, 256, 512 channels with a max-pool after each pair, then fully connected
layers of 256, 256 and the classes; no biases, no normalisation. ``width`` multiplies every
layer but the last, each width being ``int(width * n)`` (their Section 4.3 and Figure 4).

``resnet18_cifar``, ``resnet50_cifar``: timm's ResNets with the CIFAR stem, a 3x3 convolution of
stride 1 and no pooling, as the papers use at 32 x 32.

``wrn_28_4``, ``wrn_28_10``, ``densenet_bc_100_12``, ``vgg19_cifar``, ``vgg19_bn_cifar``,
``alexnet_cifar``, ``resnet56_cifar``, ``lenet_300_100``: see ``networks``. Model arguments
``depth``, ``widen_factor`` and ``growth_rate`` give the other depths and widths.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from randsurgery.surgery.networks import (
    CifarAlexNet,
    CifarVgg19,
    DeepResNet,
    DenseNetBC,
    LeNet,
    WideResNet,
)

__all__ = ["ConvN"]

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


class ConvN(nn.Module):
    """A VGG-like network of ``depth`` convolutions. Input (N, in_chans, H, W), output (N, classes).

    ``img_size`` fixes the first fully connected layer: H and W are halved ``depth / 2`` times.
    """

    def __init__(
        self,
        depth: int = 4,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 32,
        width: float = 1.0,
        **_: Any,
    ) -> None:
        super().__init__()
        height, breadth = (img_size, img_size) if isinstance(img_size, int) else img_size
        pools = depth // 2
        if min(height, breadth) >> pools == 0:
            raise ValueError(f"conv{depth} needs images of at least {1 << pools} pixels a side")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = int(width * 256)
        layers: list[nn.Module] = []
        channels = in_chans
        for pair in range(pools):
            for _turn in range(2):
                out = int(width * (64 << pair))
                layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.ReLU()]
                channels = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        flat = channels * (height >> pools) * (breadth >> pools)
        self.fc1 = nn.Linear(flat, self.num_features, bias=False)
        self.fc2 = nn.Linear(self.num_features, self.num_features, bias=False)
        self.fc = self._classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer of ``num_classes``; 0 removes it."""
        self.num_classes = num_classes
        self.fc = self._classifier(num_classes)

    def _classifier(self, classes: int) -> nn.Module:
        return nn.Linear(self.num_features, classes, bias=False) if classes else nn.Identity()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, channels, H >> pools, W >> pools)."""
        out: torch.Tensor = self.features(x)
        return out

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Feature maps -> logits (N, classes), or the last hidden layer (N, 256 * width)."""
        x = torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1)))))
        out: torch.Tensor = x if pre_logits else self.fc(x)
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, classes)."""
        return self.forward_head(self.forward_features(x))


class CifarResNet(ResNet):  # type: ignore[misc]
    """timm's ResNet with the CIFAR stem."""

    def __init__(self, *args: Any, in_chans: int = 3, **kwargs: Any) -> None:
        super().__init__(*args, in_chans=in_chans, **kwargs)
        stem: int = self.get_submodule("conv1").out_channels
        self.conv1 = nn.Conv2d(in_chans, stem, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        self.feature_info[0] = {"num_chs": stem, "reduction": 1, "module": "act1"}


def _cfg(first_conv: str | None) -> dict[str, Any]:
    return {
        "url": "", "num_classes": 10, "input_size": (3, 32, 32), "pool_size": None,
        "crop_pct": 1.0, "interpolation": "bilinear", "mean": CIFAR_MEAN, "std": CIFAR_STD,
        "first_conv": first_conv, "classifier": "fc",
    }  # fmt: skip


default_cfgs = generate_default_cfgs(
    {f"conv{depth}": _cfg("features.0") for depth in (2, 4, 6, 8)}
    | {f"resnet{depth}_cifar": _cfg("conv1") for depth in (18, 50, 56)}
    | {name: _cfg("conv1") for name in ("wrn_28_4", "wrn_28_10", "densenet_bc_100_12")}
    | {name: _cfg("features.0") for name in ("vgg19_cifar", "vgg19_bn_cifar", "alexnet_cifar")}
    | {"lenet_300_100": _cfg(None)}
)


def zoo_names() -> tuple[str, ...]:
    """The architectures that timm knows only after this module is imported."""
    return tuple(name.partition(".")[0] for name in default_cfgs)


def _conv(depth: int, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    model: nn.Module = build_model_with_cfg(
        ConvN, f"conv{depth}", pretrained, depth=depth, **kwargs
    )
    return model


def _resnet(name: str, block: type, layers: tuple[int, ...], pretrained: bool, **kw: Any) -> Any:
    return build_model_with_cfg(CifarResNet, name, pretrained, block=block, layers=layers, **kw)


def _network(
    network: type[nn.Module], name: str, pretrained: bool, kwargs: dict[str, Any], **usual: Any
) -> nn.Module:
    """``network`` with its usual arguments where ``kwargs`` does not say otherwise."""
    model: nn.Module = build_model_with_cfg(network, name, pretrained, **{**usual, **kwargs})
    return model


@register_model  # type: ignore[untyped-decorator]
def conv2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Conv2 of Ramanujan et al., Table 1."""
    return _conv(2, pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator]
def conv4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Conv4 of Ramanujan et al., Table 1."""
    return _conv(4, pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator]
def conv6(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Conv6 of Ramanujan et al., Table 1."""
    return _conv(6, pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator]
def conv8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Conv8 of Ramanujan et al., Table 1."""
    return _conv(8, pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator]
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 with the CIFAR stem."""
    model: nn.Module = _resnet("resnet18_cifar", BasicBlock, (2, 2, 2, 2), pretrained, **kwargs)
    return model


@register_model  # type: ignore[untyped-decorator]
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 with the CIFAR stem."""
    model: nn.Module = _resnet("resnet50_cifar", Bottleneck, (3, 4, 6, 3), pretrained, **kwargs)
    return model


@register_model  # type: ignore[untyped-decorator]
def wrn_28_4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Wide ResNet-28-4 (Rosenfeld & Tsotsos, Section 4)."""
    return _network(WideResNet, "wrn_28_4", pretrained, kwargs, depth=28, widen_factor=4)


@register_model  # type: ignore[untyped-decorator]
def wrn_28_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Wide ResNet-28-10 (Rosenfeld & Tsotsos, Section 4)."""
    return _network(WideResNet, "wrn_28_10", pretrained, kwargs, depth=28, widen_factor=10)


@register_model  # type: ignore[untyped-decorator]
def densenet_bc_100_12(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DenseNet-BC of depth 100, growth 12 (Rosenfeld & Tsotsos, Section 4)."""
    return _network(DenseNetBC, "densenet_bc_100_12", pretrained, kwargs, depth=100, growth_rate=12)


@register_model  # type: ignore[untyped-decorator]
def vgg19_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-19 for CIFAR without norms (Rosenfeld & Tsotsos, Section 4)."""
    return _network(CifarVgg19, "vgg19_cifar", pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator]
def vgg19_bn_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-19 for CIFAR with norms (Rosenfeld & Tsotsos, Section 4)."""
    return _network(CifarVgg19, "vgg19_bn_cifar", pretrained, kwargs, norm=True)


@register_model  # type: ignore[untyped-decorator]
def alexnet_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AlexNet for CIFAR (Rosenfeld & Tsotsos, Section 4)."""
    return _network(CifarAlexNet, "alexnet_cifar", pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator]
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56 for CIFAR (He et al., Section 4.2) with projection shortcuts."""
    return _network(DeepResNet, "resnet56_cifar", pretrained, kwargs, depth=56)


@register_model  # type: ignore[untyped-decorator]
def lenet_300_100(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LeNet-300-100 (LeCun et al., 1998)."""
    return _network(LeNet, "lenet_300_100", pretrained, kwargs)
