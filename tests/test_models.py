"""The two networks, the objectives, and the scorers' arithmetic."""

import copy
import dataclasses
import itertools
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models
from config import OBJECTIVES, Config, UserError
from models import (
    MODEL_CLASSES,
    SCALES,
    SCORERS,
    TEXTURE_SCALES,
    AnomalyScorer,
    Conv3x3,
    DenseGradient,
    Draws,
    Linear,
    Reading,
    TransposedConv3x3,
    add_foreign_patch,
    add_opacities,
    box_filter,
    coarse_noise,
    contrast,
    corrupt,
    create_model,
    exposed_like,
    folded,
    gaussian,
    low_passed,
    moved,
    objective_loss,
    read,
    soft_shapes,
    ssim_map,
    texture,
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


@pytest.mark.parametrize(("wide", "high"), [(300, 70), (30, 2048), (30, 1500)])
@pytest.mark.parametrize("keeps_factors", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_our_linear_is_torchs_in_fp32(wide: int, high: int, keeps_factors: bool, grad: bool,
                                      bf16: bool) -> None:
    layer, theirs = Linear(wide, high), torch.nn.Linear(wide, high)
    theirs.load_state_dict(layer.state_dict())
    layer.factors = [] if keeps_factors else None
    for rows in (1, 3, 8, 70):
        x = torch.randn(rows, wide, generator=gen(rows)).requires_grad_(grad)
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            ours = layer(x)
        expected = theirs(x)
        assert ours.is_contiguous() and ours.dtype == torch.float32
        assert (ours - expected).abs().max() < 1e-5
        if grad:
            wanted = [x, theirs.weight, theirs.bias]
            g = torch.randn(rows, high, generator=gen(rows + 1))
            for_x, for_weight, for_bias = torch.autograd.grad(expected, wanted, g)
            layer.zero_grad()
            ours.backward(g)
            weight_grad = layer.weight.grad
            if layer.factors is not None:
                (left, right), = layer.factors
                assert left.dtype == right.dtype == (torch.bfloat16 if bf16 else torch.float32)
                weight_grad, layer.factors = left.float().T @ right.float(), []
            close = 1e-5 if not (bf16 and keeps_factors) else 0.02
            assert (x.grad - for_x).abs().max() < 1e-4
            assert (weight_grad - for_weight).abs().max() < close * for_weight.abs().max()
            assert (layer.bias.grad - for_bias).abs().max() < 1e-4


# Several images at a time with a rest, strips of one with a rest, whole ones, narrow ones.
@pytest.mark.parametrize("channels,maps,images,high,wide", [
    (64, 80, 9, 16, 16), (64, 64, 2, 44, 48), (150, 32, 1, 8, 140), (64, 80, 3, 64, 4)])
@pytest.mark.parametrize("kind", ["stride 1", "stride 2", "transposed"])
def test_our_convolutions_have_torchs_gradients(
        kind: str, channels: int, maps: int, images: int, high: int, wide: int,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.OWN_WEIGHT_GRADIENTS", True)
    name = "winograd_weight_gradient" if kind == "stride 1" else "strided_weight_gradient"
    made = mock.Mock(wraps=getattr(models, name))
    monkeypatch.setattr(f"models.{name}", made)
    ours = (TransposedConv3x3(channels, maps) if kind == "transposed"
            else Conv3x3(channels, maps, int(kind[-1])))
    exact = copy.deepcopy(ours).double()  # which is torch's own
    for layout in (torch.channels_last, torch.contiguous_format):
        x = torch.randn(images, channels, high, wide, generator=gen())
        x, x64 = x.contiguous(memory_format=layout).requires_grad_(), x.double().requires_grad_()
        y, y64 = ours(x), exact(x64)
        g = torch.randn(y.shape, generator=gen(1)).contiguous(memory_format=layout)
        got = y, *torch.autograd.grad(y, [x, ours.weight], g)
        wanted = y64, *torch.autograd.grad(y64, [x64, exact.weight], g.double())
        for a, b in zip(got, wanted, strict=True):
            assert a.shape == b.shape and a.dtype == torch.float32
            assert (a - b).abs().max() < 1e-4 * b.std()
    assert made.call_count == 2


def test_our_convolutions_leave_to_torch_what_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.OWN_WEIGHT_GRADIENTS", True)
    x, weight = torch.rand(2, 64, 16, 16), torch.empty(64, 64, 3, 3)
    assert models.pays(x, weight)
    assert not models.pays(x, weight[1:]) and not models.pays(x[:1], weight)
    assert not models.pays(x[..., :14], weight) and not models.pays(x[:, :, :14], weight)
    assert not models.pays(x.double(), weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not models.pays(x, weight)
    with torch.no_grad():
        assert not models.pays(x, weight)


@pytest.mark.parametrize("bf16", [False, True])
def test_enlarging_gets_a_gradient_without_gaps(bf16: bool,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a tenth of the time then, and the values are the same bits."""
    model = small("unet").to(memory_format=torch.channels_last)
    x = torch.rand(2, 1, 32, 32, generator=gen())
    dense: list[bool] = []

    def watched(*args: object, **kwargs: object) -> Tensor:
        y = F.interpolate(*args, **kwargs)
        y.register_hook(lambda g: dense.append(g.is_contiguous(memory_format=torch.channels_last)))
        return y

    def gradients() -> list[Tensor]:
        dense.clear()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(x).float().square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    monkeypatch.setattr("models.F", SimpleNamespace(**vars(F) | {"interpolate": watched}))
    ours = gradients()
    assert dense == [True] * 4
    monkeypatch.setattr(DenseGradient, "apply", lambda y: y)
    theirs = gradients()
    assert not any(dense)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_a_folded_model_is_the_model_without_its_batchnorms(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, Config(width=4, image_size=32, latent_dim=16))
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        for numbers in (norm.running_mean, norm.bias):
            torch.nn.init.normal_(numbers)
        for numbers in (norm.running_var, norm.weight):
            torch.nn.init.uniform_(numbers, 0.5, 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small, images = folded(model), torch.rand(3, 1, 32, 32)
    with torch.no_grad():
        ours, theirs = read(small, images), read(model.eval(), images)
    torch.testing.assert_close(vars(ours), vars(theirs), atol=1e-5, rtol=1e-5)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in small.modules())
    assert not any(m.training for m in small.modules())
    # The model stays what it was, and its large matrices are not held twice.
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert {id(m) for m in small.modules() if isinstance(m, Linear)} == {
        id(m) for m in model.modules() if isinstance(m, Linear)}


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


def test_opacities_are_on_most_images_bright_and_dark_and_local() -> None:
    images = torch.full((400, 1, 64, 64), 0.5)
    seen = add_opacities(images, draws(400))
    share = changed(images, seen)
    assert 0.6 < (share > 0).float().mean() < 0.8
    assert 0.05 < share.mean() < 0.4
    change = (seen - images).mean((1, 2, 3))[share > 0]
    assert 0.55 < (change > 0).float().mean() < 0.85


def test_opacities_hide_detail_where_they_are_and_nowhere_else() -> None:
    flat = torch.full((200, 1, 64, 64), 0.5)
    stripes = 0.05 * torch.tensor([1.0, -1.0]).repeat(32)
    detail = add_opacities(flat + stripes, draws(200)) - add_opacities(flat, draws(200))
    left = (detail / stripes)[:, 0, :, 8:-8]  # the share of the stripes that can still be seen
    there = changed(flat, add_opacities(flat, draws(200))) > 0
    assert (left[~there] - 1).abs().max() < 1e-5
    assert 0.6 < (left[there] > 0.95).float().mean() < 0.95  # of the pixels: it is local
    faintest = left.amin((1, 2))
    assert faintest.min() < 0.2 and 0.1 < (faintest < 0.5).float().mean() < 0.6
    assert left.min() > -0.1 and left.max() < 1.01


def test_a_foreign_patch_is_on_half_of_the_images_and_comes_from_another_one() -> None:
    levels = torch.linspace(0, 1, 200)
    images = levels[:, None, None, None].expand(200, 1, 64, 64).contiguous()
    seen = add_foreign_patch(images, draws(200), images)
    share = changed(images, seen)
    assert 0.35 < (share > 0).float().mean() < 0.65
    assert share.max() < 0.9, "the patch must leave some of the image as it was"
    # With two images, what is pasted into one can only be the other.
    two = torch.zeros(2, 1, 64, 64)
    two[1] = 1
    pasted = torch.stack([add_foreign_patch(two, draws(2, s), two) for s in range(20)])
    assert pasted[:, 0].max() > 0.5 and pasted[:, 1].min() < 0.5
    alone = images[:1]
    assert torch.equal(add_foreign_patch(alone, draws(1, 1), alone), alone)


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
    class Copy(torch.nn.Module):
        def reconstructions(self, x: Tensor, share: float) -> list[Tensor]:
            return [x]

    images = torch.rand(4, 1, 32, 32, generator=gen())
    noisy = corrupt(images, "heal", draws(4))
    assert objective_loss(Copy(), images, images) == 0
    expected = (noisy - images).abs().mean()
    assert torch.allclose(objective_loss(Copy(), noisy, images), expected)


def test_a_ranks_slice_meets_the_same_random_numbers_as_in_the_whole_batch() -> None:
    images = torch.rand(6, 1, 32, 32, generator=gen())
    slices = ((0, 4), (4, 6))
    whole = corrupt(images, "denoise", draws(6, 3))
    parts = [corrupt(images[a:b], "denoise", Draws(gen(3), b - a, a, 6)) for a, b in slices]
    assert torch.equal(torch.cat(parts), whole)
    # A foreign patch comes from the slice's own images; all else of heal is the same too.
    same = images[:1].expand(6, 1, 32, 32).contiguous()
    whole = corrupt(same, "heal", draws(6, 3))
    parts = [corrupt(same[a:b], "heal", Draws(gen(3), b - a, a, 6)) for a, b in slices]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)


def test_box_filter_is_the_mean_of_what_lies_inside() -> None:
    x = torch.rand(1, 1, 9, 9, generator=gen())
    y = box_filter(x, 3)
    assert torch.allclose(y[0, 0, 4, 4], x[0, 0, 3:6, 3:6].mean())
    assert torch.allclose(y[0, 0, 0, 0], x[0, 0, :2, :2].mean())


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


def reading(residual: Tensor, seed: int = 0) -> Reading:
    """A Reading of two views, one blank and one of fixed texture, and random features."""
    features = torch.randn(len(residual), 6, generator=gen(seed))
    texture = 0.1 * torch.rand(1, 1, *residual.shape[2:], generator=gen(8)).expand_as(residual)
    return Reading(residual, torch.cat([0 * residual, texture], 1), features)


def matched(image: Tensor, view: Tensor) -> Tensor:
    """The view [H,W] in the brightness and contrast of the image [H,W], by numpy's line."""
    x, y = view.double().numpy().ravel(), image.double().numpy().ravel()
    slope = np.polyfit(x, y, 1)[0] if x.std() else 1.0
    fitted = y.mean() + np.clip(slope, 0.5, 2) * (x - x.mean())
    return torch.from_numpy(fitted.reshape(view.shape)).float()


def normal_residual(count: int, size: int, seed: int) -> Tensor:
    return 0.1 + 0.05 * torch.randn(count, 1, size, size, generator=gen(seed))


def faded(reading: Reading) -> Reading:
    """The same, reconstructed with a tenth less contrast in its left third."""
    views = reading.views.clone()
    left = views[..., : views.shape[-1] // 3]
    left += 0.1 * (left.mean((2, 3), keepdim=True) - left)
    return dataclasses.replace(reading, views=views)


def calibrated(size: int = 16, n: int = 50) -> AnomalyScorer:
    scorer = AnomalyScorer()
    for i, part in enumerate(normal_residual(n, size, 3).split(7)):
        scorer.add(reading(part, i), faded(reading(part, i)))
    scorer.finish()
    scorer.refer_to([scorer.scores(reading(part, 100 + i))
                     for i, part in enumerate(normal_residual(100, size, 4).split(30))])
    return scorer


def test_maps_are_moved_by_whole_pixels_and_edges_repeated() -> None:
    x = torch.rand(3, 2, 8, 8, generator=gen(1))
    shift = torch.tensor([[0, 0], [2, -1], [-3, 1]])
    for got, image, (down, right) in zip(moved(x, shift), x, shift.tolist(), strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (3, 3), (3, 3)), mode="edge")
        assert np.array_equal(got, padded[:, 3 - down : 11 - down, 3 - right : 11 - right])


def test_the_framing_of_an_image_is_how_normal_ones_lie() -> None:
    def film(seed: int, exposure: float = 1) -> Tensor:
        place = torch.linspace(-1, 1, 40)
        heart = torch.exp(-8 * ((place[:, None] - 0.1) ** 2 + (place + 0.2) ** 2))
        noise = 0.1 * torch.randn(8, 1, 40, 40, generator=gen(seed))
        return 0.3 + exposure * (0.4 * heart + noise)

    scorer = AnomalyScorer()
    for i in range(10):
        x = film(i)
        usual = Reading(x, x + 0.1 * torch.randn(x.shape, generator=gen(30 + i)), x[:, 0, 0, :4])
        scorer.add(usual, faded(usual))
    scorer.finish()
    assert torch.allclose(scorer.mean_image, torch.cat([film(i) for i in range(10)]).mean(0))
    steps = (-4, -2, 0, 2, 4)  # twentieths of the side
    for down, right in itertools.product(steps, repeat=2):
        shift = torch.tensor([[down, right]]).expand(8, 2)
        assert torch.equal(scorer.framing(moved(film(20), shift)), -shift)
        assert torch.equal(scorer.framing(moved(film(21, 0.5), shift)), -shift)
    shift = torch.tensor([[7, -8]]).expand(8, 2)
    assert torch.equal(scorer.framing(moved(film(22), shift)), torch.tensor([[-4, 4]]).expand(8, 2))
    assert scorer.framing(torch.zeros(2, 1, 40, 40)).shape == (2, 2)


def test_the_lower_of_two_scores_counts_for_each_scorer() -> None:
    scorer = calibrated()
    one, other = (scorer.scores(reading(normal_residual(6, 16, seed))) for seed in (20, 21))
    got = scorer.lower(one, other)
    assert list(got) == list(SCORERS)
    for name in SCORERS:
        if name != "fused":
            assert torch.equal(got[name], torch.minimum(one[name], other[name]))
    assert (got["fused"] <= torch.minimum(one["fused"], other["fused"])).all()
    assert torch.equal(scorer.lower(one, one)["fused"], one["fused"])


def test_read_gives_reconstruction_and_features_from_one_pass() -> None:
    for name in MODEL_CLASSES:
        model = small(name).eval()
        x = torch.rand(3, 1, 32, 32, generator=gen())
        got = read(model, x)
        assert torch.equal(got.images, x) and torch.equal(got.reconstruction, model(x))
        assert torch.equal(got.views, torch.cat(model.reconstructions(x), 1))
        _, a, b, *_ = model.features(x)
        expected = [a.mean((2, 3)), a.std((2, 3)), b.mean((2, 3)), b.std((2, 3))]
        assert torch.allclose(got.features, torch.cat(expected, 1), atol=1e-6)


def test_the_gaussian_is_that_of_the_features_and_bears_fewer_images_than_features() -> None:
    mixing = torch.eye(6, dtype=torch.float64) + 0.2 * torch.randn(6, 6, generator=gen())
    x = 3 + torch.randn(20_000, 6, generator=gen(1), dtype=torch.float64) @ mixing
    mean, whitening = gaussian(x)
    white = (x - mean) @ whitening
    assert torch.allclose(mean, x.mean(0))
    assert torch.allclose(white.T @ white / len(x), torch.eye(6, dtype=x.dtype), atol=0.1)
    few = torch.randn(20, 50, generator=gen(2), dtype=torch.float64)
    few[:, 7] = 1.0  # a dead channel
    mean, whitening = gaussian(few)
    held_out = torch.randn(500, 50, generator=gen(3), dtype=torch.float64)
    held_out[:, 7] = 1.0
    distance = ((held_out - mean) @ whitening).square().mean(1)
    assert torch.isfinite(distance).all() and distance.mean() < 3
    held_out[:, 7] = 2.0  # which speaks for the first time: noticed, in proportion
    heard = ((held_out - mean) @ whitening).square().mean(1)
    assert distance.mean() + 0.1 < heard.mean() < distance.mean() + 1000


def local_deviation(x: np.ndarray, side: int) -> np.ndarray:
    """Of [H,W], over the window around each pixel as far as it lies in the image."""
    half = side // 2
    return np.array([[x[max(0, i - half) : i + half + 1, max(0, j - half) : j + half + 1].std()
                      for j in range(x.shape[1])] for i in range(x.shape[0])])


def test_texture_is_the_log_ratio_of_local_contrast() -> None:
    x, y, z = torch.rand(3, 2, 1, 32, 32, generator=gen(3))
    got = texture(Reading(x, torch.cat([y, 0.5 * z], 1), x))
    assert got.shape == (2, 2 * len(TEXTURE_SCALES), 32, 32)
    for i, side in enumerate((3, 5)):  # 1/16 and 1/8 of 32 pixels, and odd
        for j, view in enumerate((y, 0.5 * z)):
            a, b = (np.log(local_deviation(t[1, 0].double().numpy(), side) + 1 / 255)
                    for t in (x, view))
            assert np.allclose(got[1, 2 * i + j].numpy(), a - b, atol=1e-4)
            assert np.allclose(contrast(Reading(x, y, x))[1, i].numpy(), a, atol=1e-4)
    # Brightness is no texture, and a flat image has little of it, not infinitely little.
    assert torch.allclose(texture(Reading(x + 0.3, y - 0.2, x)), texture(Reading(x, y, x)),
                          atol=1e-3)
    flat = texture(Reading(torch.full_like(x, 0.4), y, x))
    assert torch.isfinite(flat).all() and (flat < -2).all()


def test_trace_is_what_lesions_do_to_the_reconstruction_less_what_is_usual() -> None:
    """Normal reconstructions differ in contrast as a whole; lesions lower it on the left."""
    def film(seed: int) -> Reading:
        view = torch.rand(8, 1, 48, 48, generator=gen(seed)) - 0.5
        view = 0.5 + view * torch.empty(8, 1, 1, 1).uniform_(0.3, 0.9, generator=gen(seed + 50))
        return Reading(torch.rand(8, 1, 48, 48, generator=gen(seed)), view, torch.zeros(8, 2))

    scorer, films = AnomalyScorer(), [film(i) for i in range(20)]
    for i, each in enumerate(films):
        scorer.add(each, faded(each) if i % 4 == 0 else None)
    scorer.finish()

    def regions(readings: list[Reading]) -> np.ndarray:
        views = torch.cat([r.reconstruction for r in readings]).double()
        spread = (box_filter(views**2, 5) - box_filter(views, 5) ** 2).sqrt()  # 1/16 of the side
        log = (spread + 1 / 255).log().numpy()
        return log.reshape(-1, 3, 16, 3, 16).mean((2, 4)).reshape(-1, 9)

    seen, lesioned = regions(films), films[::4]
    change = (regions([faded(r) for r in lesioned]) - regions(lesioned)).mean(0)
    weights = np.linalg.inv(np.cov(seen.T, bias=True) + 0.05**2 * np.eye(9)) @ change
    for r in (film(30), faded(film(30))):
        expected = (regions([r]) - seen.mean(0)) @ weights
        assert np.allclose(scorer.scores(r)["trace"].numpy(), expected, atol=1e-3 * expected.std())
    # A lesion that is far smaller than what contrasts differ by raises it; less contrast does not.
    usual = film(31)
    whole = dataclasses.replace(usual, views=0.5 + 0.9 * (usual.views - 0.5))
    normal, sick, dull = (scorer.scores(r)["trace"] for r in (usual, faded(usual), whole))
    assert ((sick - normal) > 5 * (dull - normal).abs()).all()
    assert (sick > normal.max()).all()


def test_where_lesions_leave_no_trace_none_is_looked_for() -> None:
    """A network may answer a lesion now with more contrast and now with less."""
    def film(seed: int) -> Reading:
        view = 0.5 + 0.6 * (torch.rand(8, 1, 48, 48, generator=gen(seed)) - 0.5)
        return Reading(torch.rand(8, 1, 48, 48, generator=gen(seed)), view, torch.zeros(8, 2))

    for lesion, there in ((lambda r: r, False), (faded, True)):
        scorer = AnomalyScorer()
        for i in range(16):
            scorer.add(film(i), lesion(film(100 + i)))
        scorer.finish()
        assert bool(scorer.trace.any()) == there
        scorer.refer_to([scorer.scores(film(i)) for i in range(40, 45)])
        found = scorer.scores(faded(film(50)))
        assert bool((scorer.percentile("trace", found["trace"]) == 100).all())
        assert bool((found["trace"] == 0).all()) == (not there)
        assert torch.isfinite(found["fused"]).all()


def test_lost_contrast_is_seen_where_residuals_hardly_change() -> None:
    """Fine structure that is half as strong: no grey value changes by more than noise does."""
    def read_film(noise: float, seed: int) -> Reading:
        fine = 0.05 * torch.randn(1, 1, 64, 64, generator=gen(seed))
        view = 0.5 + 0.05 * torch.randn(1, 1, 64, 64, generator=gen(seed + 1000))
        return Reading(0.5 + noise * fine, view, torch.randn(1, 4, generator=gen(seed)))

    scorer = AnomalyScorer()
    for i in range(40):
        scorer.add(read_film(1, i), faded(read_film(1, i)))
    scorer.finish()
    scorer.refer_to([scorer.scores(read_film(1, 100 + i)) for i in range(40)])
    hazy = scorer.scores(read_film(0.5, 200))
    percent = {name: float(scorer.percentile(name, hazy[name])) for name in SCORERS}
    assert percent["texture"] == percent["haze"] == percent["fused"] == 100
    assert percent["zscore"] < 50
    followed = read_film(0.5, 200)
    followed = dataclasses.replace(followed, views=0.5 + 0.5 * (followed.views - 0.5))
    followed = scorer.scores(followed)  # a reconstruction as hazy as its film
    assert scorer.percentile("texture", followed["texture"]) < 100
    assert followed["haze"] == hazy["haze"]
    grainy = scorer.scores(read_film(2, 200))  # as unusual, but the other way
    assert scorer.percentile("texture", grainy["texture"]) == 100
    assert scorer.percentile("haze", grainy["haze"]) == 0
    map_ = scorer.anomaly_map("texture", read_film(0.5, 200))
    assert map_.shape == (1, 1, 64, 64) and hazy["texture"] == pytest.approx(float(map_.mean()))


def test_calibration_is_mean_and_deviation_of_the_low_passed_residual() -> None:
    scorer = calibrated()
    residual = normal_residual(50, 16, 3)
    assert scorer.count == 50
    assert scorer.mean["zscore"].shape == (2 * len(SCALES), 16, 16)
    assert scorer.mean["texture"].shape == (2 * len(TEXTURE_SCALES), 16, 16)
    # Texture is held against what is usual within an eighth of the side: 2 pixels each way.
    maps = texture(reading(residual)).double()
    mean = box_filter(maps.mean(0)[None], 5)[0]
    assert torch.allclose(scorer.mean["texture"].double(), mean, atol=1e-5)
    variance = box_filter(maps.square().mean(0)[None], 5)[0] - mean.square()
    assert torch.allclose(scorer.std["texture"].double(),
                          variance.sqrt().clamp(min=0.05), atol=1e-3)
    views = reading(residual).views
    for i in range(2 * len(SCALES)):
        scale, view = SCALES[i // 2], views[:, i % 2]
        rest = torch.stack([x - matched(x, v) for x, v in zip(residual[:, 0], view, strict=True)])
        seen = box_filter(rest[:, None], 2 * round(scale * 8) + 1)
        assert torch.allclose(scorer.mean["zscore"][i], seen.mean(0)[0], atol=1e-6)
        expected = seen.std(0).mean().item()
        assert scorer.std["zscore"][i].mean().item() == pytest.approx(expected, rel=0.1)


def test_maps_and_scores_by_definition() -> None:
    scorer = calibrated()
    x, y = torch.rand(2, 3, 1, 16, 16, generator=gen(4))
    both = Reading(x, torch.cat([y, y.flip(2)], 1), torch.randn(3, 6, generator=gen(5)))
    assert torch.allclose(scorer.anomaly_map("mse", both), (x - y) ** 2)
    assert torch.allclose(scorer.anomaly_map("mae", both), (x - y).abs())
    assert torch.allclose(scorer.anomaly_map("ssim", both), 1 - ssim_map(x, y))
    z = scorer.anomaly_map("zscore", both)
    rests = [torch.stack([a - matched(a, b) for a, b in zip(x[:, 0], view[:, 0], strict=True)])
             for view in (y, y.flip(2))]
    seen = [box_filter(rest[:, None], 2 * round(scale * 8) + 1)[:, 0]
            for scale in SCALES for rest in rests]
    expected = torch.stack([(r - m) / s for r, m, s in zip(
        seen, scorer.mean["zscore"], scorer.std["zscore"], strict=True)], 1)
    # 1/32 of 16 pixels, and odd: a window of one pixel.
    assert torch.allclose(z[:, 0], expected.square().mean(1).sqrt(), atol=1e-5)
    scores = scorer.scores(both)
    assert tuple(scores) == tuple(SCORERS)
    assert torch.allclose(scores["mse"], ((x - y) ** 2).mean((1, 2, 3)).double())
    deviations = expected.abs().mean(1)
    assert torch.allclose(scores["zscore"], deviations.mean((1, 2)).double())
    top = deviations.flatten(1).max(1).values  # 0.3 % of 256 pixels is one
    assert torch.allclose(scores["peak"], top.double())
    fused = 0
    ratio = (texture(both) - scorer.mean["texture"]) / scorer.std["texture"]
    assert torch.allclose(scores["texture"], ratio.abs().mean((1, 2, 3)).double())
    assert torch.allclose(scorer.anomaly_map("texture", both)[:, 0], ratio.abs().mean(1))
    lack = (scorer.mean["haze"] - contrast(both)) / scorer.std["haze"]
    assert torch.allclose(scores["haze"], lack.mean((1, 2, 3)).double())
    assert torch.allclose(scorer.anomaly_map("haze", both)[:, 0], lack.clamp(min=0).mean(1))
    for name in ("peak", "texture", "haze", "trace"):
        normal = scorer.normal_scores[name]
        deviations = (scores[name] - normal.mean()) / normal.std(correction=0).clamp(min=1e-9)
        fused += torch.log1p(torch.exp(deviations)) / 4
    assert torch.allclose(scores["fused"], fused)
    with pytest.raises(UserError, match="--scorer nonsense"):
        scorer.anomaly_map("nonsense", both)


def test_any_part_raises_the_fused_score() -> None:
    scorer = calibrated()
    usual = reading(normal_residual(1, 16, 7), 7)
    before = scorer.scores(usual)["fused"]
    focal = dataclasses.replace(usual, images=usual.images.clone())
    focal.images[..., 4:7, 4:7] += 0.2
    assert scorer.scores(focal)["fused"] > before + 1
    # A part that finds the image more normal than normal takes nothing away from the other.
    hazy = dataclasses.replace(usual, images=0.1 + 0.2 * (usual.images - 0.1))
    assert scorer.scores(hazy)["peak"] < scorer.normal_scores["peak"].min()
    assert scorer.scores(hazy)["fused"] > before + 1


def test_exposure_is_no_anomaly_but_a_blank_or_inverted_image_is_one() -> None:
    x = torch.rand(4, 1, 16, 16, generator=gen(1))
    views = torch.cat([x + 0.05 * torch.randn(4, 1, 16, 16, generator=gen(2)), x.flip(2)], 1)
    usual = low_passed(Reading(x, views, x))
    for factor, brightness in ((1, 0.1), (0.7, 0), (1.3, -0.1)):
        # What a network makes of another exposure, if it keeps it in one view and not in the other.
        other = factor * x + brightness
        seen = Reading(other, torch.cat([factor * views[:, :1] + brightness, views[:, 1:]], 1), x)
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
    normal, sick = reading(normal), reading(sick)
    for name in ("fused", "zscore", "peak", "mse"):
        assert scorer.scores(sick)[name] > scorer.scores(normal)[name]
    for name in ("fused", "mse"):
        map_ = scorer.anomaly_map(name, sick)
        assert map_[..., 40:50, 10:20].mean() > 2 * map_.mean()
    squares = scorer.z("zscore", sick).square().mean(1, keepdim=True)  # windows of 1/32 of 64
    local = F.avg_pool2d(squares, 3, stride=1, padding=1, count_include_pad=False).sqrt()
    assert torch.allclose(scorer.anomaly_map("fused", sick), local, atol=1e-5)


@pytest.mark.parametrize("model_name", MODEL_CLASSES)
def test_a_score_does_not_depend_on_the_rest_of_the_batch(model_name: str) -> None:
    model, scorer = small(model_name).eval(), AnomalyScorer()
    x = torch.rand(6, 1, 32, 32, generator=gen(5))
    with torch.inference_mode():
        normal = read(model, torch.rand(40, 1, 32, 32, generator=gen(6)))
        scorer.add(normal, faded(normal))
        scorer.finish()
        scorer.refer_to([scorer.scores(read(model, torch.rand(9, 1, 32, 32, generator=gen(7))))])
        together = scorer.scores(read(model, x))
        alone = [scorer.scores(read(model, i)) for i in x.split(1)]
        for name in SCORERS:
            one_by_one = torch.cat([a[name] for a in alone])
            assert torch.allclose(together[name], one_by_one, rtol=1e-4, atol=1e-6), name
        # What the network gave once is scored bitwise the same in any company.
        whole = read(model, x)
        alone = [scorer.scores(Reading(whole.images[[i]], whole.views[[i]], whole.features[[i]]))
                 for i in range(6)]
        for name in SCORERS:
            assert torch.equal(torch.cat([a[name] for a in alone]), together[name]), name


def test_threshold_and_percentile_refer_to_validation_normals() -> None:
    scorer = calibrated()
    scorer.normal_scores["mse"] = torch.arange(100, dtype=torch.float64)
    assert scorer.threshold("mse", 0.95) == 95.0  # 96 of 100 normals lie at or under it
    assert scorer.percentile("mse", torch.tensor([-1.0, 0.0, 49.5, 99.0])).tolist() == [
        0, 1, 50, 100]


def test_a_scorer_survives_its_state_dict() -> None:
    scorer, copy = calibrated(), AnomalyScorer()
    copy.load_state_dict(scorer.state_dict())
    x, y = torch.rand(2, 2, 1, 16, 16, generator=gen(6))
    both = Reading(x, torch.cat([y, y], 1), torch.randn(2, 6, generator=gen(5)))
    assert torch.equal(scorer.anomaly_map("zscore", both), copy.anomaly_map("zscore", both))
    for name, value in scorer.scores(both).items():
        assert torch.equal(value, copy.scores(both)[name])
    assert copy.threshold("ssim", 0.9) == scorer.threshold("ssim", 0.9)
