"""Both networks and their training loop as one would write them at first: what `bench.py` holds
the product against. Layers of torch.nn as they come, fp32, contiguous tensors, Adam's defaults.
Parameters have the names that models.py gives them, so that weights can be carried over.
"""

from collections.abc import Callable
from itertools import count, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from models import SKIP_FREE_SHARE, Draws, augment, corrupt


def conv(i: int, o: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(i, o, 3, stride, padding=1, bias=False), nn.BatchNorm2d(o),
            nn.ReLU(inplace=True)]


def double_conv(i: int, o: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(*conv(i, o), nn.Dropout2d(dropout), *conv(o, o))


def two_layers(i: int, hidden: int, o: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(i, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout),
                         nn.Linear(hidden, o))


class PlainUNet(nn.Module):
    """The U-Net; `forward` gives both reconstructions, the skip-free one of the first few."""

    def __init__(self, size: int, latent: int, w: int, dropout: float) -> None:
        super().__init__()
        self.bottom = (8 * w, size // 16, size // 16)
        flat = 8 * w * (size // 16) ** 2
        self.down = nn.ModuleList(
            double_conv(i, o, dropout) for i, o in pairwise((1, w, 2 * w, 4 * w, 8 * w, 8 * w)))
        self.to_latent, self.from_latent = nn.Linear(flat, latent), nn.Linear(latent, flat)
        self.up = nn.ModuleList(
            double_conv(2 * i, o, dropout) for i, o in pairwise((8 * w, 4 * w, 2 * w, w, w)))
        self.skip_free_up = nn.Sequential(*(
            nn.Sequential(nn.ConvTranspose2d(i, o, 2, stride=2), double_conv(o, o, dropout))
            for i, o in pairwise((8 * w, 8 * w, 4 * w, 2 * w, w))))
        self.out = nn.Conv2d(w, 1, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if maps else x)
            maps.append(x)
        bottom = self.from_latent(self.to_latent(x.flatten(1))).view(-1, *self.bottom)
        y = bottom
        for block, skip in zip(self.up, maps[-2::-1], strict=True):
            y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
            y = block(torch.cat([skip, y], dim=1))
        z = self.skip_free_up(bottom[: max(1, round(len(y) * SKIP_FREE_SHARE))])
        return [torch.sigmoid(self.out(y)), torch.sigmoid(self.out(z))]


class PlainReversedAE(nn.Module):
    """The Reversed Autoencoder; `forward` gives its one reconstruction, in a list."""

    def __init__(self, size: int, latent: int, w: int, dropout: float) -> None:
        super().__init__()
        self.bottom = (8 * w, size // 8, size // 8)
        flat, hidden = 8 * w * (size // 8) ** 2, 2 * latent
        self.down = nn.Sequential(*(nn.Sequential(*conv(i, o, stride=2 if i > 1 else 1))
                                    for i, o in pairwise((1, w, 2 * w, 4 * w, 8 * w))))
        self.to_latent = two_layers(flat, hidden, latent, dropout)
        self.from_latent = two_layers(latent, hidden, flat, dropout)
        self.up = nn.Sequential(*(
            nn.Sequential(nn.ConvTranspose2d(i, o, 3, 2, padding=1, output_padding=1, bias=False),
                          nn.BatchNorm2d(o), nn.ReLU(inplace=True))
            for i, o in pairwise((8 * w, 4 * w, 2 * w, w))))
        self.out = nn.Conv2d(w, 1, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.from_latent(self.to_latent(self.down(x).flatten(1))).view(-1, *self.bottom)
        return [torch.sigmoid(self.out(self.up(y)))]


def plain_model(config: Config) -> nn.Module:
    kind = {"unet": PlainUNet, "reversed_ae": PlainReversedAE}[config.model]
    return kind(config.image_size, config.latent_dim, config.width, config.dropout)


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
        inputs = corrupt(images, "heal", random)
        optimizer.zero_grad()
        views = model(inputs)
        loss = sum(F.l1_loss(view, images[: len(view)]) for view in views) / len(views)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
