"""`native_table` names the tensors as `kernel` does."""

from altgrad.measurement.kernel import EverMoved, Histograms, Rows
from altgrad.measurement.native_table import Place
from altgrad.quantization.grids import Grids


def test_places_are_numbered_from_zero_and_named_as_attributes() -> None:
    assert [*map(int, Place)] == [*range(len(Place))]
    read = {*Rows._fields, *EverMoved._fields, *Grids._fields, *Histograms._fields}
    results = {"specials", "sums", "extrema", "block", "counters"}
    assert {place.name.lower() for place in Place} - results <= read
