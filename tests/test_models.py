"""The two networks, the objectives, and the scorers' arithmetic."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models
from config import OBJECTIVES, Config, UserError
from data import draw_phantom
from models import (
    MODEL_CLASSES, READERS, SCALES, SCORERS, TEXTURE_SCALES, AnomalyScorer, Draws, Linear, Output,
    Setup, add_consolidation, add_foreign_patch, add_opacities, augment, box_filter, coarse_noise,
    corrupt, create_model, draw_lesions, exposed_like, low_passed, objective_loss,
    reconstruct_evenly, score_images, soft_shapes, ssim_map, texture, to_float, train_reader, warp)

CPU = Setup(torch.device("cpu"))
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
def test_at_the_defaults_every_parameter_counts_and_is_trained(name: str) -> None:
    with torch.device("meta"):  # counted, not allocated
        model, images = create_model(name), torch.empty(8, 1, 128, 128)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    objective_loss(model, images, images).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


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
    for view in model.reconstructions(x):
        assert view.shape == x.shape
    assert len(model.reconstructions(x)) == 1 + (name == "unet")


@pytest.mark.parametrize("name", MODEL_CLASSES)
@torch.no_grad()
def test_the_last_reconstruction_is_made_from_the_latent_alone(name: str) -> None:
    model = small(name).eval()
    x = torch.rand(2, 1, 32, 32, generator=gen())
    first, *_, last = [*model.reconstructions(x)] * 2
    assert torch.equal(model(x), first) and not torch.equal(last[0], last[1])
    final = model.to_latent if name == "unet" else model.to_latent[-1]
    final.weight.zero_()  # now all latents are alike
    first, *_, last = [*model.reconstructions(x)] * 2
    assert torch.equal(last[0], last[1]) and torch.equal(first[0], first[1]) == (name != "unet")


def test_linear_layers_stay_in_fp32_on_a_cpu() -> None:
    layer, x = Linear(30, 20), torch.randn(4, 30, generator=gen())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16())
    assert torch.equal(y, F.linear(x.bfloat16().float(), layer.weight, layer.bias))


@pytest.mark.parametrize(("name", "size"), [("unet", 100), ("unet", 16), ("reversed_ae", 50)])
def test_an_image_size_that_does_not_fit_is_refused(name: str, size: int) -> None:
    with pytest.raises(UserError, match=f"--image-size {size}: {name} needs a multiple of"):
        create_model(name, Config(image_size=size))


def test_augmentation_is_seeded_small_and_keeps_the_range() -> None:
    images = torch.from_numpy(np.stack([draw_phantom(i, 64)[0] for i in range(16)]))[:, None]
    images = to_float(images, CPU.device)
    seen = augment(images, draws(16))
    assert torch.equal(seen, augment(images, draws(16)))
    assert not torch.equal(seen, augment(images, draws(16, 1)))
    assert seen.shape == images.shape and seen.min() >= 0 and seen.max() <= 1
    # A bright spot ends up within what shift, turn and scale allow: no image is mirrored or upside
    # down.
    spot = torch.zeros(200, 1, 64, 64)
    spot[:, :, 30:34, 30:34] = 0.5
    spot[:, :, 14:18, 46:50] = 1.0  # top right
    brightest = augment(spot, draws(200, 2)).flatten(1).argmax(1).numpy()
    y, x = np.unravel_index(brightest, (64, 64))
    assert y.max() < 28 and x.min() > 63 - 28 and min(x.std(), y.std()) > 1


def test_coarse_noise_is_coarse_zero_mean_and_seeded() -> None:
    images = torch.zeros(400, 1, 64, 64)
    noise = coarse_noise(images, draws(400, 1))
    assert abs(noise.mean()) < 0.005
    assert 0.05 < noise.std() < 0.2
    step = (noise[..., 1:] - noise[..., :-1]).abs().mean()
    assert step < 0.35 * noise.abs().mean(), "neighbouring pixels differ like pixel noise"
    seam = (noise[..., 1:] - noise[..., :-1]).abs().mean((0, 1, 2)).max()
    assert seam < 1.3 * step, "the place of the roll must not show"


@pytest.mark.parametrize("size", [64, 128, 224])
def test_shapes_are_soft_varied_and_of_the_same_share_at_every_size(size: int) -> None:
    shapes = soft_shapes(torch.zeros(200, 1, size, size), draws(200), 1)
    assert shapes.shape == (200, 1, size, size) and shapes.min() >= 0 and shapes.max() <= 1
    areas = shapes.mean((1, 2, 3))
    assert 0.03 < areas.mean() < 0.12 and areas.min() < 0.02 and areas.max() > 0.2
    step = (shapes[..., 1:] - shapes[..., :-1]).abs().max()
    assert step < 50 / size, "an edge that hard would be found by its edge alone"


def changed(before: Tensor, after: Tensor) -> Tensor:
    """Share of an image's pixels that visibly differ, [B]."""
    return ((before - after).abs() > 0.02).float().mean((1, 2, 3))


