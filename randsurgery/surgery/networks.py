"""The CIFAR networks of partial training, and LeNet-300-100, as modules. ``zoo`` registers them.

``WideResNet``, ``DenseNetBC``, ``CifarVgg19``, ``CifarAlexNet``, ``DeepResNet``: the networks that
Rosenfeld & Tsotsos train in part (their Section 4), as in the implementation they modify,
bearpaw's pytorch-classification. ``LeNet``: the fully connected network of LeCun et al. (1998).

Residual and dense networks have the names of Rosenfeld & Tsotsos's Table 1 for their parts:
``conv1``, ``block1``, ``block2``, ``block3``, ``fc``. Where that implementation pools a fixed
8 x 8 or 1 x 1, these networks take the mean over the whole map: the same at 32 x 32, and other
sizes work. The norm beside the blocks is ``bn``: in patterns, ``norm`` means every norm.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["CifarAlexNet", "CifarVgg19", "DeepResNet", "DenseNetBC", "LeNet", "WideResNet"]

Size = int | tuple[int, int]
"""Of images in pixels: one side, or height and width."""


class Network(nn.Module):
    """What timm asks of a network. Input (N, in_chans, H, W), output (N, classes).

    A subclass makes its layers, ends with ``finish``, and has ``forward_features``.
    """

    fc: nn.Module

    def finish(self, num_features: int, num_classes: int) -> None:
        """Initial values of the convolutions, and the last layer, ``fc``."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.num_features = self.head_hidden_size = num_features
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer of ``num_classes``; 0 removes it. The pooling stays as it is."""
        self.num_classes = num_classes
        like = next(self.parameters())
        self.fc = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(
                self.num_features, num_classes, device=like.device, dtype=like.dtype
            )

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> feature maps (N, num_features, h, w)."""
        raise NotImplementedError

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Feature maps -> logits (N, classes), or the maps' means (N, num_features)."""
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, classes)."""
        return self.forward_head(self.forward_features(x))


def sides(img_size: Size) -> tuple[int, int]:
    """Height and width in pixels."""
    return (img_size, img_size) if isinstance(img_size, int) else img_size


def blocks_of(depth: int, ends: int) -> int:
    """n of a depth of 6n + ``ends``: blocks, of two layers each, in each of three stages."""
    blocks, rest = divmod(depth - ends, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth must be 6n + {ends} ({6 + ends}, {12 + ends}, ...), found {depth}")
    return blocks


def conv(inputs: int, outputs: int, side: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution without biases that keeps the image's size at stride 1."""
    return nn.Conv2d(inputs, outputs, side, stride, padding=side // 2, bias=False)


class WideBlock(nn.Module):
    """Norm, ReLU, 3x3, norm, ReLU, 3x3, added to the input: (N, in, H, W) -> (N, out, h, w).

    Where the shape changes, a 1x1 convolution without a norm of its own projects the input, and
    both paths start from the first norm and ReLU.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, outputs, stride=stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else conv(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in, H, W) -> (N, out, h, w)."""
        active = torch.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        out: torch.Tensor = self.conv2(torch.relu(self.bn2(self.conv1(active))))
        return kept + out


class BasicBlock(nn.Module):
    """3x3, norm, ReLU, 3x3, norm, added to the input, ReLU: (N, in, H, W) -> (N, out, h, w).

    Where the shape changes, a 1x1 convolution and a norm project the input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in, H, W) -> (N, out, h, w)."""
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.shortcut(x))


def stage(
    block: type[WideBlock | BasicBlock], count: int, inputs: int, outputs: int, stride: int
) -> nn.Sequential:
    """``count`` blocks, of which the first changes the shape."""
    later = (block(outputs, outputs, 1) for _ in range(count - 1))
    return nn.Sequential(block(inputs, outputs, stride), *later)


class WideResNet(Network):
    """A wide residual network (Zagoruyko & Komodakis) of ``depth`` 6n + 4.

    Stages of 16, 32 and 64 channels times ``widen_factor``, at full, half and quarter size, and
    one norm at the end. Rosenfeld & Tsotsos, Section 4: depth 28, widened by 10 or 4.
    """

    def __init__(
        self, depth: int = 28, widen_factor: int = 10, num_classes: int = 10, in_chans: int = 3
    ) -> None:
        super().__init__()
        count = blocks_of(depth, 4)
        first, second, third = (widen_factor * n for n in (16, 32, 64))
        self.conv1 = conv(in_chans, 16)
        self.block1 = stage(WideBlock, count, 16, first, 1)
        self.block2 = stage(WideBlock, count, first, second, 2)
        self.block3 = stage(WideBlock, count, second, third, 2)
        self.bn = nn.BatchNorm2d(third)
        self.finish(third, num_classes)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, 64 * widen_factor, H / 4, W / 4), sizes rounded up."""
        return torch.relu(self.bn(self.block3(self.block2(self.block1(self.conv1(x))))))


class DeepResNet(Network):
    """The CIFAR residual network of He et al. (Section 4.2), of ``depth`` 6n + 2.

    Basic blocks of 16, 32 and 64 channels, at full, half and quarter size. Shortcuts that change
    the shape are 1x1 projections with a norm (option B), as in the implementation that Rosenfeld
    & Tsotsos modify; He et al. pad with zeros (option A). The blocks are basic at every depth.
    """

    def __init__(self, depth: int = 56, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        count = blocks_of(depth, 2)
        self.conv1 = conv(in_chans, 16)
        self.bn = nn.BatchNorm2d(16)
        self.block1 = stage(BasicBlock, count, 16, 16, 1)
        self.block2 = stage(BasicBlock, count, 16, 32, 2)
        self.block3 = stage(BasicBlock, count, 32, 64, 2)
        self.finish(64, num_classes)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, 64, H / 4, W / 4), sizes rounded up."""
        x = torch.relu(self.bn(self.conv1(x)))
        out: torch.Tensor = self.block3(self.block2(self.block1(x)))
        return out


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 to four times ``growth``, norm, ReLU, 3x3 to ``growth``, beside the input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, 4 * growth, 1)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = conv(4 * growth, growth)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) -> (N, inputs + growth, H, W)."""
        new = self.conv1(torch.relu(self.bn1(x)))
        new = self.conv2(torch.relu(self.bn2(new)))
        return torch.cat((x, new), 1)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 to half the channels, mean of 2x2 pixels."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = conv(inputs, inputs // 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) -> (N, inputs // 2, H // 2, W // 2)."""
        return F.avg_pool2d(self.conv(torch.relu(self.bn(x))), 2)


