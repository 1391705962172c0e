"""`step_record`: from the sums and maxima of the layers of a step to its figures."""

import math

import pytest
import torch

from altgrad.measurement.figures import model_figures, vector_figures
from altgrad.measurement.measurer import Measurer
from altgrad.measurement.numbers import Numbers
from altgrad.measurement.step_record import step_record
from altgrad.measurement.twin_figures import split_twins
from altgrad.quantization.format_set import FormatSet
from tests.counting import Operations, host_copies
from tests.measurement.definitions import a_step
from tests.measurement.twins import RECIPES, measure_layers

FORMATS = ("bf16", "e4m3fn")
SECONDS = (0.25, 4.0)


def rows(count: int) -> Numbers:
    """Sums and maxima of so many layers."""
    measurer = Measurer(FormatSet(FORMATS))
    each = [measurer.measure_tensor(*a_step(seed=seed)) for seed in range(count)]
    return torch.stack(each).numpy()


def test_each_layer_has_the_figures_of_its_row() -> None:
    vectors, names = rows(20), [f"layer {k}" for k in range(20)]
    record = step_record(FORMATS, dict.fromkeys(names, FORMATS), vectors, 7, SECONDS)
    assert record.index == 7
    assert (record.own_seconds, record.training_seconds) == SECONDS
    assert [*record.layers] == names
    assert [*record.layers.values()] == [vector_figures(FORMATS, row) for row in vectors]
    assert len({figures["update_rms"] for figures in record.layers.values()}) == 20


def test_the_model_is_all_layers_together() -> None:
    record = step_record(FORMATS, {"a": FORMATS, "b": FORMATS}, rows(2), 0, SECONDS)
    together = model_figures([*record.layers.values()])
    assert dict(record.model) == dict(together)
    assert record.model.population == sum(each.population for each in record.layers.values())
    assert record.model["update_rms"] not in {f["update_rms"] for f in record.layers.values()}


def test_formats_that_a_layer_is_not_judged_for_are_not_in_its_figures() -> None:
    """In whichever order they are named; the model has those of the layers that are judged."""
    vectors = rows(3)
    judged = {"both": ("e4m3fn", "bf16"), "one": ("e4m3fn",), "none": ()}
    record = step_record(FORMATS, judged, vectors, 0, SECONDS)
    found = {
        name: {key.split("/")[1] for key in each if "/" in key}
        for name, each in record.layers.items()
    }
    assert found == {"both": {*FORMATS}, "one": {"e4m3fn"}, "none": set()}
    whole = [vector_figures(FORMATS, row) for row in vectors]
    assert dict(record.layers["both"]) == dict(whole[0])
    assert all(whole[1][key] == value for key, value in record.layers["one"].items())
    assert record.layers["one"]["update_rms"] != record.layers["both"]["update_rms"]
    assert record.model["stall_frac/bf16"] == whole[0]["stall_frac/bf16"]
    of_two = model_figures(whole[:2])["stall_frac/e4m3fn"]
    assert record.model["stall_frac/e4m3fn"] == pytest.approx(of_two, rel=1e-12)
    assert not math.isnan(of_two)


def test_figures_are_read_without_tensors() -> None:
    vectors, judged = rows(3), {"a": FORMATS, "b": FORMATS, "c": FORMATS[:1]}
    with Operations() as operations, host_copies() as copies:
        record = step_record(FORMATS, judged, vectors, 0, SECONDS)
        for figures in (*record.layers.values(), record.model):
            assert len(dict(figures)) == len(figures.in_order())
            assert figures.standard_error("stall_frac/bf16") == 0
            assert sum(figures.histogram("steps/bf16").counts) > 0
        assert model_figures([*record.layers.values()])["update_rms"] > 0
    assert not operations.counts + operations.on_host
    assert copies == []


def test_layers_and_model_have_the_figures_of_their_twins() -> None:
    """A layer without twins has no recipe; twins of layers outside of the step are left out."""
    judged = {"a": FORMATS, "b": FORMATS, "none": FORMATS}
    values = measure_layers(("b", "absent", "a"))
    record = step_record(FORMATS, judged, rows(3), 0, SECONDS, values)
    plain = step_record(FORMATS, judged, rows(3), 0, SECONDS)
    assert {name: each.recipes for name, each in record.layers.items()} == {
        "a": RECIPES,
        "b": RECIPES,
        "none": (),
    }
    layers, model = split_twins(values, ("a", "b"))
    for name, before in plain.layers.items():
        assert dict(record.layers[name]) == {**before, **layers.get(name, {})}
        assert before.twin_keys == ()
    assert dict(record.model) == {**plain.model, **model}
    assert record.layers["none"] == plain.layers["none"]
    together = model_figures([*record.layers.values()])
    assert dict(together) == dict(record.model)
