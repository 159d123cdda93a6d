"""Both autoencoders, what they are trained on (objectives) and how they are read (scorers).

    from models import create_model
    model = create_model("unet")            # 54,986,305 parameters
    reconstruction = model(images)          # [B,1,128,128] in [0,1] -> the same

Every image tensor here is float [B,1,H,W] with values in [0,1]; H = W = the model's image size.
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from config import Config, UserError

# ----------------------------------------------------------------------------------------------
# Networks


# Before PyTorch 2.5 Apple's GPUs know no autocast, not even to have it switched off.
AUTOCAST = frozenset(kind for kind in ("cpu", "cuda", "mps")
                     if torch.amp.is_autocast_available(kind))


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """While inside, nothing is cast to a narrower type on that device."""
    return (torch.autocast(device.type, enabled=False) if device.type in AUTOCAST
            else contextlib.nullcontext())


# The three products of a Linear layer, for a few images on a CPU. In their obvious shapes MKL takes
# long; what others save was measured in fp32, with 8 images, 16.8 and 134 million weights.
FEW = 32  # images; with more the obvious shape is as fast


def few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, [B,in] and [out,in] to [B,out]; in a third to three fourths of the time."""
    return (weight @ x.T).T.contiguous()


def few_rows_back(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient @ weight, [B,out] and [out,in] to [B,in]; in a fourth to two thirds of the time."""
    if weight.shape[0] % 1024 == 0 and weight.shape[0] > weight.shape[1]:
        slices = gradient.unflatten(1, (-1, 1024)).transpose(0, 1)
        return torch.bmm(slices, weight.unflatten(0, (-1, 1024))).sum(0)
    if len(gradient) > FEW:
        return gradient @ weight
    result = gradient.new_zeros(len(gradient), weight.shape[1])
    for some, rows in zip(gradient.split(16, 1), weight.split(16), strict=True):
        result.addmm_(some, rows)
    return result


def few_rows_outer(gradient: Tensor, x: Tensor) -> Tensor:
    """gradient.T @ x, [B,out] and [B,in] to [out,in]; in half to three fifths of the time."""
    if len(x) > FEW or gradient.shape[1] % 32:
        return gradient.T @ x
    slices = gradient.T.unflatten(0, (-1, 32))
    return torch.bmm(slices, x.expand(len(slices), *x.shape)).flatten(0, 1)


class _FewRows(torch.autograd.Function):
    """x @ weight.T. Unless `factors` is None, the backward pass appends (gradient of the result, x)
    to it, in the dtype `kept`, whose product is the weight's gradient, and does not make that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, factors: list[tuple[Tensor, Tensor]] | None,
                kept: torch.dtype) -> Tensor:
        ctx.save_for_backward(x if factors is None else x.to(kept), weight)
        ctx.factors = factors
        return few_rows(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        for_weight = None
        if ctx.factors is None:
            for_weight = few_rows_outer(gradient, x)
        else:
            ctx.factors.append((gradient.to(x.dtype), x))
        return few_rows_back(gradient, weight), for_weight, None, None


class DenseGradient(torch.autograd.Function):
    """The identity, whose gradient is contiguous (channels last)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=torch.channels_last)


class Linear(nn.Linear):
    """nn.Linear, on a CPU faster and always in fp32; its weight's gradient may be left in two
    factors there.

    factors: unless None, where the backward pass puts these, [B,out] and [B,in], instead of
    making the gradient: 134 million numbers, from a few images.
    """

    factors: list[tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if kind != "cpu":
            return super().forward(x)
        autocast = torch.is_autocast_enabled(kind)
        kept = torch.get_autocast_dtype(kind) if autocast else self.weight.dtype
        # On a CPU to cast the matrix would take longer than to multiply a few images by it.
        with torch.autocast(kind, enabled=False):
            x = x.to(self.weight.dtype)
            if torch.is_grad_enabled():
                return _FewRows.apply(x, self.weight, self.factors, kept) + self.bias
            return few_rows(x, self.weight) + self.bias


# The gradients of 3x3 convolutions' weights, for maps of many channels on a CPU in fp32: oneDNN
# takes two to four times as long for them as for the convolution itself. They are used where that
# was measured, with AVX2; the whole step of a U-Net takes four fifths of the time.
OWN_WEIGHT_GRADIENTS = torch.backends.cpu.get_cpu_capability() == "AVX2"
# Winograd's transforms of windows of 6x6, blocks of 4x4 and kernels of 3x3, as matrices that take
# them flattened (Lavin and Gray, CVPR 2016, equations 8 and 14, for F(4x4, 3x3)). With them a
# convolution is block = A.T ((G kernel) * (B window)), and its gradient the transpose of that.
WINDOWS = torch.tensor([[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
                        [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1.0]])
WINDOWS = torch.kron(WINDOWS, WINDOWS)  # [36,36], B
KERNELS = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24.0]])
KERNELS = torch.kron(KERNELS, KERNELS) / 24**2  # [36,9], G
BLOCKS = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0],
                       [0, 1, -1, 8, -8, 1.0]]).T
BLOCKS = torch.kron(BLOCKS, BLOCKS)  # [36,16], A
# So many blocks or pixels at a time, so that what is computed of them stays in the cache.
BLOCKS_AT_ONCE, PIXELS_AT_ONCE = 128, 4096


def winograd_weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """The weight's gradient [out,in,3,3] of F.conv2d(x, weight, padding=1).

    x: float32 [B,in,H,W], gradient: that of the result, [B,out,H,W]; H and W multiples of 4.
    A fourth of the multiplications of the sum over all pixels; it differs from that by rounding,
    at most a ten-thousandth of the standard deviation of its numbers.
    """
    channels, h, w = x.shape[1], x.shape[2] // 4, x.shape[3] // 4
    images, rows = max(1, BLOCKS_AT_ONCE // (h * w)), max(1, BLOCKS_AT_ONCE // w)
    result = x.new_zeros(36, gradient.shape[1], channels)
    for some, wrong in zip(x.split(images), gradient.split(images), strict=True):
        padded = F.pad(some.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        windows = padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(0, 1, 2, 4, 5, 3)
        blocks = wrong.permute(0, 2, 3, 1).unflatten(2, (w, 4)).unflatten(1, (h, 4)).transpose(2, 3)
        for top in range(0, h, rows):
            seen = windows[:, top : top + rows].reshape(-1, 36, channels)
            lacks = blocks[:, top : top + rows].reshape(-1, 16, gradient.shape[1])
            seen = torch.bmm(WINDOWS.expand(len(seen), -1, -1), seen)
            lacks = torch.bmm(BLOCKS.expand(len(lacks), -1, -1), lacks)
            result.baddbmm_(lacks.permute(1, 2, 0), seen.transpose(0, 1))
    return (KERNELS.T @ result.flatten(1)).view(3, 3, *result.shape[1:]).permute(2, 3, 0, 1)


def strided_weight_gradient(wide: Tensor, small: Tensor) -> Tensor:
    """The weight's gradient of F.conv2d(wide, weight, stride=2, padding=1), [small's channels,
    wide's channels,3,3], from the gradient `small` of its result; or that of
    F.conv_transpose2d(small, weight, stride=2, padding=1, output_padding=1), from `wide`.

    wide: float32 [B,C,2h,2w], small: [B,K,h,w].
    """
    h, w = small.shape[2:]
    padded = F.pad(wide.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    left = small.permute(0, 2, 3, 1).flatten(0, 2)
    result = wide.new_zeros(3, 3, small.shape[1], wide.shape[1])
    for i, j in itertools.product(range(3), range(3)):
        right = padded[:, i : i + 2 * h : 2, j : j + 2 * w : 2].flatten(0, 2)
        for a, b in zip(left.split(PIXELS_AT_ONCE), right.split(PIXELS_AT_ONCE), strict=True):
            result[i, j].addmm_(a.T, b)
    return result.permute(2, 3, 0, 1)


class _Convolution(torch.autograd.Function):
    """F.conv2d(x, weight, stride=stride, padding=1), with the weight's gradient of above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, stride=stride, padding=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        for_x = F.conv_transpose2d(gradient, weight, stride=ctx.stride, padding=1,
                                   output_padding=ctx.stride - 1)
        for_weight = winograd_weight_gradient if ctx.stride == 1 else strided_weight_gradient
        return for_x, for_weight(x, gradient), None


