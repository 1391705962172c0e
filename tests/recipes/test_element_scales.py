"""Scales of sampled elements: from whole layers or blocks, never from the maximum of a sample."""

import pytest
import torch
from torch import Tensor

from altgrad.quantization import get_format
from altgrad.quantization.block_formats import get_formats
from altgrad.quantization.formats import Scaling
from altgrad.recipes.element_scales import ElementScales
from altgrad.recipes.layout import Bucket, Layout

E4M3 = get_format("e4m3fn")
LAYOUT = Layout((Bucket(0, {"a": 4, "b": 2}),))
PLACES = LAYOUT.places


def scales(scaling: Scaling | None, amaxes: dict[str, Tensor]) -> ElementScales:
    def find(name: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        groups = amaxes[name]
        return (groups if len(groups) == 1 else groups[indices]), groups.amax().view(1)

    made = ElementScales(scaling, find)
    indices = {name: torch.arange(place.stop - place.start) for name, place in PLACES.items()}
    made.read(LAYOUT, indices, torch.zeros(1))
    return made


def test_a_layer_has_the_scale_of_its_own_amax() -> None:
    each = scales("tensor", {"a": torch.tensor([448.0]), "b": torch.tensor([1.75])})
    scale = each.find_for_weights(E4M3, torch.zeros(64))
    assert scale is not None
    assert scale[PLACES["a"]].tolist() == [1.0] * 4
    assert scale[PLACES["b"]].tolist() == [2.0**-8] * 2
    assert scale.shape == (64,)


def test_channels_have_scales_of_their_own() -> None:
    channels = torch.tensor([448.0, 224.0, 896.0, 448.0])
    each = scales("channel", {"a": channels, "b": torch.tensor([448.0])})
    scale = each.find_for_weights(E4M3, torch.zeros(64))
    assert scale is not None
    assert scale[PLACES["a"]].tolist() == [1.0, 0.5, 2.0, 1.0]


@pytest.mark.parametrize(("format", "scaling"), [("bf16", "tensor"), ("e4m3fn", None)])
def test_formats_without_a_scale_have_none(format: str, scaling: Scaling | None) -> None:
    each = scales(scaling, {"a": torch.ones(1), "b": torch.ones(1)})
    assert each.find_for_weights(get_format(format), torch.zeros(64)) is None


def test_a_changed_amax_is_read_anew() -> None:
    amaxes = {"a": torch.tensor([448.0]), "b": torch.tensor([448.0])}
    each = scales("tensor", amaxes)
    each.find_for_weights(E4M3, torch.zeros(64))
    amaxes["a"] = torch.tensor([896.0])
    each.forget_amaxes()
    scale = each.find_for_weights(E4M3, torch.zeros(64))
    assert scale is not None
    assert scale[0] == 2.0


def test_blocks_have_scales_from_their_own_weights() -> None:
    [mxfp8] = get_formats("mxfp8_e4m3")
    each = scales("tensor", {"a": torch.ones(1), "b": torch.ones(1)})
    weights = torch.zeros(64)
    weights[PLACES["a"]] = torch.tensor([1.0, -256.0, 0.0, float("nan")])
    weights[PLACES["b"]] = 1.0
    scale = each.find_for_weights(mxfp8, weights)
    assert scale is not None
    assert scale[PLACES["a"]].tolist() == [1.0] * 4  # 256 = 2**8, the largest power in e4m3
    assert scale[PLACES["b"]].tolist() == [2.0**-8] * 2
    assert scale[10] == 0  # a block of zeros


def test_a_state_has_the_scale_of_the_whole_state_of_the_run() -> None:
    each = scales("tensor", {"a": torch.ones(1), "b": torch.ones(1)})
    each.set_state_amaxes({"v": {"a": torch.tensor(448.0), "b": torch.tensor(224.0)}})
    scale = each.find_for_state(E4M3, "v", torch.ones(64), slice(0, 64))
    assert scale is not None
    assert scale[[0, 3, 4, 5]].tolist() == [1.0, 1.0, 0.5, 0.5]


def test_a_state_that_the_run_lacks_has_the_scale_of_its_sample() -> None:
    each = scales("tensor", {"a": torch.ones(1), "b": torch.ones(1)})
    state = torch.zeros(64)
    state[1], state[4] = 448.0, 896.0
    scale = each.find_for_state(E4M3, "v", state, slice(0, 64))
    assert scale is not None
    assert scale[[0, 3, 4, 5]].tolist() == [1.0, 1.0, 2.0, 2.0]
