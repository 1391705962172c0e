"""`Arena`: where copies of many parameters lie side by side, to be measured together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from altgrad.measuring import Batch, Measurer
from altgrad.observation.snapshots import Copies
from altgrad.quantization.arguments import INPUT_DTYPES
from altgrad.row_kernel import EverMoved, Rows
from altgrad.scales import Scales

_COLUMNS = 64  # few elements are wasted on the last row of a small parameter, and sums stay fast


@dataclass(eq=False, slots=True)
class _Place:
    """Where one parameter lies; without a name, where one lay that is stored elsewhere now."""

    name: str | None
    population: int
    indices: Tensor | None
    elements: int
    first_row: int

    @property
    def rows(self) -> range:
        return range(self.first_row, self.first_row + -(-self.elements // _COLUMNS))


@dataclass(eq=False)
class Segment:
    """As many parameters, stored alike, as one call of the kernel measures.

    Attributes:
        before, after, gradient: (rows, columns); NaN in `before` where no element is.
        together: The three in one, if they are of one dtype.
        ever: What the elements have done so far.
        places: The parameters, in the order of their rows.
        batch: What is measured, as long as the places and the scales stay what they are.
    """

    before: Tensor
    after: Tensor
    gradient: Tensor
    together: Tensor | None
    ever: EverMoved
    places: list[_Place] = field(default_factory=list)
    batch: Batch | None = None

    @property
    def names(self) -> list[str | None]:
        """Of the layers, in the order in which they are measured."""
        return [place.name for place in self.places]

    @property
    def rows(self) -> int:
        """How many are taken."""
        return self.places[-1].rows.stop if self.places else 0

    def find(self, name: str) -> _Place | None:
        """Where the parameter lies."""
        return next((place for place in self.places if place.name == name), None)

    def leave_out(self, places: Iterable[_Place]) -> None:
        """Let no elements be there of parameters of which nothing new was copied."""
        rows = [row for place in places for row in place.rows]
        if rows:
            self.before.index_fill_(0, torch.tensor(rows, device=self.before.device), torch.nan)

    def ever_of(self, place: _Place) -> Tensor:
        """What the elements of one have done: bool, (1 + formats, elements)."""
        rows = slice(place.rows.start, place.rows.stop)
        both = torch.cat((self.ever.moved[rows], self.ever.effective[rows]), dim=1)
        return both.transpose(0, 1).flatten(1)[:, : place.elements]

    def restore(self, place: _Place, ever: Tensor) -> None:
        """Set what the elements of one have done, as `ever_of` gave it."""
        count = len(place.rows) * _COLUMNS
        padded = torch.zeros(len(ever), count, dtype=torch.bool, device=self.before.device)
        padded[:, : place.elements] = ever
        rows = slice(place.rows.start, place.rows.stop)
        by_row = padded.view(len(ever), -1, _COLUMNS).transpose(0, 1)
        self.ever.moved[rows].copy_(by_row[:, :1])
        self.ever.effective[rows].copy_(by_row[:, 1:])


class Arena:
    """The copies of one optimizer's parameters.

    Parameters of more elements than one call of the kernel measures are left to others.

    Args:
        measurer: Who measures them.
        scales_of: The scales of a parameter, by its name.
        restored: What the elements of parameters had done before this run was resumed, by name;
            taken from it when a parameter finds its place.
    """

    def __init__(
        self,
        measurer: Measurer,
        scales_of: Callable[[str], Scales],
        restored: dict[str, Tensor],
    ) -> None:
        self._measurer = measurer
        self._scales_of = scales_of
        self._restored = restored
        self.segments: list[Segment] = []

    def place(
        self, name: str, parameter: Tensor, gradient: Tensor, indices: Tensor | None
    ) -> Copies | None:
        """Memory for one parameter: that which it had, if it still fits."""
        elements = parameter.numel() if indices is None else len(indices)
        if {parameter.dtype, gradient.dtype} - {*INPUT_DTYPES} or elements > self._capacity(name):
            return None
        shape = parameter.shape if indices is None else indices.shape
        segment, place = self._find(name, parameter, gradient, elements)
        place.indices, place.population = indices, parameter.numel()
        segment.batch = None
        start = place.first_row * _COLUMNS
        before, gradients, after = (
            each.view(-1)[start : start + elements].view(shape)
            for each in (segment.before, segment.gradient, segment.after)
        )
        return Copies(before, gradients, after)

    def batch_of(self, segment: Segment) -> Batch:
        """What is to be measured of a segment."""
        if segment.batch is None:
            segment.batch = self._batch(segment)
        return segment.batch

    def scales_changed(self) -> None:
        """The scales are to be asked for again."""
        for segment in self.segments:
            if segment.batch is not None:
                layer_of_row = segment.batch.layers.of_row
                scale = self._scale(segment.places, layer_of_row)
                grids = self._measurer.grids(scale, segment.before.device)
                segment.batch = segment.batch._replace(grids=grids)

    def _capacity(self, name: str) -> int:
        single = self._scales_of(name).are_single
        return self._measurer.elements_that_fit(single=single) // _COLUMNS * _COLUMNS

    def _find(
        self, name: str, parameter: Tensor, gradient: Tensor, elements: int
    ) -> tuple[Segment, _Place]:
        alike = [each for each in self.segments if _are_stored_as(each, parameter, gradient)]
        for segment in self.segments:
            place = segment.find(name)
            if place is not None and place.elements == elements and segment in alike:
                return segment, place
            if place is not None:
                segment.leave_out([place])
                place.name = None
        needed = -(-elements // _COLUMNS)
        roomy = (each for each in alike if each.rows + needed <= len(each.before))
        segment = next(roomy, None) or self._new_segment(name, parameter, gradient)
        place = _Place(name, parameter.numel(), None, elements, segment.rows)
        segment.places.append(place)
        ever = self._restored.pop(name, None)
        if ever is not None and ever.shape == (1 + len(self._measurer.formats), elements):
            segment.restore(place, ever)
        return segment, place

    @torch.inference_mode(mode=False)  # what is made in that mode could not be written to later
    def _new_segment(self, name: str, parameter: Tensor, gradient: Tensor) -> Segment:
        shape = self._capacity(name) // _COLUMNS, _COLUMNS
        formats = len(self._measurer.formats)

        def unmoved(middle: int) -> Tensor:
            return torch.zeros(
                shape[0], middle, _COLUMNS, dtype=torch.bool, device=parameter.device
            )

        together = None
        if parameter.dtype == gradient.dtype:
            together = parameter.new_zeros((3, *shape))
            before, after, gradients = together.unbind()
        else:
            before, after = parameter.new_zeros((2, *shape)).unbind()
            gradients = gradient.new_zeros(shape)
        before.fill_(torch.nan)
        ever = EverMoved(unmoved(1), unmoved(formats))
        segment = Segment(before, after, gradients, together, ever)
        self.segments.append(segment)
        return segment

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _batch(self, segment: Segment) -> Batch:
        device, rows = segment.before.device, segment.rows
        lengths = torch.tensor([len(place.rows) for place in segment.places])
        layer_of_row = torch.repeat_interleave(lengths).to(device)
        counted = [[place.population, place.elements] for place in segment.places]
        return self._measurer.batch(
            Rows(
                segment.before[:rows].unsqueeze(1),
                segment.after[:rows].unsqueeze(1),
                segment.gradient[:rows].unsqueeze(1),
                None if segment.together is None else segment.together[:, :rows].transpose(0, 1),
            ),
            layer_of_row,
            torch.tensor(counted, dtype=torch.float64).to(device),
            self._scale(segment.places, layer_of_row),
            EverMoved(segment.ever.moved[:rows], segment.ever.effective[:rows]),
        )

    def _scale(self, places: list[_Place], layer_of_row: Tensor) -> Tensor:
        """(rows, formats, 1), or of each element where a format has several."""
        formats, device = len(self._measurer.formats), layer_of_row.device
        each = [self._scales_of(place.name) if place.name else None for place in places]
        if all(scales is None or scales.are_single for scales in each):
            one = torch.ones(formats, dtype=torch.float64, device=device)
            by_layer = torch.stack([s.single if s else one for s in each])
            return by_layer[layer_of_row].unsqueeze(-1)
        rows = []
        for place, scales in zip(places, each, strict=True):
            count = len(place.rows) * _COLUMNS
            padded = torch.ones(formats, count, dtype=torch.float64, device=device)
            if scales is not None:
                indices = place.indices
                if indices is None:
                    indices = torch.arange(place.elements, device=device)
                padded[:, : place.elements] = scales.of_elements(indices)
            rows.append(padded.view(formats, -1, _COLUMNS).transpose(0, 1))
        return torch.cat(rows)


def _are_stored_as(segment: Segment, parameter: Tensor, gradient: Tensor) -> bool:
    return (
        segment.before.dtype == parameter.dtype
        and segment.gradient.dtype == gradient.dtype
        and segment.before.device == parameter.device
    )
