"""Scales of sampled elements: from whole layers or blocks, raised by what exceeds them."""

import pytest
import torch
from torch import Tensor

from altgrad.quantization import get_format
from altgrad.quantization.block_formats import get_formats
from altgrad.quantization.formats import Scaling
from altgrad.quantization.number_format import NumberFormat
from altgrad.twins.element_scales import ElementScales
from altgrad.twins.layout import Bucket, Layout
from altgrad.twins.sample import Sampled

E4M3 = get_format("e4m3fn")
[MXFP8] = get_formats("mxfp8_e4m3")
LAYOUT = Layout((Bucket(0, {"a": 4, "b": 2}),))
PLACES = LAYOUT.places
LAYERS = {
    name: Sampled(torch.zeros(count, 1), torch.Size((count, 1)), torch.arange(count))
    for name, count in {"a": 4, "b": 2}.items()
}


def make_scales(scaling: Scaling | None, amaxes: dict[str, Tensor]) -> ElementScales:
    def find(name: str, indices: Tensor) -> Tensor:
        groups = amaxes[name]
        return groups if len(groups) == 1 else groups[indices]

    made = ElementScales(scaling, find)
    made.read(LAYOUT, LAYERS, torch.device("cpu"))
    return made


def find_scales(
    scales: ElementScales, weights: Tensor, format: NumberFormat = E4M3
) -> tuple[list[float], list[float]]:
    """Return the scales of both layers."""
    amaxes = scales.start_amaxes(format, weights)
    found = scales.find_for_weights(format, weights, amaxes)
    assert found.shape == (64,)
    assert found.dtype == amaxes.dtype == torch.float32
    return found[PLACES["a"]].tolist(), found[PLACES["b"]].tolist()


def place_weights(a: list[float], b: list[float]) -> Tensor:
    weights = torch.zeros(64)
    weights[PLACES["a"]], weights[PLACES["b"]] = torch.tensor(a), torch.tensor(b)
    return weights


def test_a_layer_has_the_scale_of_its_own_amax() -> None:
    scales = make_scales("tensor", {"a": torch.tensor([448.0]), "b": torch.tensor([1.75])})
    assert find_scales(scales, torch.zeros(64)) == ([1.0] * 4, [2.0**-8] * 2)


def test_channels_have_scales_of_their_own() -> None:
    channels = torch.tensor([448.0, 224.0, 896.0, 448.0])
    scales = make_scales("channel", {"a": channels, "b": torch.tensor([448.0, 448.0])})
    assert find_scales(scales, torch.zeros(64)) == ([1.0, 0.5, 2.0, 1.0], [1.0] * 2)


@pytest.mark.parametrize(
    ("scaling", "expected"), [("tensor", [2.0] * 4), ("channel", [1.0, 1.0, 2.0, 1.0])]
)
def test_a_weight_beyond_its_scale_raises_it(scaling: Scaling, expected: list[float]) -> None:
    amax = torch.full((1 if scaling == "tensor" else 4,), 448.0)
    scales = make_scales(scaling, {"a": amax, "b": torch.tensor([448.0])})
    weights = place_weights([1.0, torch.nan, -449.0, torch.inf], [1.0, 2.0])
    assert find_scales(scales, weights) == (expected, [1.0] * 2)


def test_a_raised_scale_stays() -> None:
    scales = make_scales("tensor", {"a": torch.tensor([448.0]), "b": torch.tensor([448.0])})
    amaxes = scales.start_amaxes(E4M3, torch.zeros(64))
    scales.find_for_weights(E4M3, place_weights([0, 0, 0, 900.0], [0, 0]), amaxes)
    again = scales.find_for_weights(E4M3, torch.zeros(64), amaxes)
    assert again[PLACES["a"]].tolist() == [4.0] * 4
    assert again[PLACES["b"]].tolist() == [1.0] * 2
    assert find_scales(scales, torch.zeros(64))[0] == [1.0] * 4  # of amaxes that start again


def test_a_layer_of_zeros_has_the_scale_of_its_first_weights() -> None:
    scales = make_scales("tensor", {"a": torch.zeros(1), "b": torch.zeros(1)})
    assert find_scales(scales, place_weights([0, 0, 1.75, 0], [0, 0]))[0] == [2.0**-8] * 4


@pytest.mark.parametrize(("format", "scaling"), [("bf16", "tensor"), ("e4m3fn", None)])
def test_formats_without_a_scale_have_none(format: str, scaling: Scaling | None) -> None:
    scales = make_scales(scaling, {"a": torch.ones(1), "b": torch.ones(1)})
    assert scales.applied(get_format(format)) is None
    assert scales.find_for_states(get_format(format), "v", torch.zeros(64)) is None


def test_a_changed_amax_is_read_anew() -> None:
    amaxes = {"a": torch.tensor([448.0]), "b": torch.tensor([448.0])}
    scales = make_scales("tensor", amaxes)
    find_scales(scales, torch.zeros(64))
    amaxes["a"] = torch.tensor([896.0])
    scales.forget_amaxes()
    assert find_scales(scales, torch.zeros(64))[0] == [2.0] * 4


