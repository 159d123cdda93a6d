"""LeanAdam: Adam for matrices so large that gradient and moments would fill the memory."""

import dataclasses

import pytest
import torch

import train as train_module
from config import Config
from models import Linear, Setup
from train import (
    is_large, make_optimizer, new_state, train_step)

CPU = Setup(torch.device("cpu"))
SMALL = Config(model="reversed_ae", width=4, image_size=32, latent_dim=16, epochs=1)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny networks' outer matrices (32 x 16 and more numbers) count as large."""
    monkeypatch.setattr(train_module, "LARGE_MATRIX", 512)


def test_a_step_is_adams_with_a_second_moment_of_rank_one() -> None:
    """Against the formulae, in float64, for gradients of which nothing is special."""
    layer = Linear(40, 24)
    start = layer.weight.detach().double()
    adam = make_optimizer(Config(optimizer="lean_adam"), layer, CPU)
    gradients = torch.randn(5, 24, 40, generator=gen(0))
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
        weight = weight - 1e-3 / (1 - 0.9**t) * mean / second.sqrt()
    assert (layer.weight.double() - weight).abs().max() < 2e-5
    assert (weight - start).abs().max() > 2e-3  # of five steps of 1e-3
    state = adam.state[layer.weight]
    assert sum(v.numel() * v.element_size() for v in state.values()) < 2.5 * layer.weight.numel()


@pytest.mark.parametrize("name", ["adam", "lean_adam"])
def test_adam_is_torchs_for_all_parameters_and_lean_adam_for_those_that_are_not_large(
        name: str) -> None:
    torch.manual_seed(0)
    ours = torch.nn.Sequential(Linear(40, 24), Linear(24, 8))
    theirs = torch.nn.Sequential(torch.nn.Linear(40, 24), torch.nn.Linear(24, 8))
    mine = make_optimizer(Config(optimizer=name), ours, CPU)
    torchs = torch.optim.Adam(theirs.parameters(), lr=1e-3, fused=True)
    assert (type(mine) is torch.optim.Adam) == (name == "adam")
    for seed in range(3):
        theirs.load_state_dict(ours.state_dict())  # a large matrix is not to change the others
        for model, optimizer in ((ours, mine), (theirs, torchs)):
            optimizer.zero_grad()
            model(torch.randn(4, 40, generator=gen(seed))).square().sum().backward()
            optimizer.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            lean = name == "lean_adam" and is_large(a)
            assert torch.equal(a, b) != lean
            assert ("row_sq" in mine.state[a]) == lean


@pytest.mark.parametrize("micro", [8, 3])
def test_factors_of_a_gradient_give_the_step_of_the_gradient(micro: int) -> None:
    config = dataclasses.replace(SMALL, micro_batch=micro)
    images, weights = torch.rand(8, 1, 32, 32, generator=gen(1)).mul(255).byte(), []
    for factored in (True, False):
        state = new_state(config, CPU)
        large = [p for p in state.model.parameters() if is_large(p)]
        assert len(large) == 4 and all(p.factors == [] for p in large)
        for parameter in large if not factored else []:
            del parameter.factors
        for state.step in range(3):
            train_step(state, images, 8)
        assert all((p.grad is None) for p in large)
        weights.append([p.detach().clone() for p in large])
    for a, b in zip(*weights, strict=True):  # bf16 moments may be rounded another way
        assert (a - b).abs().max() < 5e-5 and (a - b).abs().mean() < 1e-6
