"""Adam on matrices so large that gradient and moments would fill the memory."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from test_train import interrupt_at, jumping_clock, same_state, without_timings

import train as train_module
from config import Config
from models import Linear
from train import Objective, Ranks, Run, load_checkpoint, start_run, train, train_step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny networks' outer matrices (32 x 16 and more numbers) count as large."""
    monkeypatch.setattr(train_module, "LARGE_MATRIX", 512)


def stepped(factors: bool, steps: int = 3, micro: int = 8, precision: str = "fp32",
            optimizer: str = "adam", **settings: object) -> tuple[Run, list[float]]:
    """A run after some steps on the same 8 images each time, and the losses."""
    config = Config(model="reversed_ae", width=4, image_size=32, latent_dim=16, batch_size=8,
                    epochs=1, optimizer=optimizer, **settings)
    run = start_run(config, CPU, precision)
    run.micro_batch = micro
    run.model.eval()  # BatchNorm's statistics would depend on the micro-batches
    large = [m for m in run.model.modules() if isinstance(m, Linear) and m.factors is not None]
    assert len(large) == (4 if train_module.LARGE_MATRIX == 512 else 0)
    if not factors:
        for layer in large:
            layer.factors = None
    grids = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    images = F.interpolate(grids, size=32).mul(255).byte()
    losses = []
    for _ in range(steps):
        losses.append(train_step(run, Objective(run.model), images, config, 8, CPU, precision,
                                 Ranks())[0])
        run.step += 1
    return run, losses


@pytest.mark.parametrize("seed", [0, 1, 2])  # 0: single numbers take steps of 8e-3
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_factors_give_the_same_step_as_the_gradient_itself(optimizer: str, seed: int) -> None:
    settings = {"optimizer": optimizer, "seed": seed}
    (start, _), (after_1, _), (after_2, _), (whole, losses) = (
        stepped(factors=False, steps=n, **settings) for n in range(4))
    for micro in (8, 3):
        other, same = stepped(factors=True, micro=micro, **settings)
        assert same == pytest.approx(losses, rel=1e-5)
        for a, b, c, d, x in zip(*(run.model.parameters() for run in
                                   (start, after_1, after_2, whole, other)), strict=True):
            way = ((b - a).abs() + (c - b).abs() + (d - c).abs()).detach()
            # bf16 moments may round differently: in each of the 3 steps by 1 of 256 of a step,
            # of its own (the second moment is that of row and column) and of an ordinary one.
            apart = (x - d).detach().abs()
            assert (apart <= (3 / 256 * (way + 1e-3)).clamp(min=2e-5)).all()
            assert apart.mean() < 1e-7 and (apart > 2e-6).float().mean() < 0.002
        assert all(m.weight.grad is None for m in other.model.modules() if isinstance(m, Linear))


def test_in_bf16_too_the_steps_stay_close_to_those_by_the_gradient() -> None:
    start, _ = stepped(factors=False, steps=0)
    whole, losses = stepped(factors=False, steps=10, precision="bf16")
    factored, same = stepped(factors=True, steps=10, precision="bf16")
    assert same == pytest.approx(losses, rel=5e-3)
    for was, a, b in zip(*(run.model.parameters() for run in (start, whole, factored)),
                         strict=True):
        if a.ndim == 2:  # single numbers may go another way, where the gradient is all but zero
            assert (a - b).abs().mean() < 0.25 * (a - was).abs().mean()


@pytest.mark.parametrize(("optimizer", "decay"), [("adam", 0.0), ("adamw", 0.01)])
def test_a_step_is_adams_with_a_second_moment_of_rank_one(optimizer: str, decay: float) -> None:
    """Against the formulae, in float64, for gradients of which nothing is special."""
    layer = Linear(40, 24)
    layer.weight.data *= 100  # else weight decay would be too small to be seen
    start = layer.weight.detach().double()
    config = Config(optimizer=optimizer)
    adam = train_module.make_optimizer(config, torch.nn.Sequential(layer), CPU)
    layer.factors = None
    gradients = torch.randn(5, 24, 40, generator=torch.Generator().manual_seed(0))
    weight, mean = start.clone(), torch.zeros_like(start)
    rows, columns = torch.zeros(24).double(), torch.zeros(40).double()
    for t, gradient in enumerate(gradients, 1):
        layer.weight.grad = gradient.clone()
        adam.step()
        g = gradient.double()
        mean = (0.9 * mean + 0.1 * g).bfloat16().double()
        rows = 0.999 * rows + 0.001 * g.square().mean(1)
        columns = 0.999 * columns + 0.001 * g.square().mean(0)
        second = rows[:, None] * columns / rows.mean() / (1 - 0.999**t)
        weight = weight * (1 - 1e-3 * decay) - 1e-3 / (1 - 0.9**t) * mean / second.sqrt()
    assert (layer.weight.double() - weight).abs().max() < 2e-5
    assert (weight - start).abs().max() > 2e-3  # of five steps of 1e-3
    state = adam.state[layer.weight]
    assert sum(v.numel() * v.element_size() for v in state.values()) < 2.5 * layer.weight.numel()


def test_it_learns_as_well_as_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"steps": 150, "objective": "plain", "augment": False}
    _, lean = stepped(factors=True, **settings)
    monkeypatch.setattr(train_module, "LARGE_MATRIX", 1 << 40)
    _, plain = stepped(factors=False, **settings)
    assert lean[-1] < 1.05 * plain[-1] and lean[-1] < 0.75 * lean[0]


def test_an_interrupted_and_resumed_run_is_bitwise_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model": "reversed_ae", "epochs": 4, "precision": "bf16"}
    (whole,) = train(tiny(tmp_path / "whole", **settings))
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "validate", interrupt_at(3))
        patch.setattr(train_module.time, "monotonic", jumping_clock())
        with pytest.raises(KeyboardInterrupt):
            train(tiny(tmp_path / "part", **settings))
    (part,) = train(tiny(tmp_path / "part", **settings, resume="auto"))
    states = [load_checkpoint(folder / "last.pt") for folder in (whole, part)]
    assert same_state(*(state["model"] for state in states))
    assert same_state(*(state["optimizer"] for state in states))
    moments = states[1]["optimizer"]["state"].values()
    assert sum(m["exp_avg"].dtype == torch.bfloat16 for m in moments) == 2
    assert without_timings(whole) == without_timings(part)