class _TransposedConvolution(torch.autograd.Function):
    """F.conv_transpose2d(x, weight, stride=2, padding=1, output_padding=1), the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv_transpose2d(x, weight, stride=2, padding=1, output_padding=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return (F.conv2d(gradient, weight, stride=2, padding=1),
                strided_weight_gradient(gradient, x))


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether the weight's gradient is to be made by the functions above."""
    return (OWN_WEIGHT_GRADIENTS and torch.is_grad_enabled() and x.device.type == "cpu"
            and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and weight.shape[0] * weight.shape[1] >= 4096 and x[:, 0].numel() >= 512
            and x.shape[2] % 4 == 0 and x.shape[3] % 4 == 0)


class Conv3x3(nn.Conv2d):
    """nn.Conv2d of 3x3 with padding 1 and without bias; its training is faster on a CPU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None and pays(x, self.weight):
            return _Convolution.apply(x, self.weight, self.stride[0])
        return super().forward(x)


class TransposedConv3x3(nn.ConvTranspose2d):
    """nn.ConvTranspose2d of 3x3 that doubles the side, without bias; its training is faster on a
    CPU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, stride=2, padding=1, output_padding=1,
                         bias=False)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.bias is None and output_size is None and pays(x, self.weight):
            return _TransposedConvolution.apply(x, self.weight)
        return super().forward(x, output_size)