class DenseNetBC(Network):
    """DenseNet-BC (Huang et al.) of ``depth`` 6n + 4: bottlenecks, and compression by half.

    Three blocks of n layers, each layer of which adds ``growth_rate`` channels to 2 * growth_rate
    at the start. The transitions between them are parts of their own, as the counts of Rosenfeld
    & Tsotsos's Table 1 have it: ``block1`` is learned without ``transition1``.
    """

    def __init__(
        self, depth: int = 100, growth_rate: int = 12, num_classes: int = 10, in_chans: int = 3
    ) -> None:
        super().__init__()
        count = blocks_of(depth, 4)
        first = 2 * growth_rate
        second = (first + count * growth_rate) // 2
        third = (second + count * growth_rate) // 2
        self.conv1 = conv(in_chans, first)
        self.block1 = self._block(first, growth_rate, count)
        self.transition1 = Transition(first + count * growth_rate)
        self.block2 = self._block(second, growth_rate, count)
        self.transition2 = Transition(second + count * growth_rate)
        self.block3 = self._block(third, growth_rate, count)
        self.bn = nn.BatchNorm2d(third + count * growth_rate)
        self.finish(third + count * growth_rate, num_classes)

    @staticmethod
    def _block(inputs: int, growth: int, count: int) -> nn.Sequential:
        return nn.Sequential(*(DenseLayer(inputs + n * growth, growth) for n in range(count)))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, num_features, H // 4, W // 4)."""
        x = self.transition1(self.block1(self.conv1(x)))
        x = self.transition2(self.block2(x))
        return torch.relu(self.bn(self.block3(x)))


class PlainNetwork(Network):
    """Convolutions and max-pools in a row, ``features``, then the mean and ``fc``.

    ``img_size`` is only checked: below ``smallest`` pixels a side the pools leave nothing.
    """

    title: str
    smallest: int

    def __init__(
        self, layers: list[nn.Module], num_features: int, num_classes: int, img_size: Size
    ) -> None:
        super().__init__()
        self._check(*sides(img_size))
        self.features = nn.Sequential(*layers)
        self.finish(num_features, num_classes)

    def _check(self, height: int, breadth: int) -> None:
        if min(height, breadth) < self.smallest:
            raise ValueError(
                f"{self.title} needs images of at least {self.smallest} pixels a side, "
                f"found {height} x {breadth}"
            )

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, num_features, h, w). Raises ValueError for small images."""
        self._check(x.shape[2], x.shape[3])
        out: torch.Tensor = self.features(x)
        return out


class CifarVgg19(PlainNetwork):
    """VGG-19 (Simonyan & Zisserman, configuration E) with one linear layer of 512 to the classes.

    16 convolutions with biases, five max-pools. ``norm`` puts a norm behind each convolution.
    """

    title, smallest = "VGG-19", 32

    def __init__(
        self, num_classes: int = 10, in_chans: int = 3, img_size: Size = 32, norm: bool = False
    ) -> None:
        layers: list[nn.Module] = []
        channels = in_chans
        for turns, out in ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512)):
            for _ in range(turns):
                layers.append(nn.Conv2d(channels, out, 3, padding=1))
                layers += [nn.BatchNorm2d(out), nn.ReLU()] if norm else [nn.ReLU()]
                channels = out
            layers.append(nn.MaxPool2d(2))
        super().__init__(layers, channels, num_classes, img_size)


class CifarAlexNet(PlainNetwork):
    """AlexNet with one linear layer of 256 to the classes: five convolutions with biases, three
    max-pools. The first convolution leaves a quarter of the image, which must be 8 pixels."""

    title, smallest = "AlexNet", 29

    def __init__(self, num_classes: int = 10, in_chans: int = 3, img_size: Size = 32) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(in_chans, 64, 11, stride=4, padding=5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        ]  # fmt: skip
        super().__init__(layers, 256, num_classes, img_size)


class LeNet(Network):
    """LeNet-300-100 (LeCun et al., 1998): fully connected layers of 300, 100 and the classes.

    ``img_size`` and ``in_chans`` fix the first layer.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, img_size: Size = 32) -> None:
        super().__init__()
        height, breadth = sides(img_size)
        self.fc1 = nn.Linear(in_chans * height * breadth, 300)
        self.fc2 = nn.Linear(300, 100)
        self.finish(100, num_classes)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, 100)."""
        return torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1)))))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(N, 100) -> logits (N, classes), or the hidden layer as it is."""
        return x if pre_logits else self.fc(x)
