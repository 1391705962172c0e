"""`StepVectors`: from rows on their devices to a record, with one host copy."""

import contextlib
from unittest import mock

import torch
from torch import Tensor

from altgrad.measurement.figures import tensor_figures
from altgrad.measurement.measurer import Measurer
from altgrad.measurement.step_record import StepVectors
from altgrad.quantization.format_set import FormatSet
from tests.measurement.definitions import a_step

NAMES = ("bf16", "e4m3fn")


def test_the_rows_of_a_step_are_copied_to_the_host_once() -> None:
    rows = [Measurer(FormatSet(NAMES)).measure_tensor(*a_step(seed=seed)) for seed in range(20)]
    vectors = StepVectors(NAMES, lambda _: NAMES)
    for k in range(0, 20, 5):
        vectors.add([f"layer {k + j}" for j in range(5)], torch.stack(rows[k : k + 5]))
    copies = 0

    def counted(name: str) -> mock._patch:
        original = getattr(Tensor, name)

        def method(self: Tensor, *arguments: object, **options: object) -> object:
            nonlocal copies
            copies += 1
            return original(self, *arguments, **options)

        return mock.patch.object(Tensor, name, method)

    readers = "tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__", "__iter__"
    with contextlib.ExitStack() as stack:
        for name in readers:
            stack.enter_context(counted(name))
        record, skipped = vectors.record(7, (0.0, 0.0), None)
    assert copies == 1
    assert record is not None
    assert not skipped
    assert record.index == 7
    assert [*record.layers.values()] == [tensor_figures(NAMES, row) for row in rows]
