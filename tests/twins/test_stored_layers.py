"""`find_spacings`: the distance between the numbers that a storage has."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn

from altgrad import SamplingRule, WeightStorage
from altgrad.twins.layout import Bucket, Layout
from altgrad.twins.sample import Sampled
from altgrad.twins.stored_layers import find_spacings


@pytest.mark.parametrize("scaling", [None, "tensor", "channel", ("block", 4)], ids=str)
def test_spacings_are_distances_to_the_next_numbers_that_are_stored(scaling: object) -> None:
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(6, 16, generator=random) * 2.0 ** torch.arange(-3, 3).view(6, 1)
    net = nn.ParameterDict({name: nn.Parameter(weights.clone()) for name in ("a", "b")})
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    rules = [SamplingRule("b", enabled=False)]
    storage = WeightStorage("e4m3fn", scaling, layers=rules).attach(optimizer, module=net)
    indices = torch.tensor([0, 5, 17, 40, 95])
    layers = {name: Sampled(each, each.shape, indices) for name, each in net.items()}
    layout = Layout((Bucket(0, {"a": 5, "b": 5}, None),))
    flat = torch.zeros(layout.length)
    for name, place in layout.places.items():
        flat[place] = net[name].detach().flatten()[indices]
    found = find_spacings(optimizer, layers, layout, flat)
    assert found.dtype == torch.float64
    assert not found[layout.places["b"]].any()
    assert found.count_nonzero() == 5
    for index, spacing in zip(indices, found[layout.places["a"]].tolist(), strict=True):
        # A weight that grows by less than half of a spacing is stored as before; by more, it moves.
        stored = net["a"].detach().flatten()[index].item()
        for share, moves in ((0.49, False), (0.51, True)):
            with torch.no_grad():
                net["a"].grad = torch.zeros(6, 16)
                step = share * spacing * (1 if stored >= 0 else -1)
                net["a"].grad.view(-1)[index] = -step / 0.1
            before = net["a"].detach().clone()
            optimizer.step()
            after = net["a"].detach().flatten()[index].item()
            assert (after != stored) == moves
            if moves:
                assert abs(Fraction(after) - Fraction(stored)) == Fraction(spacing)
            with torch.no_grad():
                net["a"].copy_(before)
    storage.detach()
    assert not find_spacings(optimizer, layers, layout, flat).any()
