"""Both autoencoders, what they are trained on (objectives) and how they are read (scorers).

    from models import create_model
    model = create_model("unet")            # 54,986,305 parameters
    reconstruction = model(images)          # [B,1,128,128] in [0,1] -> the same

Every image tensor here is float [B,1,H,W] with values in [0,1]; H = W = the model's image size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config, UserError

# ----------------------------------------------------------------------------------------------
# Networks


def conv_block(channels_in: int, channels_out: int, dropout: float) -> nn.Sequential:
    """Two 3x3 convolutions, each with BatchNorm and ReLU; whole channels are dropped between."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
        nn.Dropout2d(dropout),
        nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
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
        self, image_size: int = 128, latent_dim: int = 512, width: int = 64, dropout: float = 0.1
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
        self.to_latent = nn.Linear(flat, latent_dim)
        self.from_latent = nn.Linear(latent_dim, flat)
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
        *skips, bottom = self.features(x)
        latent = self.to_latent(bottom.flatten(1))
        bottom = self._bottom_from(latent)
        y = bottom
        for block, skip in zip(self.up, reversed(skips), strict=True):
            y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
            y = block(torch.cat([skip, y], dim=1))
        result = [torch.sigmoid(self.out(y))]
        if skip_free_share > 0:
            result.append(self._decode_bottom(bottom[: max(1, round(len(x) * skip_free_share))]))
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
    three transposed convolutions back up. `features` serve the reversed embedding: the encoder
    run once more, on the reconstruction.

    width: channels of the first level; the encoder's levels have 1, 2, 4 and 8 times as many.
    """

    def __init__(
        self, image_size: int = 128, latent_dim: int = 512, width: int = 64, dropout: float = 0.1
    ) -> None:
        super().__init__()
        check_image_size("reversed_ae", image_size, 8)
        w = width
        self.image_size, self.bottom = image_size, (8 * w, image_size // 8, image_size // 8)
        flat, hidden = 8 * w * (image_size // 8) ** 2, 2 * latent_dim
        self.down = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(i, o, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(o),
                nn.ReLU(inplace=True),
            )
            for i, o, stride in ((1, w, 1), (w, 2 * w, 2), (2 * w, 4 * w, 2), (4 * w, 8 * w, 2))
        )
        self.to_latent = nn.Sequential(
            nn.Linear(flat, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, latent_dim),
        )
        self.from_latent = nn.Sequential(
            nn.Linear(latent_dim, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, flat),
        )
        self.up = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(
                    i, o, 3, stride=2, padding=1, output_padding=1, bias=False
                ),
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
        return [self(x)]


def check_image_size(model: str, image_size: int, multiple: int) -> None:
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
    return MODEL_CLASSES[name](
        config.image_size, config.latent_dim, config.width, config.dropout
    )


MODEL_CLASSES = {"unet": UNet, "reversed_ae": ReversedAutoencoder}


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
        noise += F.interpolate(grid, size=(H, W), mode="bilinear", align_corners=False)
    # The grid's lines must not always lie in the same place.
    shift = torch.randint(H, (2,), generator=draws.generator).tolist()
    return noise.roll(shift, dims=(2, 3))


def corrupt(images: Tensor, objective: str, draws: Draws) -> Tensor:
    """What the network sees of clean images [B,1,H,W] under the objective; same shape, in [0,1]."""
    if objective == "plain":
        return images
    return (images + coarse_noise(images, draws)).clamp(0, 1)


def objective_loss(model: nn.Module, inputs: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error against the clean images, averaged over the model's reconstructions.

    inputs: what the model sees, [B,1,H,W]; images: the same, clean. The loss is computed in fp32
    whatever the network's precision.
    """
    views = model.reconstructions(inputs, SKIP_FREE_SHARE)
    losses = [F.l1_loss(view.float(), images[: len(view)]) for view in views]
    return torch.stack(losses).mean()


# ----------------------------------------------------------------------------------------------
# Scorers: from input and reconstruction to an anomaly map and an anomaly score

SCORERS = {
    "zscore": "residual as per-pixel z-score among training normals, low-passed, absolute",
    "mse": "squared residual",
    "mae": "absolute residual",
    "ssim": "1 - structural similarity",
}
DEFAULT_SCORER = "zscore"


