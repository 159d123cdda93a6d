"""Both networks and their training loop as one would write them at first: what `bench.py` holds
the product against. Layers of torch.nn as they come, fp32, contiguous tensors, Adam's defaults.

Parameters have the names that models.py gives them, so that weights can be carried over.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from models import SKIP_FREE_SHARE, Draws, augment, corrupt


def double_conv(i: int, o: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
        nn.Dropout2d(dropout),
        nn.Conv2d(o, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


class PlainUNet(nn.Module):
    """The U-Net; `forward` gives both reconstructions, the skip-free one of the first `share`."""

    def __init__(self, size: int = 128, latent: int = 512, w: int = 64,
                 dropout: float = 0.0) -> None:
        super().__init__()
        self.bottom = (8 * w, size // 16, size // 16)
        flat = 8 * w * (size // 16) ** 2
        self.down = nn.ModuleList(
            double_conv(i, o, dropout) for i, o in pairwise((1, w, 2 * w, 4 * w, 8 * w, 8 * w)))
        self.to_latent, self.from_latent = nn.Linear(flat, latent), nn.Linear(latent, flat)
        self.up = nn.ModuleList(
            double_conv(i, o, dropout)
            for i, o in ((16 * w, 4 * w), (8 * w, 2 * w), (4 * w, w), (2 * w, w)))
        self.skip_free_up = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(i, o, 2, stride=2), double_conv(o, o, dropout))
            for i, o in pairwise((8 * w, 8 * w, 4 * w, 2 * w, w)))
        self.out = nn.Conv2d(w, 1, 1)

    def forward(self, x: Tensor, share: float = SKIP_FREE_SHARE) -> list[Tensor]:
        maps = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if maps else x)
            maps.append(x)
        bottom = self.from_latent(self.to_latent(x.flatten(1))).view(-1, *self.bottom)
        y = bottom
        for block, skip in zip(self.up, maps[-2::-1], strict=True):
            y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
            y = block(torch.cat([skip, y], dim=1))
        z = bottom[: max(1, round(len(y) * share))]
        for block in self.skip_free_up:
            z = block(z)
        return [torch.sigmoid(self.out(y)), torch.sigmoid(self.out(z))]


class PlainReversedAE(nn.Module):
    """The Reversed Autoencoder; `forward` gives its one reconstruction, in a list."""

    def __init__(self, size: int = 128, latent: int = 512, w: int = 64,
                 dropout: float = 0.0) -> None:
        super().__init__()
        self.bottom = (8 * w, size // 8, size // 8)
        flat, hidden = 8 * w * (size // 8) ** 2, 2 * latent
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2 if i > 1 else 1, padding=1, bias=False),
                          nn.BatchNorm2d(o), nn.ReLU(inplace=True))
            for i, o in pairwise((1, w, 2 * w, 4 * w, 8 * w)))
        self.to_latent = nn.Sequential(nn.Linear(flat, hidden), nn.ReLU(inplace=True),
                                       nn.Dropout(dropout), nn.Linear(hidden, latent))
        self.from_latent = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(inplace=True),
                                         nn.Dropout(dropout), nn.Linear(hidden, flat))
        self.up = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(i, o, 3, stride=2, padding=1, output_padding=1,
                                             bias=False),
                          nn.BatchNorm2d(o), nn.ReLU(inplace=True))
            for i, o in pairwise((8 * w, 4 * w, 2 * w, w)))
        self.out = nn.Conv2d(w, 1, 1)

    def forward(self, x: Tensor, share: float = SKIP_FREE_SHARE) -> list[Tensor]:
        for block in self.down:
            x = block(x)
        y = self.from_latent(self.to_latent(x.flatten(1))).view(-1, *self.bottom)
        for block in self.up:
            y = block(y)
        return [torch.sigmoid(self.out(y))]


PLAIN_MODELS = {"unet": PlainUNet, "reversed_ae": PlainReversedAE}


def plain_model(config: Config) -> nn.Module:
    return PLAIN_MODELS[config.model](config.image_size, config.latent_dim, config.width,
                                      config.dropout)


def plain_loss(model: nn.Module, inputs: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error against the clean images, averaged over the reconstructions."""
    views = model(inputs)
    return sum(F.l1_loss(view, images[: len(view)]) for view in views) / len(views)


def plain_training(model: nn.Module, device: torch.device,
                   draws: Callable[[int, int], Draws]) -> Callable[[Tensor], float]:
    """A function that takes one training step on uint8 images [B,1,H,W] and gives its loss.

    draws: of a step's number and batch size, for augmentation and corruption, which are the
    product's own: the objective is the same.
    """
    model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    done = 0

    def step(images: Tensor) -> float:
        nonlocal done
        random = draws(done, len(images))
        images = augment(images.to(device).float() / 255, random)
        inputs = corrupt(images, "heal", random)
        optimizer.zero_grad()
        loss = plain_loss(model, inputs, images)
        loss.backward()
        optimizer.step()
        done += 1
        return loss.item()

    return step