def test_opacities_are_on_most_images_bright_and_dark_and_hide_detail_where_they_are() -> None:
    flat = torch.full((400, 1, 64, 64), 0.5)
    seen = add_opacities(flat, draws(400))
    share = changed(flat, seen)
    assert 0.6 < (share > 0).float().mean() < 0.8
    assert 0.05 < share.mean() < 0.4
    change = (seen - flat).mean((1, 2, 3))[share > 0]
    assert 0.55 < (change > 0).float().mean() < 0.85
    stripes = 0.05 * torch.tensor([1.0, -1.0]).repeat(32)
    detail = add_opacities(flat + stripes, draws(400)) - seen
    left = (detail / stripes)[:, 0, :, 8:-8]  # the share of the stripes that can still be seen
    assert (left[share == 0] - 1).abs().max() < 1e-5
    there = left[share > 0]
    assert 0.6 < (there > 0.95).float().mean() < 0.95  # of the pixels: it is local
    faintest = there.amin((1, 2))
    assert faintest.min() < 0.2 and 0.1 < (faintest < 0.5).float().mean() < 0.6
    assert left.min() > -0.1 and left.max() < 1.01


def test_a_foreign_patch_is_on_half_of_the_images_and_comes_from_another_one() -> None:
    levels = torch.linspace(0, 1, 200)
    images = levels[:, None, None, None].expand(200, 1, 64, 64).contiguous()
    seen = add_foreign_patch(images, draws(200))
    share = changed(images, seen)
    assert 0.35 < (share > 0).float().mean() < 0.65
    assert share.max() < 0.9, "the patch must leave some of the image as it was"
    # With two images, what is pasted into one can only be the other.
    two = torch.zeros(2, 1, 64, 64)
    two[1] = 1
    pasted = torch.stack([add_foreign_patch(two, draws(2, s)) for s in range(20)])
    assert pasted[:, 0].max() > 0.5 and pasted[:, 1].min() < 0.5
    alone = images[:1]
    assert torch.equal(add_foreign_patch(alone, draws(1, 1)), alone)


@pytest.mark.parametrize("size", [64, 128, 224])
def test_objectives_corrupt_the_input_within_its_range(size: int) -> None:
    images = torch.rand(4, 1, size, size, generator=gen())
    assert corrupt(images, "plain", draws(4)) is images
    before = images.clone()
    for objective in ("denoise", "heal"):
        seen = corrupt(images, objective, draws(4))
        assert seen.shape == images.shape and seen.min() >= 0 and seen.max() <= 1
        assert (changed(images, seen) > 0).all()
        assert torch.equal(seen, corrupt(images, objective, draws(4)))
        assert not torch.equal(seen, corrupt(images, objective, draws(4, 1)))
    assert torch.equal(images, before), "the target must stay clean"


