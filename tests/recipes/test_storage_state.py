"""The state of `WeightStorage`: resumed, attached again, and detached."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from altgrad import WeightStorage
from tests.recipes.storing import Given, net, scale_for, scale_of, train


@pytest.mark.parametrize("order", ["before attach", "in mid-training"])
@pytest.mark.parametrize("remedy", [{}, {"rounding": "stochastic"}, {"compensation": "kahan"}])
@pytest.mark.parametrize("format", ["bf16", "e4m3fn", "mxfp8_e4m3"])
def test_a_resumed_run_continues_exactly(format: str, remedy, order: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    storage = WeightStorage(format, **remedy).attach(optimizer)
    train(model, optimizer, 4)
    state, weights = clone(storage.state_dict()), clone(model.state_dict())
    train(model, optimizer, 4, seed=2)

    resumed = net()
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.3)
    storage = WeightStorage(format, **remedy)
    if order == "in mid-training":  # scales have grown, and numbers were drawn
        optimizer.param_groups[0]["lr"] = 100.0
        storage.attach(optimizer)
        train(resumed, optimizer, 3, seed=3)
        optimizer.param_groups[0]["lr"] = 0.3
    resumed.load_state_dict(weights)
    storage.load_state_dict(state)
    if order == "before attach":
        assert_equal_states(storage.state_dict(), state)
        storage.attach(optimizer)
    assert_equal_states(storage.state_dict(), state)
    train(resumed, optimizer, 4, seed=2)
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def assert_equal_states(state, expected) -> None:
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_equal_states(state[key], value)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(state[key], value), key
        else:
            assert state[key] == value, key


def test_a_second_attach_continues_with_scales_and_rounding_errors() -> None:
    weight = nn.Parameter(torch.tensor([64.0, 1.0]))
    optimizer = Given([weight], torch.tensor([-63.0, 0.01]))
    storage = WeightStorage("e4m3fn", compensation="kahan").attach(optimizer)
    with pytest.raises(RuntimeError, match=r"give all optimizers to one attach\(\)"):
        storage.attach(optimizer)
    optimizer.step()
    before = storage.state_dict()["layers"]["parameter 0"]
    storage.detach()
    storage.attach(optimizer)
    after = storage.state_dict()["layers"]["parameter 0"]
    assert after["scales"] == before["scales"] == scale_for(64.0, "e4m3fn")
    assert torch.equal(after["lost"], before["lost"])
    assert before["lost"][1] > 0
    optimizer.step()
    assert not torch.equal(storage.state_dict()["layers"]["parameter 0"]["lost"], after["lost"])
    assert torch.equal(after["lost"], before["lost"])  # they are copies
    loaded = WeightStorage("e4m3fn", compensation="kahan")
    loaded.load_state_dict(storage.state_dict())
    loaded.attach(optimizer)
    optimizer.step()
    now = loaded.state_dict()["layers"]["parameter 0"]
    loaded.detach()
    loaded.attach(optimizer)
    assert torch.equal(loaded.state_dict()["layers"]["parameter 0"]["lost"], now["lost"])


def test_states_of_other_storages_are_refused_or_warned_about() -> None:
    def stored(scaling="tensor", shape=(2, 3), name: str = "weight") -> tuple:
        optimizer = Given([(name, nn.Parameter(torch.ones(shape)))], 0.01)
        return WeightStorage("e4m3fn", scaling, compensation="kahan"), optimizer

    def state_of(*arguments, **settings):
        storage, optimizer = stored(*arguments, **settings)
        return storage.attach(optimizer).state_dict()

    storage, optimizer = stored()
    with pytest.raises(
        ValueError, match=r"keys \['weights'\]: expected the result of WeightStorage"
    ):
        storage.load_state_dict({"weights": {}})
    storage.load_state_dict({"layers": {"weight": {"format": "bf16"}}, "generators": {}})
    with pytest.raises(ValueError, match=r"weight has the keys \['format'\]: expected the result"):
        storage.attach(optimizer)
    storage.load_state_dict(state_of(shape=(3, 3)))
    with pytest.raises(ValueError, match=r"weight has rounding errors of shape \(3, 3\): expected"):
        storage.attach(optimizer)
    storage.load_state_dict(state_of(name="head.weight"))
    with pytest.warns(UserWarning, match=r"1 layer not stored now, head.weight:"):
        storage.attach(optimizer)
    storage, optimizer = stored()
    storage.load_state_dict(state_of("channel"))  # scales that are shared otherwise begin anew
    storage.attach(optimizer)
    assert scale_of(storage) == scale_for(1.0, "e4m3fn")
    storage, optimizer = stored("channel")
    storage.load_state_dict(state_of("channel", shape=(3, 3)) | {})
    with pytest.raises(ValueError, match=r"has scales of shape \(3, 1\): expected \(2, 1\)"):
        storage.attach(optimizer)


def clone(state):
    if isinstance(state, dict):
        return {key: clone(value) for key, value in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else state


def test_weights_are_not_rounded_after_detach() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = Given([weight], 1e-4)
    with WeightStorage("bf16").attach(optimizer):
        optimizer.step()
    optimizer.step()
    assert weight.item() == pytest.approx(1.0001, rel=1e-6)


def test_a_detached_storage_keeps_no_optimizer_alive() -> None:
    optimizer = Given([nn.Parameter(torch.ones(1))], 0.0)
    storage = WeightStorage("bf16", states={"momentum": "bf16"})
    with storage.attach(optimizer):
        pass
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    assert storage.formats == {"parameter 0": "bf16"}
