"""Both autoencoders, what they are trained on (objectives), and what scores their output (scorers).

    from models import create_model
    model = create_model("unet")            # 54,986,305 parameters
    reconstruction = model(images)          # [B,1,128,128] in [0,1] -> the same

Every image tensor here is float [B,1,H,W] with values in [0,1]; H = W = the model's image size.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from config import Config, UserError

# ----------------------------------------------------------------------------------------------
# Device, precision, processes


@dataclass(frozen=True)
class Setup:
    """Where tensors are computed, in which precision, and which one of `world` processes this is.

    Each process takes its slice of every batch. Most often there is just one.
    """

    device: torch.device
    precision: str = "fp32"  # or bf16, fp16
    rank: int = 0
    world: int = 1

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context for a network's forward pass. BatchNorm's statistics stay in fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device, in the memory layout in which its convolutions are fastest."""
        if self.device.type == "cuda" or self.precision == "bf16":
            model = model.to(memory_format=torch.channels_last)
        return model.to(self.device)

    def sum(self, value: float) -> float:
        """Add up a number over all processes."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.item()

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.sum(0.0)


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """(device, why it is that one). UserError if the wanted one is not there."""
    there = {"auto": True, "cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}
    if wanted not in there:
        raise UserError(f"--device: {wanted!r} is not one of {', '.join(there)}")
    if not there[wanted]:
        raise UserError(f"--device {wanted}: PyTorch finds no {wanted.upper()} device here; use "
                        "--device auto")
    if wanted != "auto":
        return torch.device(wanted), "as asked"
    if there["cuda"]:
        return torch.device("cuda"), torch.cuda.get_device_name()
    if there["mps"]:
        return torch.device("mps"), "Apple GPU, no CUDA device"
    return torch.device("cpu"), f"no GPU found; {torch.get_num_threads()} threads"


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """("bf16", "fp16" or "fp32", why). UserError if the device cannot do the wanted one."""
    if wanted != "auto":
        try:
            with Setup(device, wanted).autocast():  # MPS refuses before PyTorch 2.5
                pass
            # On MPS before 2.8 the gradient scaler would need float64, which MPS does not have.
            old = TorchVersion(torch.__version__) < "2.8"
            refused = old and (wanted, device.type) == ("fp16", "mps")
        except RuntimeError:
            refused = True
        if refused:
            raise UserError(f"--precision {wanted}: not on {device.type} with PyTorch "
                            f"{torch.__version__}; use --precision auto")
        return wanted, "as asked"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability()
        if capability >= (8, 0):
            return "bf16", "this GPU multiplies in bf16"
        if capability >= (7, 0):
            return "fp16", "this GPU multiplies in fp16 but not in bf16"
    if device.type == "cpu":
        with contextlib.suppress(OSError):  # not Linux
            flags = set(Path("/proc/cpuinfo").read_text().split())
            if found := flags & {"amx_bf16", "avx512_bf16"}:
                return "bf16", f"this CPU has {', '.join(sorted(found))}"
    return "fp32", "nothing narrower is fast on this device"


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """The context in which nothing is cast to a narrower type on that device."""
    kind = device.type
    # MPS has none before PyTorch 2.5, and an export does not understand what changes nothing.
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def seeded(seed: int, purpose: str, step: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}:{purpose}:{step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [B,1,H,W] to float32 in [0,1] on the device."""
    return images.to(device).float().div_(255)


# ----------------------------------------------------------------------------------------------
# Networks


class Linear(nn.Linear):
    """nn.Linear that stays in fp32 on a CPU, where casting the matrix takes longer than multiplying
    a few images by it.

    If the weight has a list `factors`, its gradient is not computed: pairs (g [B,out], x [B,in])
    are put there, and the sum of g.T @ x is the gradient: for a few images far less memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        x, factors = x.to(self.weight.dtype), getattr(self.weight, "factors", None)
        with no_autocast(x.device):
            if factors is None or not torch.is_grad_enabled():
                return F.linear(x, self.weight, self.bias)
            y, seen = F.linear(x, self.weight.detach(), self.bias), x.detach()
            y.register_hook(lambda g: factors.append((g, seen)))
            return y


def conv_layer(convolution: nn.Module, channels: int) -> nn.Sequential:
    """A convolution to that many channels, with BatchNorm and ReLU."""
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def conv_block(channels_in: int, channels_out: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with BatchNorm and ReLU."""
    return nn.Sequential(*(
        conv_layer(nn.Conv2d(i, channels_out, 3, padding=1, bias=False), channels_out)
        for i in (channels_in, channels_out)))


def two_layers(size_in: int, hidden: int, size_out: int) -> nn.Sequential:
    """Two Linear layers with a ReLU between."""
    return nn.Sequential(Linear(size_in, hidden), nn.ReLU(inplace=True), Linear(hidden, size_out))