def test_the_loss_is_the_mean_absolute_error_against_the_clean_image() -> None:
    images, noisy = torch.rand(2, 4, 1, 32, 32, generator=gen())
    copy = SimpleNamespace(reconstructions=lambda x: [x])
    assert objective_loss(copy, images, images) == 0
    error = (noisy - images).abs().mean()
    assert torch.allclose(objective_loss(copy, noisy, images), error)
    half_right = SimpleNamespace(reconstructions=lambda x: [images, x])
    assert torch.allclose(objective_loss(half_right, noisy, images), error / 2)


@pytest.mark.parametrize("objective", ["denoise", "heal"])
def test_a_ranks_slice_meets_the_same_random_numbers_as_in_the_whole_batch(objective: str) -> None:
    # All alike: a foreign patch comes from the slice's own images.
    images = torch.rand(1, 1, 32, 32, generator=gen()).repeat(6, 1, 1, 1)
    whole = corrupt(images, objective, draws(6, 3))
    parts = [corrupt(images[a:b], objective, Draws(gen(3), b - a, a, 6))
             for a, b in ((0, 4), (4, 6))]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)


@pytest.mark.parametrize("side", [1, 5, 17])
def test_box_filter_is_average_pooling_in_full_precision(side: int) -> None:
    maps, half = torch.rand(3, 2, 40, 24, generator=gen()), side // 2
    expected = F.avg_pool2d(maps, (side, 1), 1, (half, 0), count_include_pad=False)
    expected = F.avg_pool2d(expected, (1, side), 1, (0, half), count_include_pad=False)
    with torch.autocast("cpu", torch.bfloat16):  # which would multiply in bf16
        assert torch.allclose(box_filter(maps, side), expected, atol=1e-6)


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
    ramp = torch.linspace(0, 0.1, 48)
    a = (0.9 + ramp[:, None] * ramp)[None, None]  # bright and smooth: fp32 loses most here
    assert torch.allclose(ssim_map(a, 0.98 * a).double(), ssim_map(a.double(), 0.98 * a.double()),
                          atol=5e-5)


def output(residual: Tensor) -> Output:
    """An Output with two reconstructions, one blank and one of fixed texture."""
    texture = 0.1 * torch.rand(1, 1, *residual.shape[2:], generator=gen(8)).expand_as(residual)
    return Output(residual, torch.cat([0 * residual, texture], 1))


def matched(image: Tensor, view: Tensor) -> Tensor:
    """The view [H,W] in the brightness and contrast of the image [H,W], by numpy's line."""
    x, y = view.double().numpy().ravel(), image.double().numpy().ravel()
    slope = np.polyfit(x, y, 1)[0] if x.std() else 1.0
    fitted = y.mean() + np.clip(slope, 0.5, 2) * (x - x.mean())
    return torch.from_numpy(fitted.reshape(view.shape)).float()


def normal_residual(count: int, size: int, seed: int) -> Tensor:
    return 0.1 + 0.05 * torch.randn(count, 1, size, size, generator=gen(seed))


def calibrated_on(usual: list[Output]) -> AnomalyScorer:
    """On these, referring to them, with a reader of small steps; out of a checkpoint."""
    scorer, loaded = AnomalyScorer(), AnomalyScorer()
    for each in usual:
        scorer.add(each)
    scorer.finish()
    for name in READERS:
        x = torch.cat([scorer.reader_inputs(each, scorer.z(each))[name] for each in usual])
        scorer.readers[name] = train_reader(x, x[:, :1].sigmoid(), Config(reader_steps=2),
                                            CPU.device, lambda step: None)
    maps = [scorer.maps(each) for each in usual]
    scorer.refer_to({k: torch.cat([m[k].mean((1, 2, 3)) for m in maps]).double() for k in maps[0]},
                    dict.fromkeys(maps[0], 1.0))
    loaded.load_state_dict(scorer.state_dict(), CPU.device)
    return loaded