def test_blocks_have_scales_from_their_own_weights() -> None:
    """Rows of one element are blocks of one."""
    scales = make_scales("tensor", {"a": torch.ones(1), "b": torch.ones(1)})
    weights = place_weights([1.0, -256.0, 0.0, torch.nan], [1.0, 256.0])
    # 256 = 2**8, the largest power of two in e4m3
    assert find_scales(scales, weights, MXFP8) == ([2.0**-8, 1.0, 1.0, 1.0], [2.0**-8, 1.0])


def test_rows_begin_blocks() -> None:
    scales = ElementScales("tensor", lambda _name, _indices: torch.ones(1))
    layer = Sampled(torch.zeros(2, 2), torch.Size((2, 2)), torch.arange(4))
    scales.read(Layout((Bucket(0, {"w": 4}),)), {"w": layer}, torch.device("cpu"))
    weights = torch.zeros(64)
    weights[:4] = torch.tensor([1.0, 256.0, 1.0, 0.5])
    scale = scales.find_for_weights(MXFP8, weights, scales.start_amaxes(MXFP8, weights))
    assert scale[:4].tolist() == [1.0, 1.0, 2.0**-8, 2.0**-8]


def find_state_scales(scales: ElementScales, states: Tensor, name: str = "v") -> list[float]:
    found = scales.find_for_states(E4M3, name, states)
    assert found is not None
    return [*found[PLACES["a"]].tolist(), *found[PLACES["b"]].tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_state_has_the_scale_of_the_whole_state_of_the_run(dtype: torch.dtype) -> None:
    scales = make_scales("tensor", {"a": torch.ones(1), "b": torch.ones(1)})
    assert scales.find_unread() == {"a", "b"}
    whole = {
        "a": torch.tensor([[-448.0], [2.0], [0.0], [0.0]]),
        "b": torch.tensor([[1.0], [224.0]]),
    }
    scales.read_states({"v": {name: each.to(dtype) for name, each in whole.items()}})
    assert scales.find_unread() == set()
    assert find_state_scales(scales, torch.ones(64)) == [1.0] * 4 + [0.5] * 2


def test_channels_of_states_have_scales_of_their_own() -> None:
    scales = make_scales("channel", {"a": torch.ones(4), "b": torch.ones(2)})
    whole = {"a": torch.tensor([[448.0], [224.0], [0.0], [0.0]]), "b": torch.full((2, 1), 448.0)}
    scales.read_states({"v": whole})
    states = place_weights([0.0, 0.0, 896.0, 0.0], [0.0, 0.0])
    assert find_state_scales(scales, states) == [1.0, 0.5, 2.0, 1.0, 1.0, 1.0]


def test_a_state_that_exceeds_that_of_the_run_raises_its_scale_for_once() -> None:
    scales = make_scales("tensor", {"a": torch.ones(1), "b": torch.ones(1)})
    scales.read_states({"v": {"a": torch.full((4, 1), 448.0)}})
    states = place_weights([0.0, 449.0, 0.0, 0.0], [896.0, torch.nan])
    assert find_state_scales(scales, states) == [2.0] * 6
    assert find_state_scales(scales, torch.zeros(64))[:4] == [1.0] * 4


def test_a_state_that_the_run_lacks_has_the_scale_of_its_sample() -> None:
    scales = make_scales("tensor", {"a": torch.ones(1), "b": torch.ones(1)})
    states = place_weights([0.0, 448.0, 0.0, 0.0], [896.0, 0.0])
    assert find_state_scales(scales, states) == [1.0] * 4 + [2.0] * 2


def test_a_state_of_the_run_that_is_nan_sets_no_scale() -> None:
    scales = make_scales("tensor", {"a": torch.ones(1), "b": torch.ones(1)})
    scales.read_states({"v": {"a": torch.full((4, 1), torch.nan)}})
    states = place_weights([0.0, 448.0, 0.0, 0.0], [0.0, 0.0])
    assert find_state_scales(scales, states)[:4] == [1.0] * 4


def test_amaxes_of_states_are_restored_and_read_anew_for_layers_that_are_renewed() -> None:
    scales = make_scales("tensor", {"a": torch.ones(1), "b": torch.ones(1)})
    whole = {"a": torch.full((4, 1), 448.0), "b": torch.full((2, 1), 448.0)}
    scales.read_states({"v": whole})
    other = ElementScales("tensor", lambda _name, _indices: torch.ones(1))
    other.load_state_dict(scales.state_dict())
    other.read(LAYOUT, LAYERS, torch.device("cpu"), renewed={"b"})
    assert other.find_unread() == {"b"}
    assert find_state_scales(other, place_weights([0.0] * 4, [224.0, 0.0])) == [1.0] * 4 + [0.5] * 2
