"""`WeightSample`: which parameters have changed since a few of their weights were copied."""

import pytest
import torch
from torch import Tensor, nn

from altgrad.observation.weight_sample import WeightSample


def make(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_changed_parameters_are_named_in_their_order(dtype: torch.dtype) -> None:
    parameters = make(a=(3,), b=(), c=(70, 30), d=(0,), e=(33,))
    parameters = {name: each.to(dtype) for name, each in parameters.items()}
    sample = WeightSample(parameters)
    assert sample.find_changed(parameters) == []
    for name in ("e", "c", "b", "d"):
        parameters[name].mul_(1.01)
    assert sample.find_changed(parameters) == ["b", "c", "e"]


def test_weights_that_are_not_finite_are_compared_like_others() -> None:
    parameters = {"a": torch.tensor([torch.nan, torch.inf, 1.0])}
    sample = WeightSample(parameters)
    assert sample.find_changed(parameters) == []
    parameters["a"][1] = -torch.inf
    assert sample.find_changed(parameters) == ["a"]


def test_a_parameter_with_other_strides_is_the_same() -> None:
    weights = torch.randn(8, 3, 5, 5)
    sample = WeightSample({"a": weights})
    assert sample.find_changed({"a": weights.to(memory_format=torch.channels_last)}) == []


def test_a_parameter_that_another_one_replaces_is_not_compared() -> None:
    sample = WeightSample(parameters := make(a=(4,)))
    assert sample.find_changed(make(a=(4,))) == []
    parameters["a"].add_(1)
    assert sample.find_changed(parameters) == ["a"]


def test_new_and_reshaped_parameters_are_not_compared() -> None:
    sample = WeightSample(make(a=(4,), gone=(2,)))
    assert sample.find_changed(make(a=(5,), new=(3,))) == []


def test_a_parameter_without_memory_is_left_out() -> None:
    layer = nn.Linear(2, 2, device="meta")
    assert WeightSample(dict(layer.named_parameters())).find_changed({}) == []


def test_a_sample_is_taken_and_compared_in_inference_mode() -> None:
    parameters = make(a=(40,))
    with torch.inference_mode():
        sample = WeightSample(parameters)
        assert sample.find_changed(parameters) == []
    parameters["a"].add_(1)
    assert sample.find_changed(parameters) == ["a"]