def calibrated(size: int = 16) -> AnomalyScorer:
    return calibrated_on(list(map(output, normal_residual(50, size, 3).split(10))))


def local_deviation(x: np.ndarray, side: int) -> np.ndarray:
    """Of [H,W], over the window around each pixel as far as it lies in the image."""
    half = side // 2
    return np.array([[x[max(0, i - half) : i + half + 1, max(0, j - half) : j + half + 1].std()
                      for j in range(x.shape[1])] for i in range(x.shape[0])])


def test_texture_is_the_log_ratio_of_local_contrast() -> None:
    x, y, z = torch.rand(3, 2, 1, 32, 32, generator=gen(3))
    got = texture(Output(x, torch.cat([y, 0.5 * z], 1)))
    assert got.shape == (2, 2 * len(TEXTURE_SCALES), 32, 32)
    for i, side in enumerate((3, 5)):  # 1/16 and 1/8 of 32 pixels, and odd
        for j, view in enumerate((y, 0.5 * z)):
            a, b = (np.log(local_deviation(t[1, 0].double().numpy(), side) + 1 / 255)
                    for t in (x, view))
            assert np.allclose(got[1, 2 * i + j].numpy(), a - b, atol=1e-4)
    # Brightness is no texture, and a flat image has little of it, not infinitely little.
    assert torch.allclose(texture(Output(x + 0.3, y - 0.2)), texture(Output(x, y)),
                          atol=1e-3)
    flat = texture(Output(torch.full_like(x, 0.4), y))
    assert torch.isfinite(flat).all() and (flat < -2).all()


def test_lost_contrast_is_seen_where_residuals_hardly_change() -> None:
    """Fine structure that is half as strong: no grey value changes by more than noise does."""
    def hazy_output(noise: float, seed: int) -> Output:
        fine = 0.05 * torch.randn(1, 1, 64, 64, generator=gen(seed))
        view = 0.5 + 0.05 * torch.randn(1, 1, 64, 64, generator=gen(seed + 1000))
        return Output(0.5 + noise * fine, view)

    scorer = AnomalyScorer()
    for i in range(40):
        scorer.add(hazy_output(1, i))
    scorer.finish()
    usual, hazy = (scorer.z(hazy_output(noise, 200)) for noise in (1, 0.5))
    assert hazy["texture"].abs().mean() > 3 * usual["texture"].abs().mean()
    assert hazy["zscore"].abs().mean() < usual["zscore"].abs().mean()


def test_a_reader_learns_where_lesions_are_drawn() -> None:
    """Of images of noise, in some of which a square is brighter: where that lies, and how much."""
    x = torch.randn(64, 3, 32, 32, generator=gen(1))
    truth = torch.zeros(64, 1, 32, 32)
    for i in range(0, 64, 2):
        truth[i, :, i % 20 : i % 20 + 8, 4:16] = 1
    reader = train_reader(x + 2 * truth, truth, Config(reader_steps=150, seed=3), CPU.device,
                          lambda step: None)
    found = torch.sigmoid(reader(x.flip(0) + 2 * truth))
    assert found[truth == 1].mean() > 0.6 > 0.3 > found[truth == 0].mean()
    again = train_reader(x + 2 * truth, truth, Config(reader_steps=150, seed=3), CPU.device,
                         lambda step: None)
    assert torch.equal(torch.sigmoid(again(x.flip(0) + 2 * truth)), found)


def test_drawn_lesions_are_marked_where_they_change_the_image() -> None:
    images = torch.from_numpy(np.stack([draw_phantom(i, 64)[0] for i in range(40)]))[:, None] / 255
    seen, there = draw_lesions(images, Draws(gen(2), 40))
    assert seen.shape == there.shape == images.shape
    for x in (seen, there):
        assert x.min() >= 0 and x.max() <= 1
    assert 2 <= (there.amax((1, 2, 3)) == 0).sum() <= 16  # a fifth has none
    assert torch.equal(draw_lesions(images, Draws(gen(2), 40))[1], there)
    moved = warp(images, Draws(gen(3), 40))
    changed = (moved - images).abs().amax((1, 2, 3))
    assert (changed > 0.02).all() and ((moved - images).abs() < 0.02).float().mean() > 0.5


