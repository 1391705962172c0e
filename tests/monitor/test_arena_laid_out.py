"""`Arena` in a monitor: laid out once, and again after changes, without loss of flags."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from altgrad import measure
from altgrad.monitor.arena import Arena
from altgrad.observation.snapshots import Copies, Request
from tests.monitor.watching import (
    FORMATS,
    assert_equal_figures,
    net,
    train,
    watched,
)


@contextlib.contextmanager
def laying_out() -> Iterator[list[tuple[Arena, list[str]]]]:
    """Record each layout: the arena, and the names of all parameters."""
    calls: list[tuple[Arena, list[str]]] = []
    lay_out = Arena.lay_out

    def noting(arena: Arena, requests: Sequence[Request]) -> list[Copies | None]:
        calls.append((arena, [request.name for request in requests]))
        return lay_out(arena, requests)

    with mock.patch.object(Arena, "lay_out", noting):
        yield calls


def test_an_arena_is_laid_out_once_while_nothing_changes() -> None:
    model = net()
    optimizer, _, records = watched(model)
    with laying_out() as calls:
        train(model, optimizer, 2)
        model[3].weight.requires_grad_(False)
        optimizer.zero_grad()
        train(model, optimizer, 2)
        model[3].weight.requires_grad_(True)
        train(model, optimizer, 2)
    assert [len(record.layers) for record in records] == [8, 8, 7, 7, 8, 8]
    assert [names for _, names in calls] == [[name for name, _ in model.named_parameters()]]


def test_new_scales_do_not_lay_out_an_arena_again() -> None:
    model = nn.Linear(4, 4)
    optimizer, monitor, records = watched(model, formats="e4m3fn")
    with laying_out() as calls:
        for _ in range(102):
            with torch.no_grad():
                model.weight.mul_(0.5)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
    assert len(calls) == 1
    (_, first), (_, last) = monitor.state_dict()["scales"]["amax"].values()
    largest = optimizer.steps[100]["weight"][0].abs().max()
    assert first.item() == largest  # not only that of the first step
    assert last.item() == optimizer.steps[0]["bias"][0].abs().max()
    assert len(records) == 102


def unfreeze(model: nn.ParameterDict) -> None:
    model["late"].requires_grad_(True)
    model["late"].grad = torch.zeros(70)


def reshape(model: nn.ParameterDict) -> None:
    model["a"].grad, model["a"].data = None, model["a"].data.view(5, 24)


def store_in_float64(model: nn.ParameterDict) -> None:
    model["a"].grad, model["a"].data = None, model["a"].data.double()


@pytest.mark.parametrize("change", [unfreeze, reshape, store_in_float64])
@pytest.mark.parametrize("max_elements", [None, 50])
def test_a_new_layout_keeps_flags(
    change: Callable[[nn.ParameterDict], None], max_elements: int | None
) -> None:
    torch.manual_seed(0)
    model = nn.ParameterDict(
        {"a": torch.randn(6, 20), "b": torch.randn(30, 80), "late": torch.randn(70)}
    )
    model["late"].requires_grad_(False)
    optimizer, monitor, records = watched(model, max_elements=max_elements)

    def step(gradient: float, *names: str) -> dict[str, list[int]]:
        for name in names:
            model[name].grad = torch.randn_like(model[name]) * gradient
        optimizer.step()
        state = monitor.state_dict()["ever_moved"]
        return {name: packed.tolist() for name, (_, packed) in state.items()}

    with laying_out() as calls:
        done = step(1.0, "a", "b")
        assert step(0.0, "a", "b") == done  # a step without updates sets no flags
        assert len(calls) == 1
        change(model)
        again = step(0.0, "a", "b")
        assert len(calls) == 2
        step(0.0, "a", "b")
        assert len(calls) == 2
    assert {name: again[name] for name in ("a", "b")} == done
    assert all(any(packed) for packed in done.values())
    is_late = change is unfreeze
    assert sorted(calls[1][1]) == ["a", "b", *["late"] * is_late]
    assert not any(again.get("late", []))
    assert set(records[-1].layers) == {*calls[1][1]}
    for name, each in optimizer.steps[-1].items():
        figures = records[-1].layers[name]
        if max_elements is None or name != "b":
            assert_equal_figures(figures, measure(*each, FORMATS), ("never_moved_frac",))
        assert figures.population == each[0].numel()


def test_layers_without_a_gradient_in_a_step_hold_no_elements() -> None:
    model = net()
    optimizer, monitor, records = watched(model)
    with laying_out() as calls:
        train(model, optimizer)
    ((arena, names),) = calls
    held = {place.name: (segment, place) for segment in arena.segments for place in segment.places}
    assert {*held} == {*names}

    def elements(name: str) -> int:
        segment, place = held[name]
        return int(segment.before[place.rows].isfinite().sum())

    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert {name: elements(name) for name in names} == sizes
    for absent in (["2.weight", "4.bias"], ["2.weight"], []):
        for name, parameter in model.named_parameters():
            parameter.grad = None if name in absent else torch.ones_like(parameter)
        optimizer.step()
        assert {*records[-1].layers} == {*names} - {*absent}
        assert records[-1].model.population == sum(sizes[name] for name in records[-1].layers)
        for name in names:
            assert elements(name) == (0 if name in absent else sizes[name])
    assert {*monitor.state_dict()["ever_moved"]} == {*names}


@pytest.mark.parametrize("scaling", ["tensor", "channel", ("block", 8)])
def test_a_parameter_may_change_its_shape_and_dtype_again_and_again(scaling: Any) -> None:
    model = nn.Linear(8, 8, bias=False)
    optimizer, _, records = watched(model, scaling=scaling, warn=(said := []).append)
    optimizer.named = dict(model.named_parameters())
    with laying_out() as calls:
        for shape, dtype in [((8, 8), torch.float32), ((4, 24), torch.float64)] * 20:
            model.weight.data = torch.randn(shape, dtype=dtype)
            model.weight.grad = torch.randn_like(model.weight)
            optimizer.step()
            expected = measure(*optimizer.steps[-1]["weight"], FORMATS, scaling)
            assert_equal_figures(
                records[-1].layers["weight"], expected
            )  # flags begin anew each time
    assert len(calls) == 40
    (arena,) = {arena for arena, _ in calls}
    # 96 elements in rows of 64, or of 32 with blocks.
    assert [len(segment.before) for segment in arena.segments] == [3 if len(scaling) == 2 else 2]
    assert said == [  # each notice once
        "has never_moved_frac of weight begin anew: it has 96 measured elements, and had 64",
        "has never_moved_frac of weight begin anew: it has 64 measured elements, and had 96",
    ]


@pytest.mark.parametrize("shape", [(12, 5), (3, 5)], ids=str)
def test_a_layer_reshaped_without_a_gradient_changes_no_other_layer(shape: tuple[int, int]) -> None:
    def figures(*, reshape: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.ModuleList(nn.Linear(5, 9) for _ in range(3))
        optimizer, monitor, _ = watched(model, formats=["e4m3fn", "bf16"], scaling="channel")
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 1e-3)
            if step == 1:
                if reshape:
                    model[0].weight.data = torch.randn(shape)
                model[0].weight.grad = None
                with torch.no_grad():
                    model[1].weight.mul_(100.0)  # beyond its scale, which is then taken again
            elif step == 2:
                model[0].weight.grad = None
            optimizer.step()
        names = ("1.weight", "2.weight")
        return [value for name in names for value in monitor.latest.layers[name].values()]

    assert str(figures(reshape=True)) == str(figures(reshape=False))


def test_experts_that_get_their_first_gradients_one_by_one_are_laid_out_once() -> None:
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
    optimizer, monitor, records = watched(model)
    with laying_out() as calls:
        for number in range(5):
            optimizer.zero_grad()
            model[number](torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            assert set(records[-1].layers) == {f"{number}.weight", f"{number}.bias"}
            assert_equal_figures(
                records[-1].layers[f"{number}.weight"],
                measure(*optimizer.steps[-1][f"{number}.weight"], FORMATS),
                ("never_moved_frac",),
            )
            moved = monitor.state_dict()["ever_moved"]
            assert len(moved) == 2 * (number + 1)
    assert len(calls) == 1
