"""Backbones by name: MobileFaceNet, and whatever timm has (``timm:resnet18``; needs the extra ``sst-fast[timm]``)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, linear: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(c_out)]
    return nn.Sequential(*layers, *([] if linear else [nn.PReLU(c_out)]))


class _Bottleneck(nn.Module):
    """Inverted residual: expand, depthwise, project; a shortcut where the shape allows one."""

    def __init__(self, c_in: int, c_out: int, expand: int, stride: int) -> None:
        super().__init__()
        self.shortcut = stride == 1 and c_in == c_out
        self.body = nn.Sequential(
            _conv(c_in, expand, 1),
            _conv(expand, expand, 3, stride, groups=expand),
            _conv(expand, c_out, 1, linear=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.shortcut else out


class MobileFaceNet(nn.Module):
    """MobileFaceNet (Chen et al., CCBR 2018, table 1), the backbone of the Semi-Siamese Training paper.

    Args:
        dim: size D of the embedding.
        width: factor on all channel counts (1 = the paper's).
        input_size: side of the square input in pixels, a multiple of 16 (112 = the paper's).
        channels: of the input image.

    Maps images [B, channels, input_size, input_size] to embeddings [B, dim].
    """

    STRIDE = 16  # the input's side is divided by it
    # expansion, channels, repeats, stride of the first
    STAGES = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))

    def __init__(self, dim: int = 512, width: float = 1.0, input_size: int = 112, channels: int = 3) -> None:
        super().__init__()
        if input_size < 1 or input_size % self.STRIDE:
            raise ValueError(f"input_size must be a multiple of {self.STRIDE}, got {input_size}")
        if width <= 0:
            raise ValueError(f"width must be > 0, got {width}")
        if dim < 1 or channels < 1:
            raise ValueError(f"dim and channels must be > 0, got {dim} and {channels}")

        def scaled(c: int) -> int:
            return max(8, int(c * width + 4) // 8 * 8)

        c = scaled(64)
        layers: list[nn.Module] = [_conv(channels, c, 3, 2), _conv(c, c, 3, groups=c)]
        for expansion, c_out, repeats, stride in self.STAGES:
            for i in range(repeats):
                layers.append(_Bottleneck(c, scaled(c_out), c * expansion, stride if i == 0 else 1))
                c = scaled(c_out)
        top = scaled(512)
        self.features = nn.Sequential(*layers, _conv(c, top, 1))
        self.head = nn.Sequential(
            nn.Conv2d(top, top, input_size // self.STRIDE, groups=top, bias=False),  # global depthwise convolution
            nn.BatchNorm2d(top),
            nn.Conv2d(top, dim, 1, bias=False),
            nn.Flatten(),
            nn.BatchNorm1d(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings, not normalised."""
        out: Tensor = self.head(self.features(x))
        return out


def build(name: str, dim: int, input_size: int, width: float = 1.0, channels: int = 3) -> nn.Module:
    """A backbone by name.

    Args:
        name: 'mobilefacenet' or 'timm:NAME'.
        dim: embedding size D; input_size: side of the square input; width: MobileFaceNet's; channels: of the input.

    Raises:
        ValueError: no such backbone. ImportError: timm is not installed.
    """
    if name == "mobilefacenet":
        return MobileFaceNet(dim, width, input_size, channels)
    if name.startswith("timm:"):
        try:
            import timm
        except ImportError as error:
            raise ImportError(f"backbone {name!r} needs timm: pip install 'sst-fast[timm]' ({error})") from error
        model = name.removeprefix("timm:")
        if not timm.is_model(model):
            raise ValueError(f"backbone: timm knows no model {model!r}")
        network: nn.Module = timm.create_model(model, num_classes=dim, in_chans=channels)
        return network
    raise ValueError(f"backbone must be 'mobilefacenet' or 'timm:NAME', got {name!r}")


@torch.no_grad()
def embed(network: nn.Module, images: Iterable[Tensor]) -> Tensor:
    """Unit embeddings [M, D], float32, of batches of images [b, ...], by ``network`` in evaluation mode, on its device."""
    training, device = network.training, next(network.parameters()).device
    network.eval()
    parts = [nn.functional.normalize(network(batch.to(device)).float()) for batch in images]
    network.train(training)
    return torch.cat(parts)