def test_only_images_that_vary_get_consolidations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "add_consolidation", lambda images, draws: 0 * images + 1)
    images = torch.full((20, 1, 32, 32), 0.5)
    white = [(draw_lesions(images, draws(20), vary)[0] > 0.99).all(3).all(2).sum()
             for vary in (True, False)]
    assert white[0] >= 8 and white[1] == 0


def test_consolidation_brightens_dark_places_towards_what_is_bright_nearby() -> None:
    images = torch.full((200, 1, 64, 64), 0.2)
    images[..., 24:40] = 0.8  # a bright band, as the heart between the lungs
    seen = add_consolidation(images, draws(200))
    change = seen - images
    assert change.min() > -1e-6 and seen.max() < 0.8 + 1e-6
    assert 0.5 < (changed(images, seen) > 0).float().mean() < 0.9  # 70 %, less those on the band
    near, far = change[..., 16:24], change[..., :4]
    assert near.max() > 0.4 and far.max() < 0.01


def test_calibration_is_mean_and_deviation_at_every_pixel() -> None:
    scorer, residual = calibrated(), normal_residual(50, 16, 3)
    views = output(residual).reconstructions
    assert scorer.count == 50 and len(scorer.mean["zscore"]) == len(SCALES)
    for i, scale in enumerate(SCALES):
        view = views[:, -1]
        rest = torch.stack([x - matched(x, v) for x, v in zip(residual[:, 0], view, strict=True)])
        seen = box_filter(rest[:, None], 2 * round(scale * 8) + 1)
        assert torch.allclose(scorer.mean["zscore"][i], seen.mean(0)[0], atol=1e-6)
        expected = seen.std(0).mean().item()
        assert scorer.std["zscore"][i].mean().item() == pytest.approx(expected, rel=0.1)
    ratios = texture(output(residual).seen_by("reader"))
    assert torch.allclose(scorer.mean["texture"], ratios.mean(0), atol=1e-5)


def test_maps_and_scores_by_definition() -> None:
    scorer = calibrated()
    x, y = torch.rand(2, 3, 1, 16, 16, generator=gen(4))
    both = Output(x, torch.cat([y, y.flip(2)], 1))  # readers and zscore see the second alone
    rest = torch.stack([a - matched(a, b) for a, b in zip(x[:, 0], y.flip(2)[:, 0], strict=True)])
    seen = [box_filter(rest[:, None], 2 * round(scale * 8) + 1)[:, 0] for scale in SCALES]
    z = torch.stack([(r - m) / s for r, m, s in zip(
        seen, scorer.mean["zscore"], scorer.std["zscore"], strict=True)], 1)
    maps = {"mse": (x - y) ** 2, "ssim": 1 - ssim_map(x, y), "zscore": z.abs().mean(1, True)}
    got, ratio = scorer.maps(both), scorer.z(both)["texture"]
    assert got.keys() == {*SCORERS, *READERS}
    logs = texture(both.seen_by("reader")) - scorer.mean["texture"]
    assert torch.allclose(ratio, logs / scorer.std["texture"])
    for name, map_ in maps.items():
        assert torch.allclose(got[name], map_, atol=1e-5), name
    for name in READERS:
        assert got[name].shape == x.shape and 0 <= got[name].min() <= got[name].max() <= 1


