"""A small residual network, to look at beside the transformers (chapter 15; He et al. 2016)."""

from collections.abc import Sequence

import torch.nn.functional as F
from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, and a shortcut around them: a basic block.

    Shapes:
        maps: ``b c h w``
        return: ``b d rows columns``, rows = ceil(h / stride), columns = ceil(w / stride)
    """

    def __init__(self, in_chans: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride > 1 or in_chans != width:
            conv = nn.Conv2d(in_chans, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        inner = F.relu(self.norm1(self.conv1(maps)))
        return F.relu(self.shortcut(maps) + self.norm2(self.conv2(inner)))


class ResNet(nn.Module):
    """A stem of stride 4, and stages of residual blocks, each at half the size of the one before.

    The default three stages work at strides 4, 8 and 16, as the three soft splits do.

    Shapes:
        image: ``b c h w``
        return: ``b classes``, logits; any height and width

    Source:
        He et al. 2016, "Deep residual learning for image recognition"
    """

    def __init__(
        self, in_chans: int = 3, num_classes: int = 1000, widths: Sequence[int] = (24, 48, 96), depth: int = 2
    ):
        super().__init__()
        self.num_classes = num_classes
        self.arguments = dict(in_chans=in_chans, num_classes=num_classes, widths=tuple(widths), depth=depth)
        stem = nn.Conv2d(in_chans, widths[0], 7, 2, 3, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1))
        self.stages = nn.ModuleList()
        before = widths[0]
        for stage, width in enumerate(widths):
            blocks = [ResidualBlock(before, width, stride=2 if stage else 1)]
            blocks += [ResidualBlock(width, width, stride=1) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(*blocks))
            before = width
        self.head = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        maps = self.stem(image)
        for stage in self.stages:
            maps = stage(maps)
        return self.head(reduce(maps, "b c h w -> b c", "mean"))