def conv_block(channels_in: int, channels_out: int, dropout: float) -> nn.Sequential:
    """Two 3x3 convolutions, each with BatchNorm and ReLU; whole channels are dropped between."""
    return nn.Sequential(
        Conv3x3(channels_in, channels_out),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
        nn.Dropout2d(dropout),
        Conv3x3(channels_out, channels_out),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """U-Net with a fully connected bottleneck and two decoders over one encoder.

    The decoder with skip connections gives the reconstruction (`forward`). The second decoder
    sees the latent alone (`decode`): unable to copy its input, it is a view of its own.

    width: channels of the first level; the levels have 1, 2, 4, 8 and 8 times as many.
    """

    def __init__(
        self, image_size: int = 128, latent_dim: int = 512, width: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_image_size("unet", image_size, 16)
        w = width
        self.image_size, self.bottom = image_size, (8 * w, image_size // 16, image_size // 16)
        flat = 8 * w * (image_size // 16) ** 2
        widths = (w, 2 * w, 4 * w, 8 * w, 8 * w)
        self.down = nn.ModuleList(
            conv_block(i, o, dropout) for i, o in zip((1, *widths), widths, strict=False)
        )
        self.to_latent = Linear(flat, latent_dim)
        self.from_latent = Linear(latent_dim, flat)
        # Each level joins the upsampled map with the encoder's map of that level.
        self.up = nn.ModuleList(
            conv_block(i, o, dropout)
            for i, o in ((16 * w, 4 * w), (8 * w, 2 * w), (4 * w, w), (2 * w, w))
        )
        pairs = ((8 * w, 8 * w), (8 * w, 4 * w), (4 * w, 2 * w), (2 * w, w))
        self.skip_free_up = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(i, o, 2, stride=2), conv_block(o, o, dropout))
            for i, o in pairs
        )
        self.out = nn.Conv2d(w, 1, 1)

    def features(self, x: Tensor) -> list[Tensor]:
        """The encoder's five maps, finest first: [B,w,H,W] ... [B,8w,H/16,W/16]."""
        maps = [self.down[0](x)]
        for block in self.down[1:]:
            maps.append(block(F.max_pool2d(maps[-1], 2)))
        return maps

    def encode(self, x: Tensor) -> Tensor:
        """Latent [B,latent_dim]."""
        return self.to_latent(self.features(x)[-1].flatten(1))

    def decode(self, latent: Tensor) -> Tensor:
        """Skip-free reconstruction [B,1,H,W] from a latent [B,latent_dim]."""
        return self._decode_bottom(self._bottom_from(latent))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction [B,1,H,W] by the decoder with skip connections."""
        return self.reconstructions(x, skip_free_share=0.0)[0]

    def reconstructions(self, x: Tensor, skip_free_share: float = 1.0) -> list[Tensor]:
        """Both reconstructions from one pass of the encoder: with skips, and skip-free.

        skip_free_share: the skip-free decoder costs 69 % of the rest when trained, so training
        may run it on the first share of the batch only; its result has that many images, and is
        left out at 0.
        """
        return self.from_features(self.features(x), skip_free_share)

    def from_features(self, maps: list[Tensor], skip_free_share: float = 1.0) -> list[Tensor]:
        """What `reconstructions` gives, from the encoder's maps."""
        *skips, bottom = maps
        latent = self.to_latent(bottom.flatten(1))
        bottom = self._bottom_from(latent)
        y = bottom
        for block, skip in zip(self.up, reversed(skips), strict=True):
            # Autocast on a CPU would enlarge in fp32, and join both maps in it.
            with no_autocast(y.device):
                y = F.interpolate(y.to(skip.dtype), scale_factor=2, mode="bilinear",
                                  align_corners=False)
                # The gradient of a part of the joined map has gaps, with which that of enlarging
                # would take ten times as long.
                y = torch.cat([skip, DenseGradient.apply(y)], dim=1)
            y = block(y)
        result = [torch.sigmoid(self.out(y))]
        if skip_free_share > 0:
            result.append(self._decode_bottom(bottom[: max(1, round(len(y) * skip_free_share))]))
        return result

    def _bottom_from(self, latent: Tensor) -> Tensor:
        return self.from_latent(latent).view(-1, *self.bottom)

    def _decode_bottom(self, y: Tensor) -> Tensor:
        for block in self.skip_free_up:
            y = block(y)
        return torch.sigmoid(self.out(y))


class ReversedAutoencoder(nn.Module):
    """Asymmetric autoencoder without skip connections (after Bercea et al., MIDL 2023).

    Strided convolutions and two Linear layers lead down to the latent, two Linear layers and
    three transposed convolutions back up. The reversed-embedding term of that paper (the encoder
    run once more, on the reconstruction) is not part of the training: it changed no score.

    width: channels of the first level; the encoder's levels have 1, 2, 4 and 8 times as many.
    """

    def __init__(
        self, image_size: int = 128, latent_dim: int = 512, width: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_image_size("reversed_ae", image_size, 8)
        w = width
        self.image_size, self.bottom = image_size, (8 * w, image_size // 8, image_size // 8)
        flat, hidden = 8 * w * (image_size // 8) ** 2, 2 * latent_dim
        self.down = nn.ModuleList(
            nn.Sequential(
                Conv3x3(i, o, stride),
                nn.BatchNorm2d(o),
                nn.ReLU(inplace=True),
            )
            for i, o, stride in ((1, w, 1), (w, 2 * w, 2), (2 * w, 4 * w, 2), (4 * w, 8 * w, 2))
        )
        self.to_latent = nn.Sequential(
            Linear(flat, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            Linear(hidden, latent_dim),
        )
        self.from_latent = nn.Sequential(
            Linear(latent_dim, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            Linear(hidden, flat),
        )
        self.up = nn.ModuleList(
            nn.Sequential(
                TransposedConv3x3(i, o),
                nn.BatchNorm2d(o),
                nn.ReLU(inplace=True),
            )
            for i, o in ((8 * w, 4 * w), (4 * w, 2 * w), (2 * w, w))
        )
        self.out = nn.Conv2d(w, 1, 1)

    def features(self, x: Tensor) -> list[Tensor]:
        """The encoder's four maps, finest first: [B,w,H,W] ... [B,8w,H/8,W/8]."""
        maps = []
        for block in self.down:
            x = block(x)
            maps.append(x)
        return maps

    def encode(self, x: Tensor) -> Tensor:
        """Latent [B,latent_dim]."""
        return self.to_latent(self.features(x)[-1].flatten(1))

    def decode(self, latent: Tensor) -> Tensor:
        """Reconstruction [B,1,H,W] from a latent [B,latent_dim]."""
        y = self.from_latent(latent).view(-1, *self.bottom)
        for block in self.up:
            y = block(y)
        return torch.sigmoid(self.out(y))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction [B,1,H,W]."""
        return self.decode(self.encode(x))

    def reconstructions(self, x: Tensor, skip_free_share: float = 1.0) -> list[Tensor]:
        """[forward(x)]: the one view this model has, in the form that U-Net gives its two."""
        return self.from_features(self.features(x), skip_free_share)

    def from_features(self, maps: list[Tensor], skip_free_share: float = 1.0) -> list[Tensor]:
        """What `reconstructions` gives, from the encoder's maps."""
        return [self.decode(self.to_latent(maps[-1].flatten(1)))]


def check_image_size(model: str, image_size: int, multiple: int) -> None:
    """UserError unless the model can halve the side as often as it must."""
    if image_size % multiple or image_size < 2 * multiple:
        raise UserError(
            f"--image-size {image_size}: {model} needs a multiple of {multiple}, "
            f"at least {2 * multiple}"
        )


def create_model(name: str, config: Config | None = None) -> UNet | ReversedAutoencoder:
    """The model called `unet` or `reversed_ae`, freshly initialised, on the CPU.

    Sizes come from the config (default: Config()). Initial weights follow torch's global seed.
    """
    config = config or Config()
    if name not in MODEL_CLASSES:
        raise UserError(f"model {name!r}: not one of {', '.join(MODEL_CLASSES)}")
    return MODEL_CLASSES[name](config.image_size, config.latent_dim, config.width, config.dropout)


def folded(model: nn.Module) -> nn.Module:
    """A copy of a trained model, to be read only: each BatchNorm is folded into the convolution
    before it, which saves a pass over its maps. Linear layers are shared with `model`.

    What it gives differs by rounding alone.
    """
    shared = {id(m): m for m in model.modules() if isinstance(m, Linear)}
    model = copy.deepcopy(model, shared).eval()
    for layers in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        for i, (conv, norm) in enumerate(itertools.pairwise(list(layers))):
            if isinstance(norm, nn.BatchNorm2d):
                assert isinstance(conv, nn.Conv2d | nn.ConvTranspose2d)
                transposed = isinstance(conv, nn.ConvTranspose2d)
                layers[i], layers[i + 1] = fuse_conv_bn_eval(conv, norm, transposed), nn.Identity()
    return model.eval()


MODEL_CLASSES: dict[str, type[UNet | ReversedAutoencoder]] = {
    "unet": UNet, "reversed_ae": ReversedAutoencoder}


# ----------------------------------------------------------------------------------------------
# Objectives: what the network sees, and what it is asked for

# Share of a training batch on which U-Net's skip-free decoder is trained too.
SKIP_FREE_SHARE = 0.25


class Draws:
    """Random numbers for the images of a batch, or for one rank's slice of a global batch.

    Numbers are drawn on the CPU for all `total` images, and those of images start..start+count-1
    are given: so an image meets the same ones on every device and on any number of ranks.
    """

    def __init__(self, generator: torch.Generator, count: int, start: int = 0,
                 total: int | None = None) -> None:
        self.generator, self.total = generator, count if total is None else total
        self.rows = slice(start, start + count)

    def rand(self, *shape: int) -> Tensor:
        """Uniform in [0,1), float [count, *shape]."""
        return torch.rand((self.total, *shape), generator=self.generator)[self.rows]

    def randn(self, *shape: int) -> Tensor:
        """Standard normal, float [count, *shape]."""
        return torch.randn((self.total, *shape), generator=self.generator)[self.rows]

    def randint(self, high: int, *shape: int) -> Tensor:
        """Uniform in 0..high-1, int64 [count, *shape]."""
        return torch.randint(high, (self.total, *shape), generator=self.generator)[self.rows]


def coarse_noise(images: Tensor, draws: Draws) -> Tensor:
    """Zero-mean noise on a coarse grid, smoothly enlarged: [B,1,H,W] like `images`.

    After Kascenas et al., MIDL 2022 (section 3): noise must be coarse, since a network can
    remove pixel noise without knowing any anatomy. Here every image draws its own standard
    deviation, uniform in 0-0.25, and its own grid of 4, 8, 16 or 32 cells a side.
    """
    H, W = images.shape[2:]
    choice = draws.randint(4, 1, 1, 1)
    strength = draws.rand(1, 1, 1) * 0.25
    noise = torch.zeros_like(images)
    for i, cells in enumerate((4, 8, 16, 32)):
        grid = draws.randn(1, cells, cells)
        grid = (grid * strength * (choice == i)).to(images.device)
        # Continued round the edges, so that rolling leaves no seam.
        grid = F.pad(grid, (1, 1, 1, 1), mode="circular")
        high, wide = (round(side * (cells + 2) / cells) for side in (H, W))
        grid = F.interpolate(grid, size=(high, wide), mode="bilinear", align_corners=False)
        y, x = (high - H) // 2, (wide - W) // 2
        noise += grid[..., y : y + H, x : x + W]
    # The grid's lines must not always lie in the same place.
    shift = torch.randint(H, (2,), generator=draws.generator).tolist()
    return noise.roll(shift, dims=(2, 3))


def soft_shapes(images: Tensor, draws: Draws, count: int) -> Tensor:
    """Soft-edged blobs, `count` for each image, [B,count,H,W] in [0,1] (1 inside).

    Radii of 4-30 % of the image side, stretched, turned, and with lobes: the distance from the
    centre is changed by smooth noise, so that no outline is an ellipse. An edge falls from 0.73
    to 0.27 over 2-10 % of the side: harder ones would be found by the edge alone.
    """
    H, W = images.shape[2:]

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * draws.rand(count, 1, 1)).to(images.device)

    y = (torch.arange(H, device=images.device)[:, None] + 0.5) / H - uniform(0.05, 0.95)
    x = (torch.arange(W, device=images.device) + 0.5) / W - uniform(0.05, 0.95)
    angle = uniform(0, math.pi)
    radius_u, radius_v = (uniform(math.log(0.04), math.log(0.3)).exp() for _ in range(2))
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    distance = ((u / radius_u).square() + (v / radius_v).square()).sqrt()
    distance = distance + uniform(0, 0.6) * smooth_noise(images, draws, count, 6)
    edge = uniform(0.01, 0.05) / torch.minimum(radius_u, radius_v)
    return torch.sigmoid((1 - distance) / edge)


def smooth_noise(images: Tensor, draws: Draws, count: int, cells: int) -> Tensor:
    """Standard normal numbers on a grid of cells x cells, enlarged to [B,count,H,W]."""
    grid = draws.randn(count, cells, cells).to(images.device)
    return F.interpolate(grid, size=images.shape[2:], mode="bilinear", align_corners=False)


def add_opacities(images: Tensor, draws: Draws) -> Tensor:
    """One to three bright or dark opacities on 70 % of the images, smooth or grainy.

    Each hides some of the detail beneath, up to all, as fluid in a lung hides its vessels.
    """
    count = 3
    shapes = soft_shapes(images, draws, count)
    there = draws.rand(count, 1, 1) < 0.5
    there[:, 0] = True
    there &= draws.rand(1, 1, 1) < 0.7
    strength = (0.08 + 0.42 * draws.rand(count, 1, 1)) * there
    strength = strength * torch.where(draws.rand(count, 1, 1) < 0.65, 1, -1)  # bright more often
    texture = smooth_noise(images, draws, count, max(4, images.shape[-1] // 4))
    texture = 1 + draws.rand(count, 1, 1).to(images.device) * texture
    veils = (draws.rand(count, 1, 1) * there).to(images.device) * shapes
    hidden = 1 - (1 - veils).prod(1, keepdim=True)
    images = images + hidden * (box_filter(images, window(1 / 8, images.shape[-1])) - images)
    return images + (strength.to(images.device) * shapes * texture).sum(1, keepdim=True)


def add_foreign_patch(images: Tensor, draws: Draws, clean: Tensor) -> Tensor:
    """A piece of another image of the batch, shifted, perhaps flipped, on half of the images.

    clean: where pieces are taken from, [B,1,H,W]. One image alone gets none.
    """
    B = len(images)
    shape = soft_shapes(images, draws, 1)
    blend = (0.4 + 0.6 * draws.rand(1, 1, 1)) * (draws.rand(1, 1, 1) < 0.5)
    offset, flip = draws.rand(), torch.where(draws.rand(2) < 0.5, 1.0, -1.0)
    shift = draws.rand(2) - 0.5  # in half sides: up to a quarter of the side
    if B == 1:
        return images
    partner = (torch.arange(B) + 1 + (offset * (B - 1)).long()) % B
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = flip[:, 0], flip[:, 1], shift
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    patch = F.grid_sample(clean[partner.to(images.device)], grid, padding_mode="reflection",
                          align_corners=False)
    return images + blend.to(images.device) * shape * (patch - images)


def corrupt(images: Tensor, objective: str, draws: Draws) -> Tensor:
    """What the network sees of clean images [B,1,H,W] under the objective; same shape, in [0,1].

    heal composes the corruptions: with only one kind in an image a network learns to look for
    the kind rather than for what a normal image looks like.
    """
    if objective == "plain":
        return images
    seen = images
    if objective == "heal":
        seen = add_lesions(images, draws)
    return (seen + coarse_noise(images, draws)).clamp(0, 1)


def add_lesions(images: Tensor, draws: Draws) -> Tensor:
    """Foreign patches and opacities on images [B,1,H,W]; same shape, may leave [0,1]."""
    return add_opacities(add_foreign_patch(images, draws, images), draws)


def objective_loss(model: Any, inputs: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error against the clean images, averaged over the model's reconstructions.

    inputs: what the model sees, [B,1,H,W]; images: the same, clean. The loss is computed in fp32
    whatever the network's precision.
    """
    views = model.reconstructions(inputs, SKIP_FREE_SHARE)
    return torch.stack([F.l1_loss(view.float(), images[: len(view)]) for view in views]).mean()


# ----------------------------------------------------------------------------------------------
# Scorers: from input and reconstruction to an anomaly map and an anomaly score

SCORERS = {
    "fused": "peak, texture, haze and trace, each in standard deviations of normal images",
    "zscore": "residual, low-passed at three scales, as per-pixel z-score among training normals",
    "peak": "the largest 0.3 % of zscore's pixels",
    "texture": "local contrast of image and reconstruction, their log ratio as such a z-score",
    "haze": "local contrast that the image lacks, as z-score among training normals; no model",
    "trace": "local contrast of the reconstruction, along the trace that drawn lesions leave in it",
    "features": "Mahalanobis distance of encoder maps' means and deviations from training normals",
    "mse": "squared residual",
    "mae": "absolute residual",
    "ssim": "1 - structural similarity",
}
DEFAULT_SCORER = "fused"
# What `fused` adds up: what is focal; what is diffuse; what hides detail, as disease does that more
# often than it adds any; and what lesions leave in reconstructions. `features` is no part of it, as
# it gives way most to what is no disease, such as another exposure.
FUSED = ("peak", "texture", "haze", "trace")
OWN_MAP = ("texture", "haze", "mse", "mae", "ssim")  # the other scorers show the zscore map
# Sides of windows, as shares of the image side: of the low-passed residual, of local contrast.
SCALES, TEXTURE_SCALES = (1 / 32, 1 / 16, 1 / 8), (1 / 16, 1 / 8)
# Where a patient lies in the frame is no disease. An image is also scored moved, down and right by
# those of these shares of the side that make it most like a normal one.
FRAMINGS = tuple(itertools.product((0, -0.05, 0.05, -0.1, 0.1), repeat=2))


def map_name(scorer: str) -> str:
    """What the map shows that goes with a scorer."""
    return scorer if scorer in OWN_MAP else "zscore"


@dataclass(frozen=True)
class Reading:
    """What a model makes of a batch of images: all that the scorers look at. fp32."""

    images: Tensor  # [B,1,H,W] in [0,1]
    views: Tensor  # [B,V,H,W] in [0,1]: every reconstruction the model gives
    features: Tensor  # [B,F], mean and deviation of the encoder's maps of two levels

    @property
    def reconstruction(self) -> Tensor:
        """The model's first view, [B,1,H,W]."""
        return self.views[:, :1]

    @cached_property
    def log_contrasts(self) -> list[Tensor]:
        """log_contrast of the images and of each view, [B,1+V,H,W], for each of TEXTURE_SCALES."""
        both = torch.cat([self.images, self.views], dim=1)
        return [log_contrast(both, scale) for scale in TEXTURE_SCALES]

    def first(self, count: int) -> "Reading":
        """Of the first so many images."""
        return Reading(self.images[:count], self.views[:count], self.features[:count])

    @staticmethod
    def joined(parts: list["Reading"]) -> "Reading":
        """Of the images of all parts, in order."""
        return Reading(torch.cat([part.images for part in parts]),
                       torch.cat([part.views for part in parts]),
                       torch.cat([part.features for part in parts]))


def read(model: Any, images: Tensor) -> Reading:
    """The Reading of images [B,1,H,W]; the encoder runs once."""
    maps = model.features(images)
    # The finest level knows edges alone; the deeper ones heed where things lie more than what
    # they are, and so how a film is framed.
    pooled = [each for m in maps[1:3] for each in mean_and_deviation(m.float().flatten(2))]
    return Reading(images, torch.cat(model.from_features(maps), dim=1).float(),
                   torch.cat(pooled, dim=1))


def mean_and_deviation(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n - 1) over the pixels of maps [B,C,N], both [B,C].

    Tensor.std takes four times as long on a CPU.
    """
    mean = maps.mean(2)
    away = torch.linalg.vector_norm(maps - mean[..., None], dim=2)
    return mean, away / math.sqrt(maps.shape[2] - 1)


def window(share: float, size: int) -> int:
    """About that share of an image's side, as an odd number of pixels."""
    return 2 * round(share * size / 2) + 1


def box_filter(maps: Tensor, side: int) -> Tensor:
    """Mean over a side x side window (side odd); at the border over what lies inside."""

    def along(length: int) -> Tensor:
        place = torch.arange(length, device=maps.device)
        inside = ((place[:, None] - place).abs() <= side // 2).to(maps.dtype)
        return inside / inside.sum(1, keepdim=True)

    return filtered(maps, along)


def filtered(maps: Tensor, along: Callable[[int], Tensor]) -> Tensor:
    """Maps [B,C,H,W] filtered along columns and rows by the matrices along(H) and along(W).

    As products: on a CPU two to six times as fast as pooling with large windows.
    """
    with no_autocast(maps.device):
        return along(maps.shape[2]) @ (maps @ along(maps.shape[3]).T)


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity at every pixel, [B,1,H,W] in [-1,1], for images in [0,1].

    Wang et al. 2004: 11x11 Gaussian window of standard deviation 1.5, K1 = 0.01, K2 = 0.03;
    borders are mirrored so that the map has the image's size.
    """

    def bell(length: int) -> Tensor:
        place = torch.arange(-5, 6, device=a.device, dtype=a.dtype)
        weights = torch.exp(-place.square() / (2 * 1.5**2))
        every = torch.eye(length, device=a.device, dtype=a.dtype)
        mirrored = F.pad(every[:, None], (5, 5), mode="reflect")[:, 0]
        return (mirrored.unfold(1, length, 1) * (weights / weights.sum())[:, None]).sum(1).T

    # Less the mean: where an image is smooth, a variance as the difference of two squares is
    # little but rounding.
    mean_a, mean_b = (x.mean((2, 3), keepdim=True) for x in (a, b))
    a, b = a - mean_a, b - mean_b
    blurred = filtered(torch.cat([a, b, a * a + b * b, a * b], dim=1), bell)
    mu_a, mu_b, squares, product = blurred.split(1, dim=1)
    variances, cov = squares - mu_a**2 - mu_b**2, product - mu_a * mu_b
    mu_a, mu_b = mu_a + mean_a, mu_b + mean_b
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mu_a * mu_b + c1) * (2 * cov + c2)) / (
        (mu_a**2 + mu_b**2 + c1) * (variances + c2)
    )


class AnomalyScorer:
    """Reads what a model makes of images: anomaly maps, scores, and what is normal for both.

    Calibrated on normal images alone. Training normals give their mean, mean and standard deviation
    of Z_MAPS at every pixel and the features' Gaussian; some of them, with lesions drawn on, the
    trace that these leave, if they do (`add` for each batch, then `finish`). Validation normals
    give what scores are standardised by and what thresholds and percentiles refer to (`refer_to`).
    An image's own scores are the `lower` of those of two Readings, the second in the `framing` in
    which it is most like normal ones: `train.score_evenly` does both.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # of each of Z_MAPS, and of squares: float64 [2,C,H,W]
        self._images = torch.zeros((), dtype=torch.float64)  # their sum, [1,H,W]
        self._features: list[Tensor] = []
        self._regions: list[Tensor] = []  # regional_contrast, and how lesions change it
        self._changes: list[Tensor] = []
        self.normal_scores: dict[str, Tensor] = {}  # scorer -> sorted float64 [n]

    def add(self, reading: Reading, lesioned: Reading | None = None) -> None:
        """Take in what the model makes of a batch of training normals.

        lesioned: what it makes of the same images with lesions drawn on; some batches need it.
        """
        for name, (measure, *_) in Z_MAPS.items():
            maps = measure(reading).cpu().double()  # MPS has no float64
            sums = torch.stack([maps.sum(0), maps.square().sum(0)])
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        self._images = self._images + reading.images.cpu().double().sum(0)
        self._features.append(reading.features.cpu().double())
        self._regions.append(regional_contrast(reading))
        if lesioned is not None:
            self._changes.append(regional_contrast(lesioned) - self._regions[-1])

    def finish(self) -> None:
        """Turn what was added into means, deviations, the features' Gaussian and the trace."""
        features = torch.cat(self._features)
        self.count = len(features)
        self.mean_image = (self._images / self.count).float()
        self.mean, self.std = {}, {}  # of each of Z_MAPS: [C,H,W], C = views x scales
        for name, (_, floor, around) in Z_MAPS.items():
            size = self._sums[name].shape[-1]
            mean, squares = box_filter(self._sums[name] / self.count, window(around, size))
            variance = (squares - mean**2).clamp(min=0)
            # A pixel's own variance over a few hundred images is rough: smoothed over neighbours.
            # The floor keeps pixels that never vary from ruling the score.
            self.mean[name] = mean.float()
            smooth = box_filter(variance[None], window(1 / 32, size))[0]
            self.std[name] = smooth.sqrt().clamp(min=floor).float()
        self.feature_mean, self.whitening = gaussian(features)
        regions = torch.cat(self._regions)
        self.region_mean = regions.mean(0)
        away = regions - self.region_mean
        # As in Z_MAPS a region varies by 5 % at least: no network that draws the same every time
        # must make much of nothing.
        covariance = away.T @ away / self.count + 0.05**2 * torch.eye(away.shape[1])
        changes = torch.cat(self._changes)
        self.trace = torch.linalg.solve(covariance, changes.mean(0))
        # Where lesions leave no trace, a direction would be made of chance. Along it the count
        # times mean^2 / variance is Hotelling's T^2 at most, which chance alone leaves under 21.7
        # in 99 cases of 100 (chi-squared, nine degrees of freedom). Of one image it is NaN.
        along = changes @ self.trace
        if not len(along) * along.mean() ** 2 > 21.7 * along.var():
            self.trace = torch.zeros_like(self.trace)
        self._sums, self._features, self._regions, self._changes = {}, [], [], []
        self._images = torch.zeros((), dtype=torch.float64)

    def anomaly_map(self, scorer: str, reading: Reading, z: Tensor | None = None) -> Tensor:
        """How abnormal each pixel looks, [B,1,H,W], at least 0.

        z: `self.z("zscore", reading)`, where it is there already.
        """
        if scorer not in SCORERS:
            raise UserError(f"--scorer {scorer}: not one of {', '.join(SCORERS)}")
        x, y = reading.images, reading.reconstruction
        if scorer == "mse":
            return (x - y).square()
        if scorer == "mae":
            return (x - y).abs()
        if scorer == "ssim":
            return 1 - ssim_map(x, y)
        if scorer == "texture":
            return self.z("texture", reading).abs().mean(1, keepdim=True)
        if scorer == "haze":
            return self.z("haze", reading).neg().clamp(min=0).mean(1, keepdim=True)
        z = self.z("zscore", reading) if z is None else z
        # The root mean square over scales, views and a window shows where a lesion lies better
        # than the mean that the score takes; as a score it is no better.
        side = window(SCALES[0], z.shape[-1])
        return box_filter(z.square().mean(1, keepdim=True), side).sqrt()

    def framing(self, images: Tensor) -> Tensor:
        """How many pixels down and right each of images [B,1,H,W] is to be moved to be most like
        the mean of the training normals, by Pearson's correlation: one of FRAMINGS, int64 [B,2].

        It goes by the image alone, and so is the same for every model and precision.
        """
        side, normal = images.shape[-1], self.mean_image.to(images.device)
        shifts = [[round(share * side) for share in framing] for framing in FRAMINGS]
        border = max(map(max, shifts))
        wide = F.pad(images, (border, border, border, border), mode="replicate")
        every = torch.stack([wide[..., border - down :, border - right :][..., :side, :side]
                             for down, right in shifts])  # [25,B,1,H,W]
        every = every - every.mean((3, 4), keepdim=True)
        spread = every.square().mean((2, 3, 4)).sqrt().clamp(min=1e-6)
        alike = (every * (normal - normal.mean())).mean((2, 3, 4)) / spread
        return torch.tensor(shifts, device=images.device)[alike.argmax(0)]

    def z(self, name: str, reading: Reading) -> Tensor:
        """One of Z_MAPS in standard deviations of training normals, [B,views x scales,H,W]."""
        measure, *_ = Z_MAPS[name]
        x = reading.images
        return (measure(reading) - self.mean[name].to(x.device)) / self.std[name].to(x.device)

    def scores(self, reading: Reading, z: Tensor | None = None) -> dict[str, Tensor]:
        """Anomaly scores by every scorer, float64 [B] on the CPU; fused only after refer_to.

        z: `self.z("zscore", reading)`, where it is there already.
        """
        z = (self.z("zscore", reading) if z is None else z).abs().mean(1).flatten(1)
        scores = {
            "zscore": z.mean(1),
            "peak": z.topk(max(1, round(0.003 * z.shape[1])), dim=1).values.mean(1),
            "haze": -self.z("haze", reading).mean((1, 2, 3)),
        }
        for name in OWN_MAP:
            if name not in scores:
                scores[name] = self.anomaly_map(name, reading).mean((1, 2, 3))
        scores = {name: value.cpu().double() for name, value in scores.items()}
        away = reading.features.cpu().double() - self.feature_mean
        # Row by row: a product of matrices rounds differently for batches of different sizes.
        white = torch.stack([row @ self.whitening for row in away])
        scores["features"] = white.square().mean(1).sqrt()
        regions = regional_contrast(reading) - self.region_mean
        scores["trace"] = torch.stack([(row * self.trace).sum() for row in regions])
        return self._fuse(scores) if self.normal_scores else scores

    def lower(self, one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
        """The lower of two `scores` of the same images, by every scorer; fused from these."""
        scores = {name: torch.minimum(one[name], other[name]) for name in one if name != "fused"}
        return self._fuse(scores) if self.normal_scores else scores

    def _fuse(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """The scores with the fused one added, in the order of SCORERS."""
        fused = torch.zeros((), dtype=torch.float64)
        for name in FUSED:
            normal = self.normal_scores[name]
            deviation = normal.std(correction=0).clamp(min=1e-9)
            away = (scores[name] - normal.mean()) / deviation
            # Softened at zero (softplus): what is unusual to one part is not made up for by
            # another. One by one: the last few of a tensor may be rounded differently.
            soft = [max(x, 0.0) + math.log1p(math.exp(-abs(x))) for x in away.tolist()]
            fused = fused + torch.tensor(soft, dtype=torch.float64)
        scores = scores | {"fused": fused / len(FUSED)}
        return {name: scores[name] for name in SCORERS}

    def refer_to(self, normals: list[dict[str, Tensor]]) -> None:
        """Take the `scores` of all batches of validation normals as what is normal."""
        scores = {name: torch.cat([s[name] for s in normals]) for name in normals[0]}
        self.normal_scores = {name: value.sort().values for name, value in scores.items()}
        self.normal_scores["fused"] = self._fuse(scores)["fused"].sort().values

    def threshold(self, scorer: str, specificity: float) -> float:
        """The score at or under which that share of the validation normals lie."""
        return float(torch.quantile(self.normal_scores[scorer], specificity,
                                    interpolation="higher"))

    def percentile(self, scorer: str, scores: Tensor) -> Tensor:
        """Share of validation normals with a smaller or equal score, in percent, [B]."""
        normal = self.normal_scores[scorer]
        return 100 * torch.searchsorted(normal, scores.double(), right=True) / len(normal)

    def state_dict(self) -> dict[str, object]:
        """Everything calibrated, as tensors and plain numbers."""
        return {name: getattr(self, name) for name in CALIBRATED}

    def load_state_dict(self, state: dict) -> None:
        for name in CALIBRATED:
            setattr(self, name, state[name])


CALIBRATED = ("count", "mean", "std", "mean_image", "feature_mean", "whitening", "region_mean",
              "trace", "normal_scores")


def moved(maps: Tensor, shift: Tensor) -> Tensor:
    """Maps [B,C,H,W] moved by so many pixels down and right, int64 [B,2].

    What comes in from outside repeats the edge, as in training.
    """
    _, C, H, W = maps.shape
    rows, columns = ((torch.arange(length, device=maps.device) - by[:, None]).clamp(0, length - 1)
                     for length, by in ((H, shift[:, 0]), (W, shift[:, 1])))
    maps = maps.gather(2, rows[:, None, :, None].expand(-1, C, -1, W))
    return maps.gather(3, columns[:, None, None].expand(-1, C, H, -1))


def low_passed(reading: Reading) -> Tensor:
    """The residuals of all views, each exposed like the image, through windows of each of SCALES:
    [B,views x scales,H,W]."""
    residual = reading.images - exposed_like(reading.images, reading.views)
    sides = (window(scale, residual.shape[-1]) for scale in SCALES)
    return torch.cat([box_filter(residual, side) for side in sides], dim=1)


def texture(reading: Reading) -> Tensor:
    """Log ratio of local contrast, the standard deviation in windows of each of TEXTURE_SCALES,
    between the images and each view: [B,views x scales,H,W].

    What is hazy or blurred loses contrast where a reconstruction, which has learnt what belongs
    there, keeps it; residuals, which mean grey values, hardly see it. As the reconstruction
    follows its image, much of where a film lies in the frame and how it was exposed cancels out.
    """
    return torch.cat([log[:, :1] - log[:, 1:] for log in reading.log_contrasts], dim=1)


def contrast(reading: Reading) -> Tensor:
    """Logarithm of the images' local contrast, in windows as for texture: [B,scales,H,W].

    Of the images alone: a reconstruction may follow its film in haze, and so hide it.
    """
    return torch.cat([log[:, :1] for log in reading.log_contrasts], dim=1)


def log_contrast(maps: Tensor, scale: float) -> Tensor:
    """Logarithm of local contrast: of the standard deviation of maps [B,C,H,W] in windows of that
    share of the side; same shape."""
    maps = maps - maps.mean((2, 3), keepdim=True)  # of squares of small numbers less is lost
    side = window(scale, maps.shape[-1])
    squares, means = box_filter(torch.cat([maps.square(), maps]), side).chunk(2)
    variance = squares - means.square()
    return (variance.clamp(min=0).sqrt() + 1 / 255).log()  # flat areas: one grey level


def regional_contrast(reading: Reading) -> Tensor:
    """The reconstruction's log_contrast in three by three regions: float64 [B,9] on the CPU.

    Lesions, also healed ones, change it. Which way, lesions drawn on normal images show, and what
    tells that change best from how normal images differ is Fisher's linear discriminant: the
    inverse covariance of normal images times the mean change.
    """
    log = reading.log_contrasts[0][:, 1:2]
    return F.adaptive_avg_pool2d(log.cpu(), 3).flatten(1).double()  # MPS can't do uneven regions


# What is held against training normals: {scorer: (its maps, least standard deviation, window in
# which normals are looked at, as a share of the side)}. The least deviations are a grey level of
# 255, and 5 % of local contrast. Where in the frame a patient lies varies: of local contrast, what
# is usual nearby counts.
Z_MAPS = {"zscore": (low_passed, 1 / 255, 0), "texture": (texture, 0.05, 1 / 4),
          "haze": (contrast, 0.05, 1 / 4)}


def exposed_like(images: Tensor, views: Tensor) -> Tensor:
    """Views [B,V,H,W] in the brightness and contrast that bring each closest to its image
    [B,1,H,W].

    How a film was exposed is no disease. Least squares, the contrast changed by a factor of 0.5 to
    2: were there no bound, blank or inverted images would be explained away.
    """
    image, view = (x - x.mean((2, 3), keepdim=True) for x in (images, views))
    contrast = (image * view).mean((2, 3), keepdim=True) / view.square().mean(
        (2, 3), keepdim=True).clamp(min=1e-6)
    return images.mean((2, 3), keepdim=True) + contrast.clamp(0.5, 2) * view


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """(mean [F], whitening [F,F]) of features [n,F], so that (f - mean) @ whitening has unit
    covariance.

    There may be fewer images than features: the correlation matrix is drawn towards the identity
    as far as its own noise calls for (Ledoit and Wolf 2004, equations 8-14).
    """
    n, _ = features.shape
    mean = features.mean(0)
    scale = features.std(0, correction=0)
    # A channel that is silent on normal images must not shout at the first thing it hears.
    scale = scale.clamp(min=max(0.1 * float(scale.median()), 1e-6))
    x = (features - mean) / scale
    S = x.T @ x / n
    level = S.diagonal().mean()
    target = level * torch.eye(len(S), dtype=S.dtype)
    distance = (S - target).square().sum()
    noise = (x.square().sum(1).square().sum() / n - S.square().sum()) / n
    share = (noise / distance.clamp(min=1e-12)).clamp(0.01, 1)
    values, vectors = torch.linalg.eigh((1 - share) * S + share * target)
    return mean, vectors / values.clamp(min=1e-12).sqrt() / scale[:, None]