def box_filter(maps: Tensor, side: int) -> Tensor:
    """Mean over a side x side window (side odd); at the border over what lies inside."""
    return F.avg_pool2d(maps, side, stride=1, padding=side // 2, count_include_pad=False)


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity at every pixel, [B,1,H,W] in [-1,1], for images in [0,1].

    Wang et al. 2004: 11x11 Gaussian window of standard deviation 1.5, K1 = 0.01, K2 = 0.03;
    borders are mirrored so that the map has the image's size.
    """
    t = torch.arange(11, dtype=a.dtype, device=a.device) - 5
    g = torch.exp(-t.square() / (2 * 1.5**2))
    g = g / g.sum()

    def blur(x: Tensor) -> Tensor:
        x = F.pad(x, (5, 5, 5, 5), mode="reflect")
        return F.conv2d(F.conv2d(x, g.view(1, 1, 11, 1)), g.view(1, 1, 1, 11))

    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2
    cov = blur(a * b) - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mu_a * mu_b + c1) * (2 * cov + c2)) / (
        (mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2)
    )


class AnomalyScorer:
    """Reads reconstructions: anomaly maps, scores, and what is normal for both.

    Calibrated on normal images alone. Training normals give the residual's mean and standard
    deviation at every pixel (`add` for each batch, then `finish`); validation normals give the
    scores that thresholds and percentiles refer to (`normal_scores`).
    """

    def __init__(self, image_size: int) -> None:
        shape = (1, 1, image_size, image_size)
        self.count = 0
        self.mean, self.std = torch.zeros(shape), torch.ones(shape)
        self.normal_scores: dict[str, Tensor] = {}  # scorer -> sorted float64 [n]
        self._sum = torch.zeros(shape, dtype=torch.float64)
        self._squares = torch.zeros(shape, dtype=torch.float64)

    def add(self, images: Tensor, reconstructions: Tensor) -> None:
        """Take in a batch of training normals and their reconstructions, both [B,1,H,W]."""
        residual = (images - reconstructions).cpu().double()  # MPS has no float64
        self._sum += residual.sum(0, keepdim=True)
        self._squares += residual.square().sum(0, keepdim=True)
        self.count += len(residual)

    def finish(self) -> None:
        """Turn what was added into the per-pixel mean and standard deviation."""
        mean = self._sum / self.count
        variance = (self._squares / self.count - mean**2).clamp(min=0)
        # A pixel's own variance over a few hundred images is rough: smoothed over neighbours.
        # The floor (2.5 of 255 grey levels) keeps pixels that never vary from ruling the score.
        side = 2 * round(mean.shape[-1] / 64) + 1
        self.mean = mean.float()
        self.std = box_filter(variance, side).sqrt().clamp(min=0.01).float()

    def anomaly_map(self, scorer: str, images: Tensor, reconstructions: Tensor) -> Tensor:
        """How abnormal each pixel looks, [B,1,H,W], at least 0; images and maps in fp32."""
        if scorer == "mse":
            return (images - reconstructions).square()
        if scorer == "mae":
            return (images - reconstructions).abs()
        if scorer == "ssim":
            return 1 - ssim_map(images, reconstructions)
        if scorer == "zscore":
            mean, std = self.mean.to(images.device), self.std.to(images.device)
            z = (images - reconstructions - mean) / std
            return box_filter(z, 2 * round(z.shape[-1] * 3 / 128) + 1).abs()
        raise UserError(f"--scorer {scorer}: not one of {', '.join(SCORERS)}")

    @staticmethod
    def score(scorer: str, maps: Tensor) -> Tensor:
        """Anomaly score [B]: the mean of each map; for zscore the mean of its largest 1 %, since
        a lesion covers little of the image."""
        flat = maps.flatten(1)
        if scorer == "zscore":
            flat = flat.topk(max(1, flat.shape[1] // 100), dim=1).values
        return flat.mean(dim=1)

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
        return {"count": self.count, "mean": self.mean, "std": self.std,
                "normal_scores": self.normal_scores}

    def load_state_dict(self, state: dict) -> None:
        self.count, self.mean, self.std = state["count"], state["mean"], state["std"]
        self.normal_scores = dict(state["normal_scores"])