def to_image(logits: Tensor) -> Tensor:
    """The sigmoid. Its gradient is at least 0.05: pixels that the first steps drive to black or
    white would stay there otherwise."""
    image = torch.sigmoid(logits)
    return image + 0.05 * (logits - logits.detach()) if logits.requires_grad else image


class UNet(nn.Module):
    """U-Net with a fully connected bottleneck and two decoders over one encoder.

    The decoder with skip connections gives the first reconstruction. The second decoder sees the
    latent alone, and so cannot copy its input. The levels have 1, 2, 4, 8 and 8 times `width`
    channels.
    """

    epochs = 10  # by default; see docs/results.md
    multiple = 16  # the image side is a multiple of this, at least twice it
    cpu_micro_batch = 8  # on a CPU more images at a time gain no speed, and take memory

    def __init__(self, image_size: int = 128, latent_dim: int = 512, width: int = 64) -> None:
        super().__init__()
        w = width
        self.image_size, self.bottom = image_size, (8 * w, image_size // 16, image_size // 16)
        flat = 8 * w * (image_size // 16) ** 2
        widths = (w, 2 * w, 4 * w, 8 * w, 8 * w)
        self.down = nn.ModuleList(map(conv_block, (1, *widths), widths))
        self.to_latent = Linear(flat, latent_dim)
        self.from_latent = Linear(latent_dim, flat)
        # Each level joins the upsampled map with the encoder's map of that level.
        self.up = nn.ModuleList(map(
            conv_block, (16 * w, 8 * w, 4 * w, 2 * w), (4 * w, 2 * w, w, w)))
        self.skip_free_up = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(i, o, 2, stride=2), conv_block(o, o))
            for i, o in ((8 * w, 8 * w), (8 * w, 4 * w), (4 * w, 2 * w), (2 * w, w)))
        self.out = nn.Conv2d(w, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction [B,1,H,W] by the decoder with skip connections."""
        return self.reconstructions(x)[0]

    def reconstructions(self, x: Tensor) -> list[Tensor]:
        """Both reconstructions from one pass of the encoder: with skips, and skip-free."""
        maps = [self.down[0](x)]  # finest first: [B,w,H,W] ... [B,8w,H/16,W/16]
        for block in self.down[1:]:
            maps.append(block(F.max_pool2d(maps[-1], 2)))
        *skips, bottom = maps
        y = bottom = self.from_latent(self.to_latent(bottom.flatten(1))).view(-1, *self.bottom)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            # Autocast on a CPU would enlarge in fp32, and join both maps in it.
            with no_autocast(y.device):
                y = F.interpolate(y.to(skip.dtype), scale_factor=2, mode="bilinear",
                                  align_corners=False)
                # The gradient of a part of the joined map has gaps. With these the gradient of
                # enlarging would take ten times as long.
                if y.requires_grad:
                    y.register_hook(lambda g: g.contiguous(memory_format=torch.channels_last))
                y = torch.cat([skip, y], dim=1)
            y = block(y)
        z = bottom
        for block in self.skip_free_up:
            z = block(z)
        return [to_image(self.out(y)), to_image(self.out(z))]


class ReversedAutoencoder(nn.Module):
    """Asymmetric autoencoder without skip connections (after Bercea et al., MIDL 2023).

    Strided convolutions and two Linear layers lead down to the latent, two Linear layers and
    three transposed convolutions back up. The reversed-embedding term of that paper (the encoder
    run once more, on the reconstruction) is not part of the training: it changed no score. The
    encoder's levels have 1, 2, 4 and 8 times `width` channels.
    """

    epochs, multiple = 20, 8
    cpu_micro_batch = 16  # its activations are few, and every part reads a gigabyte of weights

    def __init__(self, image_size: int = 128, latent_dim: int = 512, width: int = 64) -> None:
        super().__init__()
        w = width
        self.image_size, self.bottom = image_size, (8 * w, image_size // 8, image_size // 8)
        flat, hidden = 8 * w * (image_size // 8) ** 2, 2 * latent_dim
        self.down = nn.ModuleList(
            conv_layer(nn.Conv2d(i, o, 3, stride=stride, padding=1, bias=False), o)
            for i, o, stride in ((1, w, 1), (w, 2 * w, 2), (2 * w, 4 * w, 2), (4 * w, 8 * w, 2)))
        self.to_latent = two_layers(flat, hidden, latent_dim)
        self.from_latent = two_layers(latent_dim, hidden, flat)
        self.up = nn.ModuleList(
            conv_layer(nn.ConvTranspose2d(i, o, 3, stride=2, padding=1, output_padding=1,
                                          bias=False), o)
            for i, o in ((8 * w, 4 * w), (4 * w, 2 * w), (2 * w, w)))
        self.out = nn.Conv2d(w, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction [B,1,H,W]."""
        for block in self.down:
            x = block(x)
        y = self.from_latent(self.to_latent(x.flatten(1))).view(-1, *self.bottom)
        for block in self.up:
            y = block(y)
        return to_image(self.out(y))

    def reconstructions(self, x: Tensor) -> list[Tensor]:
        """[forward(x)]: the one that this model gives, in the form that U-Net gives its two."""
        return [self.forward(x)]


def create_model(name: str, config: Config | None = None) -> UNet | ReversedAutoencoder:
    """The model called `unet` or `reversed_ae`, freshly initialised, on the CPU.

    Sizes come from the config (default: Config()). Initial weights follow torch's global seed.
    """
    config = config or Config()
    if name not in MODEL_CLASSES:
        raise UserError(f"model {name!r}: not one of {', '.join(MODEL_CLASSES)}")
    kind, side = MODEL_CLASSES[name], config.image_size
    if side % kind.multiple or side < 2 * kind.multiple:
        raise UserError(f"--image-size {side}: {name} needs a multiple of {kind.multiple}, at "
                        f"least {2 * kind.multiple}")
    return kind(side, config.latent_dim, config.width)


def untrained_model(config: Config, setup: Setup) -> Any:
    """The model that training with these settings starts from, on the device."""
    torch.manual_seed(config.seed)
    return setup.place(create_model(config.model, config))


MODEL_CLASSES: dict[str, type[UNet | ReversedAutoencoder]] = {
    "unet": UNet, "reversed_ae": ReversedAutoencoder}


# ----------------------------------------------------------------------------------------------
# Objectives: what the network sees, and what it is asked for


class Draws:
    """Random numbers for the images of a batch, or for one rank's slice of a global batch.

    They are drawn on the CPU for all `total` images, and those of images start..start+count-1 are
    given, [count, *shape]: so an image meets the same ones on every device and any number of ranks.
    """

    def __init__(self, generator: torch.Generator, count: int, start: int = 0,
                 total: int | None = None) -> None:
        self.generator, self.total = generator, count if total is None else total
        self.rows = slice(start, start + count)

    def rand(self, *shape: int) -> Tensor:
        """Uniform in [0,1), float."""
        return torch.rand((self.total, *shape), generator=self.generator)[self.rows]

    def uniform(self, images: Tensor, low: float, high: float, count: int = 1) -> Tensor:
        """Uniform in [low,high), [B,count,1,1] on the device of the images [B,...]."""
        return (low + (high - low) * self.rand(count, 1, 1)).to(images.device)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal, float."""
        return torch.randn((self.total, *shape), generator=self.generator)[self.rows]


def augment(images: Tensor, draws: Draws) -> Tensor:
    """Each image [B,1,H,W] turned by up to 10 degrees, shifted and scaled by up to 10 %, in another
    brightness (0.05) and contrast (10 %). What comes in from outside repeats the edge. Not
    mirrored: where the heart lies is part of what is normal."""
    B = len(images)

    def uniform(spread: float) -> Tensor:
        return (draws.rand() * 2 - 1) * spread

    angle, zoom = uniform(math.radians(10)), 1 + uniform(0.1)
    dx, dy = uniform(0.2), uniform(0.2)  # grid coordinates span 2: 10 % of the side
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(B, 2, 3).to(images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    edge = 1 - 1 / images.shape[-1]  # border padding, which MPS does not have
    images = F.grid_sample(images, grid.clamp(-edge, edge), align_corners=False)
    contrast = (1 + uniform(0.1)).view(B, 1, 1, 1).to(images.device)
    brightness = uniform(0.05).view(B, 1, 1, 1).to(images.device)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return ((images - mean) * contrast + mean + brightness).clamp_(0, 1)


def coarse_noise(images: Tensor, draws: Draws) -> Tensor:
    """Zero-mean noise on a coarse grid, smoothly enlarged: [B,1,H,W] like `images`.

    After Kascenas et al., MIDL 2022 (section 3): pixel noise can be removed without knowing any
    anatomy. Every image has its own standard deviation, uniform in 0-0.25, and its own grid of 4,
    8, 16 or 32 cells a side.
    """
    H, W = images.shape[2:]
    choice = torch.randint(4, (draws.total, 1, 1, 1), generator=draws.generator)[draws.rows]
    strength = draws.rand(1, 1, 1) * 0.25
    noise = torch.zeros_like(images)
    for i, cells in enumerate((4, 8, 16, 32)):
        grid = (draws.randn(1, cells, cells) * strength * (choice == i)).to(images.device)
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

    Radii of 4-30 % of the image side, stretched, turned, and with lobes by smooth noise, so that no
    outline is an ellipse. An edge falls from 0.73 to 0.27 over 2-10 % of the side: harder ones
    would be found by the edge alone.
    """
    place = (torch.arange(images.shape[-1], device=images.device) + 0.5) / images.shape[-1]
    y = place[:, None] - draws.uniform(images, 0.05, 0.95, count)
    x = place - draws.uniform(images, 0.05, 0.95, count)
    angle = draws.uniform(images, 0, math.pi, count)
    radius_u, radius_v = (
        draws.uniform(images, math.log(0.04), math.log(0.3), count).exp() for _ in range(2))
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    distance = ((u / radius_u).square() + (v / radius_v).square()).sqrt()
    uneven = draws.uniform(images, 0, 0.6, count)
    distance = distance + uneven * smooth_noise(images, draws, count, 6)
    edge = draws.uniform(images, 0.01, 0.05, count) / torch.minimum(radius_u, radius_v)
    return torch.sigmoid((1 - distance) / edge)


def smooth_noise(images: Tensor, draws: Draws, count: int, cells: int) -> Tensor:
    """Standard normal numbers on a grid of cells x cells, enlarged to [B,count,H,W]."""
    grid = draws.randn(count, cells, cells).to(images.device)
    return F.interpolate(grid, size=images.shape[2:], mode="bilinear", align_corners=False)


def add_opacities(images: Tensor, draws: Draws) -> Tensor:
    """One to three bright or dark opacities on 70 % of the images, smooth or grainy. Each hides
    some of the detail beneath, up to all, as fluid in a lung hides its vessels."""
    count, device = 3, images.device
    shapes = soft_shapes(images, draws, count)
    there = draws.rand(count, 1, 1) < torch.tensor([1, 0.5, 0.5]).view(count, 1, 1)
    there &= draws.rand(1, 1, 1) < 0.7
    strength = (0.08 + 0.42 * draws.rand(count, 1, 1)) * there
    strength = strength * torch.where(draws.rand(count, 1, 1) < 0.65, 1, -1)  # bright more often
    texture = smooth_noise(images, draws, count, max(4, images.shape[-1] // 4))
    texture = 1 + draws.rand(count, 1, 1).to(device) * texture
    hidden = 1 - (1 - (draws.rand(count, 1, 1) * there).to(device) * shapes).prod(1, keepdim=True)
    images = images + hidden * (box_filter(images, 1 / 8) - images)
    return images + (strength.to(device) * shapes * texture).sum(1, keepdim=True)


def add_foreign_patch(images: Tensor, draws: Draws) -> Tensor:
    """A piece of another of the images [B,1,H,W], shifted, perhaps flipped, on half of them. One
    image alone gets none."""
    B, device = len(images), images.device
    shape = soft_shapes(images, draws, 1)
    blend = (0.4 + 0.6 * draws.rand(1, 1, 1)) * (draws.rand(1, 1, 1) < 0.5)
    offset, flip = draws.rand(), torch.where(draws.rand(2) < 0.5, 1.0, -1.0)
    shift = draws.rand(2) - 0.5  # in half sides: up to a quarter of the side
    if B == 1:
        return images
    partner = (torch.arange(B) + 1 + (offset * (B - 1)).long()) % B
    theta = torch.cat([torch.diag_embed(flip), shift[..., None]], dim=2).to(device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    patch = F.grid_sample(images[partner.to(device)], grid, padding_mode="reflection",
                          align_corners=False)
    return images + blend.to(device) * shape * (patch - images)


def corrupt(images: Tensor, objective: str, draws: Draws) -> Tensor:
    """What the network sees of clean images [B,1,H,W] under the objective; same shape, in [0,1].
    heal: lesions, then noise; denoise: noise alone; plain: nothing."""
    if objective == "plain":
        return images
    seen = add_lesions(images, draws) if objective == "heal" else images
    return (seen + coarse_noise(images, draws)).clamp(0, 1)


def add_lesions(images: Tensor, draws: Draws) -> Tensor:
    """Foreign patches, opacities and veils on images [B,1,H,W]; same shape, may leave [0,1]."""
    return add_veil(add_opacities(add_foreign_patch(images, draws), draws), draws)


def add_veil(images: Tensor, draws: Draws) -> Tensor:
    """Haze over much of an image, on two fifths of the images: detail gives way to the local mean,
    and the grey value rises. [B,1,H,W] in [0,1] to the same."""
    shape = smooth_noise(images, draws, 1, 3) - draws.uniform(images, -0.5, 1)
    shape = torch.sigmoid(4 * shape) * (draws.uniform(images, 0, 1) < 0.4)
    smooth = box_filter(images, 1 / 8)
    images = images + shape * draws.uniform(images, 0.2, 0.9) * (smooth - images)
    return images + shape * draws.uniform(images, 0, 0.25) * (1 - images)


def add_consolidation(images: Tensor, draws: Draws) -> Tensor:
    """On 70 % of the images a soft blob, 30 to 100 % of the way to the largest grey values nearby
    (of 4x4 cells, smoothly joined): lung full of fluid looks as bright as the heart. [B,1,H,W] in
    [0,1] to the same."""
    shape = soft_shapes(images, draws, 1) * (draws.uniform(images, 0, 1) < 0.7)
    bright = F.interpolate(F.adaptive_max_pool2d(images, 4), size=images.shape[2:],
                           mode="bilinear", align_corners=False)
    return images + shape * draws.uniform(images, 0.3, 1) * (bright - images)


def warp(images: Tensor, draws: Draws) -> Tensor:
    """A part of each image displaced by up to a tenth of the side, softly. [B,1,H,W] to the same.
    The lesion that readers are tested on, and that none of them is trained on."""
    shape = soft_shapes(images, draws, 1)[:, 0]
    shift = (0.1 + 0.1 * draws.rand(2)) * torch.where(draws.rand(2) < 0.5, 1.0, -1.0)
    theta = torch.eye(2, 3).expand(len(images), 2, 3).to(images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    grid = grid + shape[..., None] * shift.to(images.device)[:, None, None]
    edge = 1 - 1 / images.shape[-1]
    return F.grid_sample(images, grid.clamp(-edge, edge), align_corners=False)


def draw_lesions(images: Tensor, draws: Draws, vary: bool = True) -> tuple[Tensor, Tensor]:
    """(images with lesions drawn on, how much of a lesion each pixel holds) of normal images.

    float [B,1,H,W] in [0,1] to two of the same: what readers learn from. A fifth of the images
    stays without. vary: all are moved as in training, and blurred (3x3) or sharpened, and half of
    them get another exposure (gamma 0.7 to 1.4): these are no diseases. Where images lie and look
    all alike, only sharpness varies, half as much, and no consolidations are drawn.
    """
    if vary:
        images = augment(images, draws)
        gamma = draws.uniform(images, -1, 1) * (draws.uniform(images, 0, 1) < 0.5) * math.log(1.4)
        images = images ** gamma.exp()
    seen = add_lesions(images, draws).clamp(0, 1)
    seen = add_consolidation(seen, draws) if vary else seen
    seen = torch.where(draws.uniform(images, 0, 1) < 0.8, seen, images)
    blur = draws.uniform(images, -1, 1) / (1 if vary else 2)  # < 0: sharpened
    seen, images = (x + blur * (box_filter(x, 3) - x) for x in (seen, images))
    change = box_filter((seen - images).abs(), 1 / 16)
    return seen.clamp(0, 1), (change / LESION_CHANGE).clamp(0, 1)


def objective_loss(model: Any, inputs: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error of a model's reconstructions of inputs [B,1,H,W] against the clean
    images, averaged over the reconstructions, in fp32 whatever the network's precision."""
    views = model.reconstructions(inputs)
    return torch.stack([F.l1_loss(view.float(), images) for view in views]).mean()


# ----------------------------------------------------------------------------------------------
# Scorers: from image and reconstruction to an anomaly map and an anomaly score

SCORERS = ("reader", "zscore", "mse", "ssim")  # see docs/scoring.md
DEFAULT_SCORER = "reader"
BASELINE = "image_reader"  # a reader of the image alone: what can be found without an autoencoder
READERS = ("reader", BASELINE)
# Sides of windows, as shares of the image side: of the low-passed residual, of local contrast.
SCALES, TEXTURE_SCALES = (1 / 32, 1 / 16, 1 / 8), (1 / 16, 1 / 8)
READ_AT_ONCE = 8  # images that a trained model is shown at a time, always; see reconstruct_evenly
READER_SIDE = 64  # about the side of what a reader sees and returns; the image is pooled to it
READER_BATCH, READER_LR = 16, 3e-3
LESION_CHANGE = 0.04  # grey change, averaged in a window of 1/16, from which a pixel is all lesion

# What another device, place or hand changes in images: mean, standard deviation, share of detail
# finer than three pixels, correlation with the mean training normal.
TRAITS = ("brightness", "contrast", "sharpness", "framing")


def normals_needed(specificity: float) -> int:
    """How many normal images a threshold of that specificity takes. UserError if it is no share."""
    if not 0 < specificity < 1:
        raise UserError(f"--specificity {specificity:g}: not between 0 and 1; give a share, "
                        "such as 0.95")
    return math.ceil(round(specificity / (1 - specificity), 9))


class Output(NamedTuple):
    """A batch of images and what a model makes of it: all that the scorers look at. float32."""

    images: Tensor  # [B,1,H,W] in [0,1]
    reconstructions: Tensor  # [B,V,H,W] in [0,1]: every one that the model gives

    def first(self, count: int) -> "Output":
        """The part that belongs to the first images."""
        return Output(self.images[:count], self.reconstructions[:count])

    def seen_by(self, scorer: str) -> "Output":
        """The same with only the reconstruction that the scorer sees. `mse` and `ssim` see the
        first, the others the last: no skip connection has copied an anomaly into that one."""
        number = slice(0, 1) if scorer in ("mse", "ssim") else slice(-1, None)
        return Output(self.images, self.reconstructions[:, number])


def box_filter(maps: Tensor, side: float) -> Tensor:
    """Mean over a square window of maps [B,C,H,W]; at the border over what lies inside. side: odd
    number of pixels, or a share of the image's side, which is rounded to one."""
    if side < 1:
        side = 2 * round(side * maps.shape[-1] / 2) + 1

    def along(length: int) -> Tensor:
        place = torch.arange(length, device=maps.device)
        inside = ((place[:, None] - place).abs() <= side // 2).to(maps.dtype)
        return inside / inside.sum(1, keepdim=True)

    return filtered(maps, along)


def filtered(maps: Tensor, along: Callable[[int], Tensor]) -> Tensor:
    """Filter maps [B,C,H,W] along columns and rows by the matrices along(H) and along(W).

    As products: on a CPU two to six times as fast as pooling with large windows.
    """
    with no_autocast(maps.device):
        return along(maps.shape[2]) @ (maps @ along(maps.shape[3]).T)


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity at every pixel, [B,1,H,W] in [-1,1], for images in [0,1]. Wang et al.
    2004: 11x11 Gaussian window of standard deviation 1.5, K1 = 0.01, K2 = 0.03; borders mirrored.
    """
    def gaussian(length: int) -> Tensor:
        place = torch.arange(-5, 6, device=a.device, dtype=a.dtype)
        weights = torch.exp(-place.square() / (2 * 1.5**2))
        every = torch.eye(length, device=a.device, dtype=a.dtype)
        mirrored = F.pad(every[:, None], (5, 5), mode="reflect")[:, 0]
        return (mirrored.unfold(1, length, 1) * (weights / weights.sum())[:, None]).sum(1).T

    # Minus the mean: where an image is smooth, a variance as the difference of two squares is
    # little but rounding.
    mean_a, mean_b = (x.mean((2, 3), keepdim=True) for x in (a, b))
    a, b = a - mean_a, b - mean_b
    blurred = filtered(torch.cat([a, b, a * a + b * b, a * b], dim=1), gaussian)
    mu_a, mu_b, squares, product = blurred.split(1, dim=1)
    variances, cov = squares - mu_a**2 - mu_b**2, product - mu_a * mu_b
    mu_a, mu_b, c1, c2 = mu_a + mean_a, mu_b + mean_b, 0.01**2, 0.03**2
    return (2 * mu_a * mu_b + c1) * (2 * cov + c2) / (
        (mu_a**2 + mu_b**2 + c1) * (variances + c2))


def log_contrast(maps: Tensor, scale: float) -> Tensor:
    """Logarithm of local contrast: of the standard deviation of maps [B,C,H,W] in windows of that
    share of the side; same shape."""
    # In fp64, which MPS has not: in flat areas rounding would be most of a difference of squares.
    exact = maps if maps.device.type == "mps" else maps.double()
    exact = exact - exact.mean((2, 3), keepdim=True)
    squares, means = box_filter(torch.cat([exact.square(), exact]), scale).chunk(2)
    variance = (squares - means.square()).clamp(min=0).to(maps.dtype)
    return (variance.sqrt() + 1 / 255).log()  # flat areas: one grey level


def exposed_like(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Reconstructions [B,V,H,W] in the brightness and contrast that bring each closest (least
    squares) to its image [B,1,H,W]: another exposure is no disease. The contrast changes by a
    factor of 0.5 to 2, or blank and inverted images would be explained away."""
    image, back = (x - x.mean((2, 3), keepdim=True) for x in (images, reconstructions))
    contrast = (image * back).mean((2, 3), keepdim=True) / back.square().mean(
        (2, 3), keepdim=True).clamp(min=1e-6)
    return images.mean((2, 3), keepdim=True) + contrast.clamp(0.5, 2.0) * back


def low_passed(output: Output) -> Tensor:
    """Residuals of all reconstructions, each exposed like the image, averaged in windows of each of
    SCALES: [B,V x scales,H,W]."""
    residual = output.images - exposed_like(output.images, output.reconstructions)
    return torch.cat([box_filter(residual, scale) for scale in SCALES], dim=1)


def texture(output: Output) -> Tensor:
    """Log ratio of local contrast between the images and each reconstruction, in windows of each of
    TEXTURE_SCALES: [B,V x scales,H,W]. What is hazy or blurred loses contrast, which a
    reconstruction keeps. Residuals, which are means of grey values, hardly see this."""
    both = torch.cat([output.images, output.reconstructions], dim=1)
    logs = (log_contrast(both, scale) for scale in TEXTURE_SCALES)
    return torch.cat([log[:, :1] - log[:, 1:] for log in logs], dim=1)


# What is compared with training normals, pixel by pixel: {name: (its maps, least standard
# deviation)}. The least deviations are one grey level of 255, and 5 % of local contrast.
Z_MAPS = {"zscore": (low_passed, 1 / 255), "texture": (texture, 0.05)}


class Reader(nn.Module):
    """Tells at every place how much the image looks like one with a lesion drawn on: a small
    U-shaped network of three levels, logits [B,1,h,w] of maps [B,channels,h,w]."""

    def __init__(self, channels: int, width: int = 8) -> None:
        super().__init__()
        w = width
        self.down = nn.ModuleList(map(conv_block, (channels, w, 2 * w), (w, 2 * w, 4 * w)))
        self.up = nn.ModuleList(map(conv_block, (6 * w, 3 * w), (2 * w, w)))
        self.out = nn.Conv2d(w, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.down[0](x)]
        for block in self.down[1:]:
            skips.append(block(F.max_pool2d(skips[-1], 2)))
        y = skips.pop()
        for block in self.up:
            skip = skips.pop()
            y = F.interpolate(y, size=skip.shape[2:], mode="bilinear", align_corners=False)
            y = block(torch.cat([skip, y], dim=1))
        return self.out(y)


def pooled(maps: Tensor) -> Tensor:
    """Average maps [B,C,H,W] to a side of about READER_SIDE: by a power of two."""
    factor = 2 ** max(0, round(math.log2(maps.shape[-1] / READER_SIDE)))
    return F.avg_pool2d(maps, factor)


def train_reader(inputs: Tensor, targets: Tensor, config: Config, device: torch.device,
                 tick: Callable[[int], object]) -> Reader:
    """Train a reader to tell drawn lesions, in a fixed number of steps: none is chosen on labels.

    inputs: what it sees, [n,C,h,w]; targets [n,1,h,w] in [0,1]: how much of a lesion is there; both
    of any floating type. tick: called with 1 after each step. Binary cross-entropy, AdamW, one
    cycle of the learning rate, mirrored at random.
    """
    generator = seeded(config.seed, "reader", 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 31, (), generator=generator)))
        reader = Reader(inputs.shape[1]).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(reader.parameters(), READER_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, READER_LR, config.reader_steps)
    for _ in range(config.reader_steps):
        some = torch.randint(len(inputs), (READER_BATCH,), generator=generator)
        x, y = inputs[some].to(device).float(), targets[some].to(device).float()
        if torch.rand((), generator=generator) < 0.5:
            x, y = x.flip(3), y.flip(3)
        loss = F.binary_cross_entropy_with_logits(
            reader(x.contiguous(memory_format=torch.channels_last)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tick(1)
    return reader.eval().requires_grad_(False)


class AnomalyScorer:
    """Anomaly maps and scores, and what is normal for both.

    Training normals give the mean image, and mean and standard deviation of Z_MAPS at every pixel
    (`add` for each batch, then `finish`). Readers learn from some of them with lesions drawn on
    (`readers`, from `train_reader`). Validation normals give thresholds and percentiles
    (`refer_to`). Nothing is fitted to real anomalies.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # of what is added, and of squares: float64 [2,C,H,W]
        self.count = 0
        self.mean: dict[str, Tensor] = {}  # of Z_MAPS, [C,H,W]; C = scales
        self.std: dict[str, Tensor] = {}
        self.mean_image = torch.empty(0)  # [1,H,W]
        self.readers: dict[str, Reader] = {}
        self.normal_scores: dict[str, Tensor] = {}  # scorer -> sorted float64 [n]
        self.normal_traits = torch.empty(0, len(TRAITS))  # of the same images, as `traits` gives
        self.map_tops: dict[str, float] = {}  # scorer -> where the colours of its maps end

    def add(self, output: Output) -> None:
        """Take in the model's output for a batch of training normals."""
        every = {name: measure(output.seen_by(name)) for name, (measure, _) in Z_MAPS.items()}
        for name, maps in (every | {"image": output.images}).items():
            maps = maps.cpu().double()  # MPS has no float64
            self.sums[name] = self.sums.get(name, 0) + torch.stack([
                maps.sum(0), maps.square().sum(0)])
        self.count += len(output.images)

    def finish(self) -> None:
        """Turn what was added into means and deviations."""
        self.mean_image = (self.sums["image"][0] / self.count).float()
        for name, (_, floor) in Z_MAPS.items():
            mean, squares = self.sums[name] / self.count
            variance = (squares - mean**2).clamp(min=0)
            # A pixel's own variance over a few hundred images is rough: smoothed over neighbours.
            # The floor keeps pixels that never vary from ruling the score.
            smooth = box_filter(variance[None], 1 / 32)[0]
            self.mean[name] = mean.float()
            self.std[name] = smooth.sqrt().clamp(min=floor).float()
        self.sums = {}

    def z(self, output: Output) -> dict[str, Tensor]:
        """Z_MAPS in standard deviations of training normals, each [B,scales,H,W]."""
        device, output = output.images.device, output.seen_by(DEFAULT_SCORER)
        return {name: (measure(output) - self.mean[name].to(device)) / self.std[name].to(device)
                for name, (measure, _) in Z_MAPS.items()}

    def reader_inputs(self, output: Output, z: dict[str, Tensor]) -> dict[str, Tensor]:
        """What each of READERS sees, pooled: {reader: [B,C,h,w]}. z: `self.z(output)`, which
        `reader` sees beside the reconstruction's local contrast: where much detail is expected,
        normal images miss some, too. BASELINE sees the image's grey values and local contrast."""
        x, back = output.images, output.seen_by(DEFAULT_SCORER).reconstructions
        expected, found = (log_contrast(u, 1 / 16) / 2 for u in (back, x))
        residuals = torch.cat([*z.values()], dim=1).clamp(-8, 8) / 2
        return {"reader": pooled(torch.cat([residuals, expected], dim=1)),
                BASELINE: pooled(torch.cat([x - x.mean((2, 3), keepdim=True), found], dim=1))}

    def maps(self, output: Output) -> dict[str, Tensor]:
        """The anomaly map by every scorer and reader that is there: [B,1,H,W], at least 0."""
        x, y = output.seen_by("mse")
        z = self.z(output)
        maps = {"zscore": z["zscore"].abs().mean(1, keepdim=True), "mse": (x - y).square(),
                "ssim": 1 - ssim_map(x, y)}
        inputs = self.reader_inputs(output, z)
        for name, reader in self.readers.items():
            with no_autocast(x.device):
                there = torch.sigmoid(reader(inputs[name]))
            maps[name] = F.interpolate(there, size=x.shape[2:], mode="bilinear",
                                       align_corners=False)
        return maps

    def traits(self, images: Tensor) -> Tensor:
        """Measure TRAITS of uint8 images [n,1,H,W]: float64 [n,4]."""
        x, mean = images.double() / 255, self.mean_image[None].double()
        grey, mean = (u - u.mean((1, 2, 3), keepdim=True) for u in (x, mean))
        contrast = grey.square().mean((1, 2, 3)).sqrt().clamp(min=1e-6)
        alike = (grey * mean).mean((1, 2, 3)) / contrast / mean.square().mean().sqrt()
        fine = (x - box_filter(x, 3)).abs().mean((1, 2, 3)) / contrast
        return torch.stack([x.mean((1, 2, 3)), contrast, fine, alike], dim=1)

    def refer_to(self, scores: dict[str, Tensor], traits: Tensor) -> None:
        """Take these images as what is normal: scores [n] by every scorer, and `traits` [n,4]."""
        self.normal_scores = {name: value.sort().values for name, value in scores.items()}
        self.normal_traits = traits

    def threshold(self, scorer: str, specificity: float) -> float:
        """The ceil((n + 1) x specificity)-th smallest of the n scores of normal images. A new
        normal image of the same kind lies at or under it with at least that chance (Vovk et al.
        2005, prop. 4.1). Of fewer images than `normals_needed` it is the largest score."""
        normal = self.normal_scores[scorer]
        rank = math.ceil(round((len(normal) + 1) * specificity, 9))
        return normal[min(rank, len(normal)) - 1].item()

    def percentile(self, scorer: str, scores: Tensor) -> Tensor:
        """Share of validation normals with a smaller or equal score, in percent, [B]."""
        normal = self.normal_scores[scorer]
        return 100 * torch.searchsorted(normal, scores.double(), right=True) / len(normal)

    def state_dict(self) -> dict[str, object]:
        """Everything calibrated, as tensors and plain numbers."""
        readers = {name: reader.state_dict() for name, reader in self.readers.items()}
        return {k: v for k, v in vars(self).items() if k != "sums"} | {"readers": readers}

    def load_state_dict(self, state: dict, device: torch.device) -> "AnomalyScorer":
        """Take in what `state_dict` gave; readers are put on the device. Gives itself."""
        vars(self).update(state, readers={})
        for name, weights in state["readers"].items():
            reader = self.readers[name] = Reader(weights["down.0.0.0.weight"].shape[1])
            reader.load_state_dict(weights)
            reader.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        return self


@torch.no_grad()
def reconstruct_evenly(model: Any, images: Tensor, setup: Setup) -> list[tuple[Output, int]]:
    """The Output of uint8 images [n,1,H,W], READ_AT_ONCE at a time, and how many of each are real:
    black images fill up the last. Kernels add in another order for batches of another size, and an
    image's score would depend on the images beside it."""
    result = []
    with setup.autocast():  # once for all, because it casts the weights
        for part in images.split(READ_AT_ONCE):
            full = F.pad(part, (0, 0, 0, 0, 0, 0, 0, READ_AT_ONCE - len(part)))
            x = to_float(full, setup.device)
            result.append((Output(x, torch.cat(model.reconstructions(x), 1).float()), len(part)))
    return result


def score_images(model: Any, scorer: AnomalyScorer, images: Tensor, setup: Setup,
                 ) -> tuple[Output, dict[str, Tensor], dict[str, Tensor]]:
    """Score uint8 images [n,1,H,W]: (Output, scores, maps), the last two by every scorer. A score
    is the mean of its map [n,1,H,W]: float64 [n] on the CPU."""
    outputs, maps = [], []
    with setup.autocast(), no_autocast(setup.device):  # weights are cast once; scores are fp32
        for output, count in reconstruct_evenly(model, images, setup):
            maps.append({k: m[:count] for k, m in scorer.maps(output).items()})
            outputs.append(output.first(count))
    every = {k: torch.cat([m[k] for m in maps]) for k in maps[0]}
    whole = Output(*(torch.cat(x) for x in zip(*outputs, strict=True)))
    return whole, {k: m.mean((1, 2, 3)).cpu().double() for k, m in every.items()}, every