def test_readers_see_residuals_and_the_contrast_of_what_was_expected() -> None:
    scorer = calibrated(32)
    x, y, q = torch.rand(3, 2, 1, 32, 32, generator=gen(6))
    both = Output(x, torch.cat([q, y], 1))
    z = scorer.z(both)
    got, alone = (scorer.reader_inputs(both, z)[name] for name in READERS)
    for map_, shown in ((got[1, -1], y), (alone[1, -1], x)):  # 1/16, and odd
        logs = np.log(local_deviation(shown[1, 0].double().numpy(), 3) + 1 / 255)
        assert np.allclose(2 * map_.numpy(), logs, atol=1e-4)
    residuals = torch.cat([z["zscore"], z["texture"]], 1).clamp(-8, 8)
    assert torch.allclose(2 * got[:, :-1], residuals)
    # Nothing of what skip connections returned; of the image alone, nothing that a model returned.
    other = Output(x, torch.cat([y, y], 1))
    assert torch.equal(scorer.reader_inputs(other, scorer.z(other))["reader"], got)
    other = Output(x, torch.cat([q, q], 1))
    assert torch.equal(scorer.reader_inputs(other, z)[models.BASELINE], alone)


def test_exposure_is_no_anomaly_but_a_blank_or_inverted_image_is_one() -> None:
    x = torch.rand(4, 1, 16, 16, generator=gen(1))
    views = torch.cat([x + 0.05 * torch.randn(4, 1, 16, 16, generator=gen(2)), x.flip(2)], 1)
    usual = low_passed(Output(x, views))
    for factor, brightness in ((1, 0.1), (0.7, 0), (1.3, -0.1)):
        # What a network makes of another exposure, if it keeps it in one view and not in the other.
        other = factor * x + brightness
        seen = Output(other, torch.cat([factor * views[:, :1] + brightness, views[:, 1:]], 1))
        assert torch.allclose(low_passed(seen)[:, ::2], factor * usual[:, ::2], atol=1e-6)
    assert torch.allclose(exposed_like(0.6 * x + 0.3, x), 0.6 * x + 0.3, atol=1e-6)
    for odd in (torch.zeros_like(x), torch.ones_like(x), 1 - x):
        assert (odd - exposed_like(odd, x)).std() > 0.4 * x.std()
    assert torch.isfinite(exposed_like(x, torch.zeros_like(x))).all()


def test_a_lesion_raises_the_score_and_the_map_points_at_it() -> None:
    scorer = calibrated(64)
    normal = normal_residual(1, 64, 9)
    sick = normal.clone()
    sick[..., 40:50, 10:20] += 0.2
    normal, sick = (scorer.maps(output(x)) for x in (normal, sick))
    for name in ("zscore", "mse"):
        assert sick[name].mean() > normal[name].mean()
        assert sick[name][..., 40:50, 10:20].mean() > 2 * sick[name].mean()


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_a_score_is_the_mean_of_its_map_whatever_the_other_images_are(name: str) -> None:
    model = small(name).eval()
    images = torch.randint(0, 256, (60, 1, 32, 32), generator=gen(5)).byte()
    scorer = calibrated_on([x for x, _ in reconstruct_evenly(model, images[:40], CPU)])
    some = images[49:]  # more than are read at a time
    output, scores, maps = score_images(model, scorer, some, CPU)
    assert torch.equal(output.images, to_float(some, CPU.device))
    for name, map_ in maps.items():
        assert torch.allclose(scores[name].float(), map_.mean((1, 2, 3)))
    for i, image in enumerate(some.split(1)):
        alone, score, map_ = score_images(model, scorer, image, CPU)
        assert torch.equal(alone.reconstructions, output.reconstructions[[i]])
        for name in maps:
            assert torch.equal(map_[name], maps[name][[i]])
            assert torch.equal(score[name], scores[name][[i]])


def test_threshold_and_percentile_refer_to_validation_normals() -> None:
    scorer = calibrated()
    scorer.normal_scores["mse"] = torch.arange(100, dtype=torch.float64)
    assert scorer.threshold("mse", 0.95) == 95.0  # 96 of 100 normals lie at or under it
    assert scorer.percentile("mse", torch.tensor([-1.0, 0.0, 49.5, 99.0])).tolist() == [
        0, 1, 50, 100]
