"""Scripts that repeat published results give them on smaller runs, too."""

from __future__ import annotations

import pytest
import torch

from benchmarks.published import eco, pulse


def test_the_error_without_master_weights_grows_as_1_over_the_learning_rate() -> None:
    problem = eco.Quadratic.from_digits()
    rests = [eco.come_to_rest(problem, "e4m3fn", 0.4 * 4.0**-k) for k in range(6)]
    growing, saturated = eco.split(rests)
    assert len(growing) >= 2
    assert len(saturated) >= 2
    assert eco.slope(growing) == pytest.approx(-1, abs=0.2)
    assert eco.slope(saturated) == pytest.approx(0, abs=0.05)
    for rest in rests:
        assert rest.update <= 1  # no lost update exceeds half a spacing


def test_the_gradient_of_the_problem_is_0_at_its_optimum() -> None:
    problem = eco.Quadratic.from_digits()
    gradient = problem.gradient(problem.optimum)
    assert gradient.abs().max() < 1e-12
    nearby = problem.optimum + 1e-3
    assert problem.loss(nearby) > problem.loss(problem.optimum)
    variable = nearby.clone().requires_grad_()
    loss = (variable * (problem.hessian @ variable)).sum() / 2 - (variable * problem.target).sum()
    loss.backward()
    torch.testing.assert_close(problem.gradient(nearby), variable.grad)


def test_small_learning_rates_are_invisible_after_a_cast() -> None:
    shares = pulse.measured(pretraining=2, steps=2)
    assert [*shares] == [1e-6, 3e-6, 1e-5]
    cast, by_figure, by_chance = zip(*shares.values(), strict=True)
    assert cast == pytest.approx(by_figure, abs=1e-12)  # the monitor agrees with a cast
    assert cast == pytest.approx(by_chance, abs=5e-3)
    assert 1 > cast[0] > cast[1] > cast[2] > 0.7
