"""`Arena`: where copies of many parameters lie side by side, to be measured together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.measurement.chunks import Sample
from altgrad.measurement.ever_moved import EverMovedOfLayers
from altgrad.measurement.kernel import EverMoved, Rows
from altgrad.measurement.measurer import Batch, Measurer
from altgrad.monitor.scale_state import ScaleState
from altgrad.observation.dtensor import local_of
from altgrad.observation.snapshots import Copies, Request
from altgrad.quantization.arguments import INPUT_DTYPES
from altgrad.quantization.scale_groups import Sharing

_COLUMNS = 64  # few elements are wasted on the last row of a small parameter, and sums stay fast


class Place(NamedTuple):
    """The place of one parameter in a segment.

    Attributes:
        name: Name of the layer.
        shape: Shape of the whole parameter.
        indices: Which of its elements are here, flat; None for all.
        elements: How many are here.
        rows: The rows that they take, the last of which may have room left.
    """

    name: str
    shape: torch.Size
    indices: Tensor | None
    elements: int
    rows: slice


@dataclass(eq=False)
class Segment:
    """A run of rows for parameters stored alike, which one call of the kernel measures.

    Attributes:
        before, after, gradient: (rows, columns); NaN in `before` where no element is.
        ever: What the elements have done so far.
        places: The parameters, in the order of their rows.
        batch: What is measured.
    """

    before: Tensor
    after: Tensor
    gradient: Tensor
    ever: EverMoved
    places: Sequence[Place]
    batch: Batch

    def names_with(self, present: set[str]) -> list[str | None]:
        """Return the name of each layer, and None for each that is not present.

        The copies of layers that are not present are old: they are made to hold no element.
        """
        absent = [place.rows for place in self.places if place.name not in present]
        if absent:
            rows = [row for each in absent for row in range(each.start, each.stop)]
            self.before.index_fill_(0, torch.tensor(rows, device=self.before.device), torch.nan)
        return [place.name if place.name in present else None for place in self.places]

    def copies(self, place: Place, shape: torch.Size) -> Copies:
        """Return the memory of one parameter.

        Args:
            place: The place of the parameter.
            shape: Shape of what is copied.
        """
        start = place.rows.start * _COLUMNS
        return Copies(
            *(
                each.view(-1)[start : start + place.elements].view(shape)
                for each in (self.before, self.gradient, self.after)
            )
        )

    def history(self, place: Place) -> Tensor:
        """Return what the elements of a parameter have done: bool (1 + formats, elements)."""
        both = torch.cat((self.ever.moved[place.rows], self.ever.effective[place.rows]), dim=1)
        return both.transpose(0, 1).flatten(1)[:, : place.elements]

    def restore(self, place: Place, history: Tensor) -> None:
        """Set what the elements of a parameter have done.

        Args:
            place: The place of the parameter.
            history: bool (1 + formats, elements), as `history` returned it.
        """
        count = (place.rows.stop - place.rows.start) * _COLUMNS
        padded = torch.zeros(len(history), count, dtype=torch.bool, device=self.before.device)
        padded[:, : place.elements] = history
        by_row = padded.view(len(history), -1, _COLUMNS).transpose(0, 1)
        self.ever.moved[place.rows].copy_(by_row[:, :1])
        self.ever.effective[place.rows].copy_(by_row[:, 1:])


class Arena:
    """The copies of one optimizer's parameters, laid out once, and again when they change.

    Larger parameters are left to others.

    Args:
        measurer: What measures them.
        scale_state: What the scales follow from; it knows all layers that are laid out.
        ever_moved: Where what elements have done is, while they lie nowhere.
        samples: Which elements are copied of parameters of which not all are.

    Attributes:
        segments: What is measured.
    """

    def __init__(
        self,
        measurer: Measurer,
        scale_state: ScaleState,
        ever_moved: EverMovedOfLayers,
        samples: Mapping[str, Sample],
    ) -> None:
        self.segments: list[Segment] = []
        self._samples = samples
        self._measurer = measurer
        self._scale_state = scale_state
        self._ever_moved = ever_moved
        self._rows = measurer.capacity // _COLUMNS  # of one segment at most

    @torch.inference_mode(mode=False)  # what is made in that mode could not be written to later
    @torch.no_grad()
    def lay_out(self, requests: Sequence[Request]) -> list[Copies | None]:
        """Give memory to parameters, side by side where they are stored alike.

        Args:
            requests: All parameters of the optimizer; those before are forgotten.

        Returns:
            Memory for each; None if it has too many elements, none at all, or a dtype that is not
            measured.
        """
        self.leave()
        copies: dict[str, Copies] = {}
        for group in self._grouped(requests):
            segment = self._segment(group)
            for place, request in zip(segment.places, group, strict=True):
                kinds = 1 + len(self._measurer.formats)
                history = self._ever_moved.take(place.name, kinds, place.elements)
                if history is not None:
                    segment.restore(place, history)
                copies[place.name] = segment.copies(place, _shape_of_copies(request))
            self.segments.append(segment)
        return [copies.get(request.name) for request in requests]

    def leave(self) -> None:
        """Let go of all memory; what elements have done so far is kept elsewhere."""
        for name, history in self.histories():
            self._ever_moved.leave(name, history)
        self.segments.clear()

    def histories(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what the elements of each layer have done, by name."""
        for segment in self.segments:
            for place in segment.places:
                yield place.name, segment.history(place)

    def scales_changed(self) -> None:
        """Measure under the scales of amax that have been taken again."""
        for segment in self.segments:
            layer_of_row = segment.batch.layers.of_row
            scales = self._scales(segment.places, layer_of_row)
            segment.batch = self._measurer.with_scales(segment.batch, scales)

    def _grouped(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Return the parameters of each segment: stored alike, and no more than it holds."""
        groups: list[list[Request]] = []
        kinds: list[tuple[object, ...]] = []
        free: list[int] = []  # rows of each group
        for request in requests:
            rows = -(-_elements(request) // _COLUMNS)
            dtypes = request.parameter.dtype, request.gradient_dtype
            is_elsewhere = not rows and request.name in self._samples
            if {*dtypes} - {*INPUT_DTYPES} or rows > self._rows or is_elsewhere:
                continue
            kind = (*dtypes, request.parameter.device)
            fitting = (k for k, rest in enumerate(free) if kinds[k] == kind and rows <= rest)
            number = next(fitting, len(groups))
            if number == len(groups):
                groups.append([])
                kinds.append(kind)
                free.append(self._rows)
            groups[number].append(request)
            free[number] -= rows
        return groups

    def _segment(self, group: Sequence[Request]) -> Segment:
        places, stop = [], 0
        for request in group:
            elements, start = _elements(request), stop
            stop += -(-elements // _COLUMNS)
            shape, indices = self._samples.get(request.name) or (request.parameter.shape, None)
            places.append(Place(request.name, shape, indices, elements, slice(start, stop)))
        before, after, gradient, together = _memory(group[0], stop)
        moved, effective = (
            torch.zeros(stop, middle, _COLUMNS, dtype=torch.bool, device=before.device)
            for middle in (1, len(self._measurer.formats))
        )
        ever = EverMoved(moved, effective)
        rows = Rows(before.unsqueeze(1), after.unsqueeze(1), gradient.unsqueeze(1), together)
        return Segment(before, after, gradient, ever, places, self._batch(rows, ever, places))

    def _batch(self, rows: Rows, ever: EverMoved, places: Sequence[Place]) -> Batch:
        device = rows.before.device
        lengths = torch.tensor([place.rows.stop - place.rows.start for place in places])
        layer_of_row = torch.repeat_interleave(lengths).to(device)
        counted = [[place.shape.numel(), place.elements] for place in places]
        return self._measurer.batch(
            rows,
            layer_of_row,
            torch.tensor(counted, dtype=torch.float64).to(device),
            self._scales(places, layer_of_row),
            ever,
        )

    def _scales(
        self, places: Sequence[Place], layer_of_row: Tensor
    ) -> Tensor | tuple[Sharing, Tensor | None]:
        """Return what `Measurer.with_scales` takes."""
        device, measurer = layer_of_row.device, self._measurer
        amax = None
        if measurer.formats.needs_amax:
            amax = torch.cat([self._scale_state.amax(place.name) for place in places])
        if measurer.formats.is_single:
            return measurer.single_scales(amax, len(places), device)[layer_of_row]
        sharing = Sharing.joined([self._sharing(place) for place in places])
        return sharing.to(device), amax

    def _sharing(self, place: Place) -> Sharing:
        indices = place.indices
        indices = torch.arange(place.elements) if indices is None else indices.cpu()
        count = (place.rows.stop - place.rows.start) * _COLUMNS
        return self._measurer.sharing_of(place.shape, indices).padded(count)


def _elements(request: Request) -> int:
    """Return how many elements of a parameter are copied."""
    return _shape_of_copies(request).numel()


def _shape_of_copies(request: Request) -> torch.Size:
    if request.indices is not None:
        return request.indices.shape
    return local_of(request.parameter.detach()).shape


def _memory(first: Request, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return memory without elements for so many rows of parameters stored as the first one.

    Returns:
        Weights before, after and gradients (rows, columns); and all in one (rows, 3, columns), if
        they are of one dtype.
    """
    shape, together = (count, _COLUMNS), None
    weights = local_of(first.parameter.detach())
    if weights.dtype == first.gradient_dtype:
        together = weights.new_zeros((3, *shape))
        before, after, gradient = together.unbind()
    else:
        before, after = weights.new_zeros((2, *shape)).unbind()
        gradient = weights.new_zeros(shape, dtype=first.gradient_dtype)
    before.fill_(torch.nan)
    return before, after, gradient, None if together is None else together.transpose(0, 1)
