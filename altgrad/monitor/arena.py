"""`Arena`: memory in which copies of many layers lie side by side, to be measured together.

Hundreds of small layers measured one by one would cost hundreds of kernel calls at each step. An
arena cuts each layer into rows of 64 elements, and one call measures all rows of a segment. With
block formats, rows have 32 elements, as many as most blocks that share a scale::

    segment   row 0   layer "a", elements   0 …  63
              row 1   layer "a", elements  64 …  99, then NaN: no element
              row 2   layer "b", elements   0 …   9, then NaN

A segment holds layers with one dtype of weights, one dtype of gradients and one device. Memory is
laid out once, and weights and gradients are copied to it around each observed step. Beside the
copies lie the ever-moved flags: for each element whether any update has moved it so far, and for
each format whether any was effective.

`engine` comes next: it owns an arena for each optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.measurement.chunks import Sample
from altgrad.measurement.ever_moved import EverMovedStore
from altgrad.measurement.kernel import EverMoved, Rows
from altgrad.measurement.measurer import Batch, Measurer
from altgrad.monitor.scale_state import ScaleState
from altgrad.observation.dtensor import to_local_tensor
from altgrad.observation.snapshots import Copies, Request
from altgrad.quantization.arguments import INPUT_DTYPES
from altgrad.quantization.devices import find_exact_device
from altgrad.quantization.scale_groups import Amaxes, Sharing

# Elements in a row. Fewer would make sums over rows slow; more would waste memory on the last row
# of each small layer. Where elements are drawn in blocks, standard errors follow from the sums of
# single rows or a few rows: shorter rows make them more exact.
_ROW, _SHORT_ROW = 64, 32


class Place(NamedTuple):
    """The place of one layer in a `Segment`, memory with the copies of several layers side by side.

    Attributes:
        name: Name of the layer.
        shape: Shape of the whole layer.
        indices: The layer's elements that are in the segment, as indices into the flattened layer,
            int64 (elements). None for all elements.
        elements: Number of the layer's elements in the segment.
        rows: Rows of the segment that hold these elements; the last row may be partly filled.
        block: Number of neighbours that were drawn together into the sample; 1 for single elements,
            and if all elements are in the segment.
    """

    name: str
    shape: torch.Size
    indices: Tensor | None
    elements: int
    rows: slice
    block: int

    def rows_in_cluster(self, row_length: int) -> int:
        """Return how many rows of memory make a cluster; 0 if elements are drawn one by one.

        A cluster holds one or several blocks of elements that were drawn together. Standard errors
        follow from the sums of clusters, as neighbours may be alike.

        Args:
            row_length: Number of elements in a row.
        """
        if self.block == 1:
            return 0
        length = self.shape[-1]
        block = min(self.block, length)
        # Clusters should end where blocks do, as these are drawn together. Where rows cut through
        # blocks, two blocks to a cluster leave most of them whole.
        is_cut = length % block or (block % row_length and row_length % block)
        return -(-(2 * block if is_cut else block) // row_length)


@dataclass(eq=False)
class Segment:
    """The memory for copies of layers with the same dtypes and device, which one call measures.

    A row has elements of one layer, 64 or 32; a layer has one or more rows.

    Attributes:
        before: Weights before the step, (rows, elements); NaN where there is no element.
        after: Weights after the step, (rows, elements).
        gradient: Gradients, (rows, elements).
        ever: Flags that say whether each element has moved so far, and for each format whether it
            would have kept a part of an update.
        places: Places of the layers, in the order of their rows.
        batch: A `Batch` of views of this memory, which `Measurer.measure_batch` measures.
    """

    before: Tensor
    after: Tensor
    gradient: Tensor
    ever: EverMoved
    places: Sequence[Place]
    batch: Batch

    def empty_absent(self, present: set[str]) -> list[str | None]:
        """Write NaN to the memory of layers that are not in this step: sums leave out NaN.

        Otherwise the copies of an earlier step would be measured again.

        Args:
            present: Names of the layers of this step.

        Returns:
            One entry for each layer of the segment, in the order of `places`: the layer's name, or
            None if the layer is not in this step.
        """
        absent = [place.rows for place in self.places if place.name not in present]
        if absent:
            rows = [row for each in absent for row in range(each.start, each.stop)]
            self.before.index_fill_(0, torch.tensor(rows, device=self.before.device), torch.nan)
        return [place.name if place.name in present else None for place in self.places]

    def copies(self, place: Place, shape: torch.Size) -> Copies:
        """Return the memory for copies of a layer's weights and gradient, as views of this segment.

        Args:
            place: Place of the layer.
            shape: Shape of each copy.
        """
        start = place.rows.start * self.before.shape[1]
        return Copies(
            *(
                each.view(-1)[start : start + place.elements].view(shape)
                for each in (self.before, self.gradient, self.after)
            )
        )

    def read_flags(self, place: Place) -> Tensor:
        """Return the flags that say which elements of one layer have moved so far.

        Returns:
            bool (1 + formats, elements). Row 0 says which elements have moved, each other row which
            have had an update that a format keeps a part of.
        """
        both = torch.cat((self.ever.moved[place.rows], self.ever.effective[place.rows]), dim=1)
        return both.transpose(0, 1).flatten(1)[:, : place.elements]

    def write_flags(self, place: Place, flags: Tensor) -> None:
        """Set the flags that say which elements of one layer have moved so far.

        Args:
            place: Place of the layer.
            flags: Flags from `read_flags`, bool (1 + formats, elements).
        """
        row_length = self.before.shape[1]
        count = (place.rows.stop - place.rows.start) * row_length
        # Kinds of flags: moved, and effectively moved in each format.
        # (kinds, elements) -> pad to whole rows -> (kinds, rows, row_length)
        # -> (rows, kinds, row_length)
        padded = torch.zeros(len(flags), count, dtype=torch.bool, device=self.before.device)
        padded[:, : place.elements] = flags
        by_row = padded.view(len(flags), -1, row_length).transpose(0, 1)
        self.ever.moved[place.rows].copy_(by_row[:, :1])
        self.ever.effective[place.rows].copy_(by_row[:, 1:])


class Arena:
    """The memory for the copies of one optimizer's layers, laid out again when layers change.

    An arena consists of segments, each of which has layers of the same dtypes and is measured in
    one call. A layer with more elements than `Measurer.capacity` is not in the arena, and is
    measured alone.

    Args:
        measurer: The measurer of the segments.
        scale_state: The amax, largest finite magnitude, of each layer, from which scales follow.
        ever_moved: The flags of layers in no arena, which say which elements have moved so far.
        samples: Elements that are copied, by name of the layer; other layers are copied whole.

    Attributes:
        segments: The segments to measure.
        copies: Memory for the copies of each layer, by name.
    """

    def __init__(
        self,
        measurer: Measurer,
        scale_state: ScaleState,
        ever_moved: EverMovedStore,
        samples: Mapping[str, Sample],
    ) -> None:
        self.segments: list[Segment] = []
        self.copies: dict[str, Copies] = {}
        self._samples = samples
        self._measurer = measurer
        self._scale_state = scale_state
        self._ever_moved = ever_moved
        self._row_length = _ROW if measurer.formats.block == 1 else _SHORT_ROW
        # Maximum number of rows of one layer, and of one segment.
        self._layer_rows = measurer.capacity // self._row_length
        self._rows = measurer.batch_capacity // self._row_length

    # Tensors made in inference mode could not be written to outside of it:
    # https://docs.pytorch.org/docs/stable/notes/autograd.html#inference-mode
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def lay_out(self, requests: Sequence[Request]) -> list[Copies | None]:
        """Assign memory for copies of layers, side by side if they have the same dtypes and device.

        The memory of earlier calls is freed.

        Args:
            requests: All layers of the optimizer that have or had a gradient.

        Returns:
            Memory for the copies of each layer. None if the layer is too large, has no elements on
            this rank, or has a dtype that is not measured. None, too, for a layer on a device that
            does not measure: its copies come to the memory in `copies` later.
        """
        self.free()
        for group in self._grouped(requests):
            segment = self._segment(group)
            for place, request in zip(segment.places, group, strict=True):
                kinds = 1 + len(self._measurer.formats)
                flags = self._ever_moved.take(place.name, kinds, place.elements)
                if flags is not None:
                    segment.write_flags(place, flags)
                self.copies[place.name] = segment.copies(place, _copied_shape(request))
            self.segments.append(segment)
        return [
            None if _is_measured_elsewhere(request) else self.copies.get(request.name)
            for request in requests
        ]

    def free(self) -> None:
        """Free all memory, but keep which elements have moved so far: in the `EverMovedStore`."""
        for name, flags in self.flags():
            self._ever_moved.keep(name, flags)
        self.segments.clear()
        self.copies.clear()

    def flags(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each layer's name, and flags that say which of its elements have moved so far.

        Returns:
            An iterator over pairs of a name and flags, bool (1 + formats, elements). Row 0 says
            which elements have moved, each other row which have had an update that a format keeps a
            part of.
        """
        for segment in self.segments:
            for place in segment.places:
                yield place.name, segment.read_flags(place)

    def scales_changed(self) -> None:
        """Compute the scales of all layers again, after an amax (largest magnitude) has changed."""
        for segment in self.segments:
            row_layers = segment.batch.layers.row_layers
            kept = None if segment.batch.sharing is None else segment.batch.sharing[0]
            scales = self._scales(segment.places, row_layers, kept)
            segment.batch = self._measurer.with_scales(segment.batch, scales)

    def _grouped(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Divide layers into groups that share memory: the same dtypes and device in each."""
        # A layer goes into the last group of its kind, or into a new one. To search all groups for
        # free rows would take quadratic time, and gain little: a layer takes at most a quarter of a
        # segment.
        groups: list[list[Request]] = []
        last: dict[tuple[object, ...], tuple[list[Request], int]] = {}  # and its free rows, by kind
        for request in requests:
            rows = -(-_count_copied(request) // self._row_length)  # rounded up
            dtypes = request.parameter.dtype, request.gradient_dtype
            # Without rows, all sampled elements of the layer are on other ranks.
            is_elsewhere = not rows and request.name in self._samples
            if {*dtypes} - {*INPUT_DTYPES} or rows > self._layer_rows or is_elsewhere:
                continue
            kind = (*dtypes, find_exact_device(request.parameter.device))
            group, free = last.get(kind, ([], 0))
            if not group or rows > free:
                group, free = [], self._rows
                groups.append(group)
            group.append(request)
            last[kind] = group, free - rows
        return groups

    def _segment(self, group: Sequence[Request]) -> Segment:
        """Make a segment for some layers: memory for their copies, and the batch to measure."""
        places, stop = [], 0
        for request in group:
            elements, start = _count_copied(request), stop
            stop += -(-elements // self._row_length)
            shape, indices, block = self._samples.get(request.name) or (
                *(request.parameter.shape, None, 1),
            )
            places.append(Place(request.name, shape, indices, elements, slice(start, stop), block))
        before, after, gradient, together = _memory(group[0], (stop, self._row_length))
        moved, effective = (
            torch.zeros(stop, middle, self._row_length, dtype=torch.bool, device=before.device)
            for middle in (1, len(self._measurer.formats))
        )
        ever = EverMoved(moved, effective)
        # (rows, elements) -> (rows, 1, elements): formats are the middle dimension in the kernel.
        rows = Rows(before.unsqueeze(1), after.unsqueeze(1), gradient.unsqueeze(1), together)
        return Segment(before, after, gradient, ever, places, self._batch(rows, ever, places))

    def _batch(self, rows: Rows, ever: EverMoved, places: Sequence[Place]) -> Batch:
        device = rows.before.device
        # Lengths 2, 1, 3 become layers 0 0 1 2 2 2.
        lengths = torch.tensor(
            [place.rows.stop - place.rows.start for place in places], device="cpu"
        )
        row_layers = torch.repeat_interleave(lengths).to(device)
        clusters, counts = self._clusters(places)
        counted = [
            [place.shape.numel(), place.elements, count]
            for place, count in zip(places, counts, strict=True)
        ]
        return self._measurer.prepare_batch(
            rows,
            row_layers,
            torch.tensor(counted, dtype=torch.float64, device="cpu").to(device),
            self._scales(places, row_layers),
            ever,
            clusters,
        )

    def _clusters(self, places: Sequence[Place]) -> tuple[tuple[Tensor, Tensor] | None, list[int]]:
        """Group rows of sampled elements into clusters, from whose sums standard errors follow.

        A segment is memory for copies of several layers, in rows of 64 or 32 elements of one layer.
        If a layer's sample was drawn in blocks of neighbours, which may be alike, a cluster is one
        or several rows, which hold one or several blocks.

        Args:
            places: For each layer of a segment, its rows and how its sample was drawn.

        Returns:
            The index of the cluster of each row, int64 (rows), and the number of elements in each
            row, float64 (rows), on the CPU; None if no layer was drawn in blocks. And the number of
            clusters of each layer, 0 for a layer that was not drawn in blocks.
        """
        row_length, clusters, counts = self._row_length, 0, []
        row_clusters: list[int] = []
        row_elements: list[int] = []
        for place in places:
            rows, size = place.rows.stop - place.rows.start, place.rows_in_cluster(row_length)
            row_clusters += (clusters + row // (size or rows) for row in range(rows))
            row_elements += (
                min(row_length, place.elements - row_length * row) for row in range(rows)
            )
            counts.append(-(-rows // size) if size else 0)
            clusters = row_clusters[-1] + 1 if row_clusters else 0
        if not any(counts):
            return None, counts
        found = (
            torch.tensor(row_clusters, device="cpu"),
            torch.tensor(row_elements, dtype=torch.float64, device="cpu"),
        )
        return found, counts

    def _scales(
        self, places: Sequence[Place], row_layers: Tensor, sharing: Sharing | None = None
    ) -> Tensor | tuple[Sharing, Amaxes | None]:
        """Compute the scales by which formats divide layers, as `Measurer.with_scales` takes them.

        Args:
            places: Places of the layers.
            row_layers: Index of the layer of each row, int64 (rows).
            sharing: The map of the elements that share a scale, if it is known.

        Returns:
            If each layer has one scale for each format: float64 (rows, formats, 1). Otherwise a map
            of the elements that share a scale, and the amaxes (largest magnitudes) of all layers,
            if formats need them.
        """
        device, measurer = row_layers.device, self._measurer
        amaxes = None
        if measurer.formats.needs_amax:
            each = [self._amaxes(place, device) for place in places]
            amaxes = Amaxes(*map(torch.cat, zip(*each, strict=True)))
        if measurer.formats.is_single:
            groups = None if amaxes is None else amaxes.groups
            return measurer.compute_scales(groups, len(places), device)[row_layers]
        if sharing is None:
            sharing = Sharing.join([self._sharing(place) for place in places]).to(device)
        return sharing, amaxes

    def _amaxes(self, place: Place, device: torch.device) -> Amaxes:
        """Return the largest magnitudes of a layer; ones, as a filler, if it has a new shape.

        A layer with a new shape is not measured before the arena is laid out again.
        """
        is_by_channel = self._measurer.formats.scaling == "channel" and len(place.shape) > 0
        groups = place.shape[0] if is_by_channel else 1
        amaxes = self._scale_state.amaxes(place.name)
        if len(amaxes.groups) == groups:
            return amaxes
        return Amaxes.from_groups(torch.ones(groups, device=device))

    def _sharing(self, place: Place) -> Sharing:
        """Find which elements of a layer share a scale, padded to whole rows of memory."""
        indices = place.indices
        indices = torch.arange(place.elements, device="cpu") if indices is None else indices.cpu()
        count = (place.rows.stop - place.rows.start) * self._row_length
        return self._measurer.find_sharing(place.shape, indices).pad(count)


def _count_copied(request: Request) -> int:
    """Return how many of a parameter's elements are copied before and after each observed step.

    Args:
        request: The parameter, and which of its elements to copy.
    """
    return _copied_shape(request).numel()


def _is_measured_elsewhere(request: Request) -> bool:
    """Return True if the device of a layer does not measure, so that the host does."""
    device = request.parameter.device
    return find_exact_device(device) != device


def _copied_shape(request: Request) -> torch.Size:
    """Return the shape of the tensors into which a parameter's weights and gradient are copied.

    Args:
        request: The parameter, and which of its elements to copy.

    Returns:
        (elements) if some are copied, or else the shape of the local shard: what this rank holds.
    """
    if request.indices is not None:
        return request.indices.shape
    return to_local_tensor(request.parameter.detach()).shape


def _memory(first: Request, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Allocate rows of elements for copies of layers with the dtypes and device of the first one.

    Args:
        first: Request of one of the layers.
        shape: Number of rows, and of elements in a row.

    Returns:
        Weights before, weights after and gradients, (rows, elements) each. If they have one dtype,
        also the same memory as one tensor, (rows, 3, elements); None otherwise.
    """
    together = None
    weights = to_local_tensor(first.parameter.detach())
    device = find_exact_device(weights.device)
    if weights.dtype == first.gradient_dtype:
        together = weights.new_zeros((3, *shape), device=device)
        before, after, gradient = together.unbind()
    else:
        before, after = weights.new_zeros((2, *shape), device=device).unbind()
        gradient = weights.new_zeros(shape, dtype=first.gradient_dtype, device=device)
    before.fill_(torch.nan)
    return before, after, gradient, None if together is None else together.transpose(0, 1)
