"""Training as one would write it at first: what `bench.py` holds the product against. The product's
layers, of torch.nn as they come, in forward passes without its care for memory layouts; fp32,
contiguous tensors, Adam's defaults.
"""

from collections.abc import Callable
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from models import Draws, Linear, ReversedAutoencoder, UNet, augment, corrupt


class PlainUNet(UNet):
    """The U-Net; `forward` gives both reconstructions."""

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if maps else x)
            maps.append(x)
        bottom = y = self.from_latent(self.to_latent(x.flatten(1))).view(-1, *self.bottom)
        for block, skip in zip(self.up, maps[-2::-1], strict=True):
            y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
            y = block(torch.cat([skip, y], dim=1))
        z = bottom
        for block in self.skip_free_up:
            z = block(z)
        return [torch.sigmoid(self.out(y)), torch.sigmoid(self.out(z))]


class PlainReversedAE(ReversedAutoencoder):
    """The Reversed Autoencoder; `forward` gives its one reconstruction, in a list."""

    def forward(self, x: Tensor) -> list[Tensor]:
        for block in self.down:
            x = block(x)
        y = self.from_latent(self.to_latent(x.flatten(1))).view(-1, *self.bottom)
        for block in self.up:
            y = block(y)
        return [torch.sigmoid(self.out(y))]


def plain_model(config: Config) -> nn.Module:
    kind = {"unet": PlainUNet, "reversed_ae": PlainReversedAE}[config.model]
    model = kind(config.image_size, config.latent_dim, config.width)
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.__class__ = nn.Linear
    return model


def plain_training(model: nn.Module, device: torch.device,
                   draws: Callable[[int, int], Draws]) -> Callable[[Tensor], float]:
    """A function that takes one training step on uint8 images [B,1,H,W] and gives its loss.

    draws: of a step's number and batch size. Augmentation and corruption are the product's own.
    """
    model.to(device).train()
    optimizer, numbers = torch.optim.Adam(model.parameters(), lr=1e-3), count()

    def step(images: Tensor) -> float:
        random = draws(next(numbers), len(images))
        images = augment(images.to(device).float() / 255, random)
        inputs = corrupt(images, "denoise", random)
        optimizer.zero_grad()
        views = model(inputs)
        loss = sum(F.l1_loss(view, images) for view in views) / len(views)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
