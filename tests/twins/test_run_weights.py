"""`RunWeights`: gathered weights of the run, and changes by something other than a step."""

from __future__ import annotations

import pytest
import torch

from altgrad.twins.layer_plan import LaneKind
from altgrad.twins.layout import Bucket, Layout
from altgrad.twins.run_weights import RunWeights, make_mask
from altgrad.twins.sample import Sampled
from altgrad.twins.self_check import COUNTS
from altgrad.twins.twin_tensors import TwinTensors

KIND = LaneKind(torch.float32, torch.float32, torch.device("cpu"), 1)
INDICES = torch.arange(0, 128, 2)


class Run:
    """Two layers of 128 weights, each second one sampled, and their reference twin."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layers = {
            name: Sampled(torch.randn(128, generator=generator), torch.Size([128]), INDICES)
            for name in ("a", "b")
        }
        self.weights = RunWeights(KIND)
        self.weights.rearrange(self.layers, Layout((Bucket(0, {"a": 64, "b": 64}),)))
        self.reference = TwinTensors.start_at(self.weights.values.clone())
        self.step()

    def step(self) -> None:
        """Step the run and its reference twin alike."""
        for layer in self.layers.values():
            layer.parameter.mul_(0.5)
        self.reference.weights.mul_(0.5)
        self.weights.remember_writes()

    def find_changed(self, *, is_checkable: bool = True) -> list[int]:
        """Return the number of changed elements of each layer."""
        written = self.weights.find_written()
        changed = self.weights.find_changed(self.reference, written, is_checkable=is_checkable)
        self.reference.replace_weights(
            torch.where(changed, self.weights.values, self.reference.weights)
        )
        return changed.view(2, 64).sum(1).tolist()

    def check(self) -> list[dict[str, float]]:
        rows = self.weights.check(self.reference).tolist()
        return [dict(zip(COUNTS, row, strict=True)) for row in rows]


def test_the_sampled_weights_are_gathered() -> None:
    run = Run()
    expected = torch.cat([layer.parameter[::2] for layer in run.layers.values()])
    assert torch.equal(run.weights.gather(), expected)
    assert [row["different"] for row in run.check()] == [0, 0]


def test_a_step_is_no_change() -> None:
    run = Run()
    assert run.weights.find_written() == []
    assert run.find_changed() == [0, 0]


def test_a_write_is_found_by_its_count_however_few_its_elements() -> None:
    run = Run()
    run.layers["b"].parameter[4] = 7.0
    assert run.weights.find_written() == ["b"]
    assert run.find_changed() == [0, 1]
    first, second = run.check()
    assert (first["outside"], second["outside"], second["suspected"]) == (0, 1, 0)
    assert second["different"] == 0


def test_a_write_through_data_is_suspected_by_its_size() -> None:
    run = Run()
    run.layers["a"].parameter.data.mul_(3.0)
    assert run.weights.find_written() == []
    assert run.find_changed() == [64, 0]
    first, _ = run.check()
    assert (first["outside"], first["suspected"]) == (1, 1)


def test_a_run_that_rounds_at_random_is_not_searched_for_writes_through_data() -> None:
    run = Run()
    run.layers["a"].parameter.data.mul_(3.0)
    assert run.find_changed(is_checkable=False) == [0, 0]


def test_a_watch_finds_every_write_through_data() -> None:
    run = Run()
    run.weights.is_watching = True
    run.step()
    run.layers["a"].parameter.data[4] = 3.0
    assert run.weights.find_written() == []
    assert run.find_changed() == [1, 0]
    first, _ = run.check()
    assert (first["outside"], first["suspected"]) == (1, 0)


def test_a_watch_leaves_a_twin_that_is_wrong() -> None:
    run = Run()
    run.weights.is_watching = True
    run.step()
    run.reference.weights.mul_(0.9)
    assert run.find_changed() == [0, 0]
    assert run.check()[0]["far"] == 64


def test_counts_and_the_watch_outlast_another_layout() -> None:
    run = Run()
    run.weights.is_watching = True
    run.step()
    run.layers["b"].parameter.data[4] = 3.0
    run.find_changed()
    run.weights.remember_writes()
    run.layers["b"].parameter.data[6] = 3.0
    layers = {"b": run.layers["b"]}
    assert run.weights.rearrange(layers, Layout((Bucket(0, {"b": 64}),))) == []
    reference = TwinTensors.start_at(run.reference.weights[64:].clone())
    changed = run.weights.find_changed(reference, (), is_checkable=True)
    assert changed.nonzero().flatten().tolist() == [3]
    [row] = run.weights.check(reference).tolist()
    assert dict(zip(COUNTS, row, strict=True))["outside"] == 2


def test_a_parameter_that_replaces_another_is_named() -> None:
    run = Run()
    layers = dict(run.layers)
    layers["a"] = layers["a"]._replace(parameter=layers["a"].parameter.clone())
    layout = Layout((Bucket(0, {"a": 64, "b": 64}),))
    assert run.weights.rearrange(layers, layout) == ["a"]
    assert run.weights.rearrange(layers, layout, begun={"a"}) == []


def test_another_tensor_in_place_of_the_weights_is_a_write() -> None:
    run = Run()
    run.layers["a"].parameter.data = torch.zeros(128)
    assert run.weights.find_written() == ["a"]
    assert run.find_changed()[0] == int((run.reference.start[:64] != 0).sum())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_in_both_have_not_changed(value: float) -> None:
    run = Run()
    run.layers["a"].parameter.fill_(value)
    run.reference.weights[:64] = value
    assert run.find_changed() == [0, 0]


def test_counts_of_changes_begin_anew_after_a_check() -> None:
    run = Run()
    run.layers["a"].parameter.zero_()
    run.find_changed()
    assert run.check()[0]["outside"] == 1
    assert run.check()[0]["outside"] == 0


def test_each_layer_has_blocks_of_its_own() -> None:
    shapes = {"short": (16, 10), "single": (96, 1), "both": (8, 40)}
    layers = {
        name: Sampled(
            torch.randn(shape), torch.Size(shape), torch.arange(torch.Size(shape).numel())
        )
        for name, shape in shapes.items()
    }
    counts = {name: len(each.indices) for name, each in layers.items()}
    weights = RunWeights(KIND._replace(block=32))
    weights.rearrange(layers, Layout((Bucket(0, counts),)))
    assert weights.blocks == (10, 1, 32)
    assert weights.block_counts == (16, 0, 16)  # two in each row of 40; single elements are none
    for row, layer in enumerate(layers.values()):
        inside = weights.values[weights.rows[row][weights.mask[row]]]
        assert torch.equal(inside, layer.parameter.flatten())
    in_blocks = weights.mask[2][: 15 * 32].view(-1, 32).sum(1)
    assert in_blocks.tolist() == [32, 8] * 7 + [32]


@pytest.mark.parametrize("each", [[], [True], [False, False], [True, False, True]], ids=str)
def test_a_mask_has_the_given_values(each: list[bool]) -> None:
    mask = make_mask(each, torch.device("cpu"))
    assert (mask.dtype, mask.tolist()) == (torch.bool, each)
