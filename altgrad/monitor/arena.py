"""`Arena`: where copies of many parameters lie side by side, to be measured together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from altgrad.measurement.chunks import Sample
from altgrad.measurement.ever_moved import EverMovedOfLayers
from altgrad.measurement.kernel import EverMoved, Rows
from altgrad.measurement.measurer import Batch, Measurer
from altgrad.monitor.scale_state import ScaleState
from altgrad.observation.dtensor import is_sharded, local_of
from altgrad.observation.snapshots import Copies
from altgrad.quantization.arguments import INPUT_DTYPES
from altgrad.quantization.scale_groups import Sharing

_COLUMNS = 64  # few elements are wasted on the last row of a small parameter, and sums stay fast


@dataclass(eq=False, slots=True)
class Place:
    """Where one parameter lies; without a name, where one lay that is stored elsewhere now."""

    name: str | None
    shape: torch.Size
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
    places: list[Place] = field(default_factory=list)
    batch: Batch | None = None

    @property
    def names(self) -> list[str | None]:
        """Of the layers, in the order in which they are measured."""
        return [place.name for place in self.places]

    @property
    def rows(self) -> int:
        """How many are taken."""
        return self.places[-1].rows.stop if self.places else 0

    def find(self, name: str) -> Place | None:
        """Where the parameter lies."""
        return next((place for place in self.places if place.name == name), None)

    def leave_out(self, places: Iterable[Place]) -> None:
        """Let no elements be there of parameters of which nothing new was copied."""
        rows = [row for place in places for row in place.rows]
        if rows:
            self.before.index_fill_(0, torch.tensor(rows, device=self.before.device), torch.nan)

    def ever_of(self, place: Place) -> Tensor:
        """What the elements of one have done: bool, (1 + formats, elements)."""
        rows = slice(place.rows.start, place.rows.stop)
        both = torch.cat((self.ever.moved[rows], self.ever.effective[rows]), dim=1)
        return both.transpose(0, 1).flatten(1)[:, : place.elements]

    def vacate(self, place: Place) -> None:
        """Nothing lies there any more, and nothing has done anything yet."""
        self.leave_out([place])
        for each in self.ever:
            each[place.rows.start : place.rows.stop] = False
        place.name, place.indices, place.shape = None, None, torch.Size((1, place.elements))

    def restore(self, place: Place, ever: Tensor) -> None:
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

    Larger parameters are left to others.

    Args:
        measurer: Who measures them.
        scale_state: What the scales follow from.
        ever_moved: Where what elements have done is, while they lie nowhere.
        samples: Of parameters of which not all elements are given: which these are.
    """

    def __init__(
        self,
        measurer: Measurer,
        scale_state: ScaleState,
        ever_moved: EverMovedOfLayers,
        samples: Mapping[str, Sample],
    ) -> None:
        self._samples = samples
        self._measurer = measurer
        self._scale_state = scale_state
        self._ever_moved = ever_moved
        self.segments: list[Segment] = []

    def place(
        self, name: str, parameter: Tensor, gradient: Tensor, indices: Tensor | None
    ) -> Copies | None:
        """Memory for one parameter: that which it had, if it still fits."""
        here = local_of(parameter)
        elements = here.numel() if indices is None else len(indices)
        if {parameter.dtype, gradient.dtype} - {*INPUT_DTYPES} or elements > self._capacity:
            return None
        if not elements and (indices is not None or is_sharded(parameter)):
            return None
        self._scale_state.look_at(name, parameter)
        segment, place = self._find(name, here, gradient, elements)
        place.shape, place.indices = parameter.shape, indices
        if indices is not None or is_sharded(parameter):
            place.shape, place.indices = self._samples[name]
        segment.batch = None
        start = place.first_row * _COLUMNS
        shape = here.shape if indices is None else indices.shape
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
        """Some amax have been taken again."""
        for segment in self.segments:
            if segment.batch is not None:
                scales = self._scales(segment.places, segment.batch.layers.of_row)
                segment.batch = self._measurer.with_scales(segment.batch, scales)

    def ever_moved(self) -> Iterator[tuple[str, Tensor]]:
        """What the elements of each parameter have done."""
        for segment in self.segments:
            for place in segment.places:
                if place.name is not None:
                    yield place.name, segment.ever_of(place)

    def clear(self) -> None:
        """Let go of all memory."""
        self.segments.clear()

    @property
    def _capacity(self) -> int:
        return self._measurer.capacity // _COLUMNS * _COLUMNS

    def _find(
        self, name: str, parameter: Tensor, gradient: Tensor, elements: int
    ) -> tuple[Segment, Place]:
        alike = [each for each in self.segments if _are_stored_as(each, parameter, gradient)]
        for segment in self.segments:
            place = segment.find(name)
            if place is not None and place.elements == elements and segment in alike:
                return segment, place
            if place is not None:
                if place.elements == elements:
                    self._ever_moved.leave(name, segment.ever_of(place))
                segment.vacate(place)
        segment, place = self._new_place(name, parameter, gradient, elements, alike)
        ever = self._ever_moved.take(name, 1 + len(self._measurer.formats), elements)
        if ever is not None:
            segment.restore(place, ever)
        return segment, place

    def _new_place(
        self,
        name: str,
        parameter: Tensor,
        gradient: Tensor,
        elements: int,
        alike: Sequence[Segment],
    ) -> tuple[Segment, Place]:
        """Where another one lay, or after the last."""
        needed = -(-elements // _COLUMNS)
        for segment in alike:
            for place in segment.places:
                if place.name is None and len(place.rows) == needed:
                    place.name, place.elements = name, elements
                    return segment, place
        roomy = (each for each in alike if each.rows + needed <= len(each.before))
        segment = next(roomy, None) or self._new_segment(parameter, gradient)
        place = Place(name, parameter.shape, None, elements, segment.rows)
        segment.places.append(place)
        return segment, place

    @torch.inference_mode(mode=False)  # what is made in that mode could not be written to later
    def _new_segment(self, parameter: Tensor, gradient: Tensor) -> Segment:
        shape = self._capacity // _COLUMNS, _COLUMNS
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
        counted = [[place.shape.numel(), place.elements] for place in segment.places]
        return self._measurer.batch(
            Rows(
                segment.before[:rows].unsqueeze(1),
                segment.after[:rows].unsqueeze(1),
                segment.gradient[:rows].unsqueeze(1),
                None if segment.together is None else segment.together[:, :rows].transpose(0, 1),
            ),
            layer_of_row,
            torch.tensor(counted, dtype=torch.float64).to(device),
            self._scales(segment.places, layer_of_row),
            EverMoved(segment.ever.moved[:rows], segment.ever.effective[:rows]),
        )

    def _scales(
        self, places: Sequence[Place], layer_of_row: Tensor
    ) -> Tensor | tuple[Sharing, Tensor | None]:
        """As `Measurer.with_scales` takes them."""
        device, measurer = layer_of_row.device, self._measurer
        known = self._scale_state.amax
        amax = None
        if measurer.formats.needs_amax:
            one = torch.ones(1, device=device)
            amax = torch.cat([known(place.name) if place.name else one for place in places])
        if measurer.formats.is_single:
            return measurer.single_scales(amax, len(places), device)[layer_of_row]
        sharing = Sharing.joined([self._sharing(place) for place in places])
        return sharing.to(device), amax

    def _sharing(self, place: Place) -> Sharing:
        indices = place.indices
        indices = torch.arange(place.elements) if indices is None else indices.cpu()
        return self._measurer.sharing_of(place.shape, indices).padded(len(place.rows) * _COLUMNS)


def _are_stored_as(segment: Segment, parameter: Tensor, gradient: Tensor) -> bool:
    return (
        segment.before.dtype == parameter.dtype
        and segment.gradient.dtype == gradient.dtype
        and segment.before.device == parameter.device
    )
