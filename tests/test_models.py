"""The two networks, the objectives, and the scorers' arithmetic."""

import numpy as np
import pytest
import torch
from torch import Tensor

from config import OBJECTIVES, Config, UserError
from models import (
    MODEL_CLASSES,
    SCORERS,
    AnomalyScorer,
    Draws,
    box_filter,
    coarse_noise,
    corrupt,
    create_model,
    objective_loss,
    ssim_map,
)

SIZES = {"unet": 54_986_305, "reversed_ae": 272_717_697}


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(count: int, seed: int = 0) -> Draws:
    return Draws(gen(seed), count)


def small(name: str, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = {"width": 4, "image_size": 32, "latent_dim": 8} | settings
    return create_model(name, Config(**settings))


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_parameter_counts_at_the_defaults(name: str) -> None:
    with torch.device("meta"):  # counted, not allocated
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_every_parameter_gets_a_gradient(name: str, objective: str) -> None:
    model = small(name).train()
    images = torch.rand(8, 1, 32, 32, generator=gen())
    objective_loss(model, corrupt(images, objective, draws(8)), images).backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, key


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_shapes_and_ranges(name: str, size: int) -> None:
    model = small(name, image_size=size).eval()
    x = torch.rand(3, 1, size, size, generator=gen())
    y = model(x)
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1
    assert model.encode(x).shape == (3, 8)
    assert model.decode(torch.zeros(3, 8)).shape == x.shape
    assert all(f.shape[0] == 3 for f in model.features(x))
    for view in model.reconstructions(x):
        assert view.shape == x.shape


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_decode_sees_the_latent_alone_and_is_the_skip_free_view(name: str) -> None:
    model = small(name).eval()
    x = torch.rand(2, 1, 32, 32, generator=gen())
    assert torch.allclose(model.decode(model.encode(x)), model.reconstructions(x)[-1], atol=1e-6)
    assert torch.equal(model(x), model.reconstructions(x)[0])


def test_unet_trains_its_skip_free_decoder_on_a_share_of_the_batch() -> None:
    model = small("unet")
    x = torch.rand(8, 1, 32, 32, generator=gen())
    assert [len(v) for v in model.reconstructions(x, 0.25)] == [8, 2]
    assert [len(v) for v in model.reconstructions(x, 0.0)] == [8]


@pytest.mark.parametrize(("name", "size"), [("unet", 100), ("unet", 16), ("reversed_ae", 50)])
def test_an_image_size_that_does_not_fit_is_refused(name: str, size: int) -> None:
    with pytest.raises(UserError, match=f"--image-size {size}: {name} needs a multiple of"):
        create_model(name, Config(image_size=size))


def test_coarse_noise_is_coarse_zero_mean_and_seeded() -> None:
    images = torch.zeros(400, 1, 64, 64)
    noise = coarse_noise(images, draws(400, 1))
    assert torch.equal(noise, coarse_noise(images, draws(400, 1)))
    assert not torch.equal(noise, coarse_noise(images, draws(400, 2)))
    assert abs(noise.mean()) < 0.005
    assert 0.05 < noise.std() < 0.2
    step = (noise[..., 1:] - noise[..., :-1]).abs().mean()
    assert step < 0.35 * noise.abs().mean(), "neighbouring pixels differ like pixel noise"


def test_objectives_corrupt_the_input_but_ask_for_the_clean_image() -> None:
    images = torch.rand(4, 1, 32, 32, generator=gen())
    assert corrupt(images, "plain", draws(4)) is images
    noisy = corrupt(images, "denoise", draws(4))
    assert not torch.equal(noisy, images) and noisy.min() >= 0 and noisy.max() <= 1

    class Copy(torch.nn.Module):
        def reconstructions(self, x: Tensor, share: float) -> list[Tensor]:
            return [x]

    assert objective_loss(Copy(), images, images) == 0
    expected = (noisy - images).abs().mean()
    assert torch.allclose(objective_loss(Copy(), noisy, images), expected)


def test_a_ranks_slice_meets_the_same_random_numbers_as_in_the_whole_batch() -> None:
    images = torch.rand(6, 1, 32, 32, generator=gen())
    whole = corrupt(images, "denoise", draws(6, 3))
    parts = [corrupt(images[a:b], "denoise", Draws(gen(3), b - a, a, 6))
             for a, b in ((0, 4), (4, 6))]
    assert torch.equal(torch.cat(parts), whole)


def test_box_filter_is_the_mean_of_what_lies_inside() -> None:
    x = torch.rand(1, 1, 9, 9, generator=gen())
    y = box_filter(x, 3)
    assert torch.allclose(y[0, 0, 4, 4], x[0, 0, 3:6, 3:6].mean())
    assert torch.allclose(y[0, 0, 0, 0], x[0, 0, :2, :2].mean())


def test_ssim_against_the_formula_written_out() -> None:
    a, b = torch.rand(2, 1, 1, 24, 24, generator=gen(), dtype=torch.float64)
    t = np.arange(11) - 5
    w = np.exp(-(t[:, None] ** 2 + t[None, :] ** 2) / 4.5)
    w /= w.sum()
    p, q = a[0, 0, 5:16, 7:18].numpy(), b[0, 0, 5:16, 7:18].numpy()
    mp, mq = (w * p).sum(), (w * q).sum()
    vp, vq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum()
    c = (w * (p - mp) * (q - mq)).sum()
    c1, c2 = 1e-4, 9e-4
    expected = (2 * mp * mq + c1) * (2 * c + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
    assert ssim_map(a, b)[0, 0, 10, 12].item() == pytest.approx(expected, rel=1e-9)
    assert torch.allclose(ssim_map(a, a), torch.ones_like(a))


def calibrated(size: int = 16, n: int = 50) -> AnomalyScorer:
    scorer = AnomalyScorer(size)
    residual = 0.1 + 0.05 * torch.randn(n, 1, size, size, generator=gen(3))
    for part in residual.split(7):
        scorer.add(part, torch.zeros_like(part))
    scorer.finish()
    scorer.normal_scores = {name: torch.arange(100, dtype=torch.float64) for name in SCORERS}
    return scorer


def test_calibration_is_mean_and_deviation_of_the_residual() -> None:
    scorer = calibrated()
    residual = 0.1 + 0.05 * torch.randn(50, 1, 16, 16, generator=gen(3))
    assert torch.allclose(scorer.mean, residual.mean(0, keepdim=True), atol=1e-6)
    assert scorer.std.mean().item() == pytest.approx(0.05, rel=0.05)
    assert scorer.count == 50


def test_maps_and_scores_by_definition() -> None:
    scorer = calibrated()
    x, y = torch.rand(2, 3, 1, 16, 16, generator=gen(4))
    assert torch.allclose(scorer.anomaly_map("mse", x, y), (x - y) ** 2)
    assert torch.allclose(scorer.anomaly_map("mae", x, y), (x - y).abs())
    assert torch.allclose(scorer.anomaly_map("ssim", x, y), 1 - ssim_map(x, y))
    z = scorer.anomaly_map("zscore", x, y)
    assert z.shape == x.shape and z.min() >= 0
    assert torch.allclose(scorer.score("mse", z), z.mean((1, 2, 3)))
    top = z.flatten(1).sort(descending=True).values[:, :2].mean(1)  # 1 % of 256 pixels
    assert torch.allclose(scorer.score("zscore", z), top)
    with pytest.raises(UserError, match="--scorer nonsense"):
        scorer.anomaly_map("nonsense", x, y)


def test_a_lesion_raises_the_score_and_the_map_points_at_it() -> None:
    scorer = calibrated(64)
    normal = 0.1 + 0.05 * torch.randn(1, 1, 64, 64, generator=gen(9))
    sick = normal.clone()
    sick[..., 40:50, 10:20] += 0.2
    for name in ("zscore", "mse"):
        maps = [scorer.anomaly_map(name, r, torch.zeros_like(r)) for r in (normal, sick)]
        assert scorer.score(name, maps[1]) > scorer.score(name, maps[0])
        inside = maps[1][..., 40:50, 10:20].mean()
        assert inside > 2 * maps[1].mean()


@pytest.mark.parametrize("name", SCORERS)
def test_a_score_does_not_depend_on_the_rest_of_the_batch(name: str) -> None:
    model, scorer = small("unet", image_size=32).eval(), calibrated(32)
    x = torch.rand(6, 1, 32, 32, generator=gen(5))
    with torch.inference_mode():
        together = scorer.score(name, scorer.anomaly_map(name, x, model(x)))
        alone = torch.cat([scorer.score(name, scorer.anomaly_map(name, i, model(i)))
                           for i in x.split(1)])
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-7)


def test_threshold_and_percentile_refer_to_validation_normals() -> None:
    scorer = calibrated()
    assert scorer.threshold("mse", 0.95) == 95.0  # 96 of 100 normals lie at or under it
    assert scorer.percentile("mse", torch.tensor([-1.0, 0.0, 49.5, 99.0])).tolist() == [
        0, 1, 50, 100]


def test_a_scorer_survives_its_state_dict() -> None:
    scorer, copy = calibrated(), AnomalyScorer(16)
    copy.load_state_dict(scorer.state_dict())
    x, y = torch.rand(2, 2, 1, 16, 16, generator=gen(6))
    assert torch.equal(scorer.anomaly_map("zscore", x, y), copy.anomaly_map("zscore", x, y))
    assert copy.threshold("ssim", 0.9) == scorer.threshold("ssim", 0.9)
