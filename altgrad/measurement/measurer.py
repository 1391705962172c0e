"""`Measurer`: from the tensors of a step to rows of sums and maxima, on their device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.measurement.chunks import Sample, chunks_of, part_of, row_of
from altgrad.measurement.kernel import EverMoved, Rows, row_sums
from altgrad.measurement.totals import Layers
from altgrad.measurement.workspace import Workspace, columns_that_fit
from altgrad.quantization.arguments import check_pair
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.grids import Grids, grids_of
from altgrad.quantization.scale_groups import (
    Sharing,
    element_scales,
    layer_amax,
    single_scales,
    tensor_amax_of,
)


class Batch(NamedTuple):
    """Rows of several layers that are stored in one dtype, and what does not change with a step.

    Attributes:
        rows: The elements.
        layers: The layers that they belong to.
        own_grid: 2**-M and the smallest positive number of the dtype.
        grids: The formats, with the scale of each row; None where `sharing` says which elements
            share a scale.
        sharing: Which elements of all rows, one after the other, share a scale, with the amax of
            its groups.
        ever: What the elements have done so far; updated. None if they are not tracked.
    """

    rows: Rows
    layers: Layers
    own_grid: tuple[float, float]
    grids: Grids | None
    sharing: tuple[Sharing, Tensor | None] | None
    ever: EverMoved | None


class Measurer:
    """A meter of steps on the same formats again and again, in memory that it keeps.

    Args:
        formats: The formats with their scaling.

    Attributes:
        formats: The `formats` argument.
        capacity: How many elements one call of the kernel may measure, in the memory it may take.

    Raises:
        ValueError: Blocks that share a scale are larger than the capacity.
    """

    def __init__(self, formats: FormatSet) -> None:
        self.formats = formats
        self.capacity = columns_that_fit(len(formats), scale_per_element=not formats.is_single)
        if formats.block > self.capacity:
            raise ValueError(
                f"scaling={formats.scaling!r}: blocks of {formats.block} elements, with those of "
                f"all formats, are more than the {self.capacity} that are measured at once; use "
                "'tensor' or 'channel'"
            )
        self._workspace = Workspace()

    def grids(self, scale: Tensor | None, device: torch.device) -> Grids | None:
        """Return the grids of the formats.

        Args:
            scale: float64, (1 or rows, formats, 1 or columns); None for 1.
            device: Where the grids are to be.

        Returns:
            The grids; None without formats.
        """
        if not self.formats:
            return None
        return grids_of(
            [format.element for format in self.formats],
            [applied is not None for applied in self.formats.applied],
            scale,
            power_of_two=all(format.power_of_two for format in self.formats),
            device=device,
        )

    def amax_of(self, before: Tensor, after: Tensor) -> Tensor:
        """Return the amax of the weights, or of each channel; that of `after` where it is 0."""
        amax = layer_amax(before, self.formats.scaling)
        if bool((amax == 0).any()):
            amax = torch.where(amax == 0, layer_amax(after, self.formats.scaling), amax)
        return amax

    @torch.no_grad()
    def measure_tensor(
        self,
        before: Tensor,
        after: Tensor,
        gradient: Tensor | None = None,
        amax: Tensor | None = None,
        ever: EverMoved | None = None,
        sample: Sample | None = None,
    ) -> Tensor:
        """Measure one tensor's step, whatever its size: a row of sums and maxima, on its device.

        Args:
            before: The weights before the step: float16, bfloat16, float32 or float64, any shape.
            after: The same weights after it, of the same dtype.
            gradient: The gradient as the optimizer applied it.
            amax: The largest magnitude of the weights, or of each channel, where it is kept from
                step to step. None takes that of `before`, for which the host waits.
            ever: What the elements have done so far, as one row; updated.
            sample: Which elements of a parameter these are; None takes them for all.

        Returns:
            float64, (columns), as `altgrad.measurement.columns` describes them.

        Raises:
            TypeError: Not floating-point tensors, or before and after of different dtypes.
            ValueError: Shapes that differ.
        """
        check_step(before, after, gradient)
        if amax is None and self.formats.needs_amax:
            amax = self.amax_of(before, after)
        device, shape = before.device, before.shape if sample is None else sample.shape
        grids = tensor_amax = found = None
        if self.formats.is_single:
            grids = self.grids(self.single_scales(amax, 1, device), device)
        elif amax is not None and self.formats.needs_tensor_amax:
            tensor_amax = tensor_amax_of(before, amax)
        layers, own_grid = self._one_layer(before, shape.numel()), _own_grid(before.dtype)
        tensors = (before, after) if gradient is None else (before, after, gradient)
        start, size, block = 0, self._chunk(tensors), self.formats.block
        for flat in chunks_of(tensors, size, block=block, sample=sample):
            count = len(flat[0])
            if not self.formats.is_single:
                scales = self._scales_of_chunk(flat, (amax, tensor_amax), start, shape, sample)
                grids = self.grids(scales.unsqueeze(0), device)
            buffers = self._workspace.buffers(1, len(self.formats), count, device)
            part = None if ever is None else part_of(ever, start, count)
            chunk = row_sums(row_of(flat), grids, own_grid, buffers, layers.histograms, part)
            found = chunk if found is None else _added(found, chunk)
            start += count
        return layers.vectors(*(found or layers.nothing()))[0]

    def _one_layer(self, before: Tensor, population: int) -> Layers:
        """Describe a layer that is measured alone, of which these elements are given."""
        row = torch.zeros(1, dtype=torch.int64, device=before.device)
        counted = torch.tensor([[population, before.numel()]], dtype=torch.float64)
        return Layers.of(row, counted.to(before.device), self.formats.judged(before.dtype))

    def _chunk(self, tensors: tuple[Tensor, ...]) -> int:
        size = self.capacity
        if not all(each.is_contiguous() for each in tensors):
            size -= size // 6  # chunks are copied
        return size

    def _scales_of_chunk(
        self,
        flat: tuple[Tensor, ...],
        amax: tuple[Tensor | None, Tensor | None],
        start: int,
        shape: torch.Size,
        sample: Sample | None,
    ) -> Tensor:
        """Return the scale of each element of a chunk: float64, (formats, elements)."""
        stop = start + len(flat[0])
        indices = torch.arange(start, stop) if sample is None else sample.indices[start:stop].cpu()
        sharing, of_groups = self.sharing_of(shape, indices), amax[0]
        if of_groups is not None:
            sharing, groups = sharing.of_its_groups()
            of_groups = of_groups[groups]
        sharing = sharing.to(flat[0].device)
        return element_scales(flat[0], flat[1], of_groups, amax[1], sharing, self.formats)

    def sharing_of(self, shape: torch.Size, indices: Tensor) -> Sharing:
        """Return which of a parameter's elements share a scale; see `Sharing.of`."""
        return Sharing.of(shape, indices, self.formats.block_sizes, self.formats.scaling)

    def single_scales(self, amax: Tensor | None, layers: int, device: torch.device) -> Tensor:
        """Return scales that follow from the amax of layers: float64, (layers, formats, 1)."""
        if amax is None:
            amax = torch.zeros(layers, device=device)  # it serves no format
        return single_scales(amax, self.formats).unsqueeze(-1)

    def batch(
        self,
        rows: Rows,
        layer_of_row: Tensor,
        counted: Tensor,
        scales: Tensor | tuple[Sharing, Tensor | None],
        ever: EverMoved | None,
    ) -> Batch:
        """Prepare what `measure_batch` measures step after step.

        Args:
            rows: The elements, in memory that each step is copied to.
            layer_of_row: int64, (rows): the layer of each row.
            counted: float64, (layers, 2): how many elements the parameter has and the rows hold.
            scales: Scales, or what shares them, as `with_scales` takes them.
            ever: What the elements have done so far; None where they are not tracked.

        Returns:
            The batch.
        """
        judged = self.formats.judged(rows.before.dtype)
        layers = Layers.of(layer_of_row, counted, judged)
        batch = Batch(rows, layers, _own_grid(rows.before.dtype), None, None, ever)
        return self.with_scales(batch, scales)

    def with_scales(self, batch: Batch, scales: Tensor | tuple[Sharing, Tensor | None]) -> Batch:
        """Return the batch under other scales.

        Args:
            batch: The batch.
            scales: float64, (1 or rows, formats, 1); or which elements share a scale, with the
                amax of their groups.
        """
        if isinstance(scales, tuple):
            return batch._replace(sharing=scales)
        return batch._replace(grids=self.grids(scales, batch.rows.before.device))

    @torch.no_grad()
    def measure_batch(self, batch: Batch) -> Tensor:
        """Measure many small layers at once: float64, (layers, columns); see `measure_tensor`."""
        grids = batch.grids if batch.sharing is None else self._grids_of_elements(batch)
        (rows, _, columns), device = batch.rows.before.shape, batch.rows.before.device
        buffers = self._workspace.buffers(rows, len(self.formats.names), columns, device)
        histograms = batch.layers.histograms
        histograms.counts.zero_()
        found = row_sums(batch.rows, grids, batch.own_grid, buffers, histograms, batch.ever)
        return batch.layers.vectors(*found)

    def _grids_of_elements(self, batch: Batch) -> Grids | None:
        assert batch.sharing is not None
        (sharing, amax), before = batch.sharing, batch.rows.before
        flat = before.reshape(-1), batch.rows.after.reshape(-1)
        tensor_amax = None
        if amax is not None and self.formats.needs_tensor_amax:
            tensor_amax = tensor_amax_of(flat[0], amax, sharing)
        scales = element_scales(*flat, amax, tensor_amax, sharing, self.formats)
        by_row = scales.view(-1, before.shape[0], before.shape[2]).transpose(0, 1)
        return self.grids(by_row, before.device)


def check_step(before: Tensor, after: Tensor, gradient: Tensor | None) -> None:
    """Raise TypeError or ValueError unless the tensors of a step can be measured."""
    check_pair("before", before, "after", after)
    if before.dtype != after.dtype:
        raise TypeError(
            f"before has dtype {before.dtype} and after {after.dtype}; expected the same"
        )
    if gradient is not None:
        check_pair("before", before, "gradient", gradient)


def _added(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Add up the sums of two chunks, and take the larger of their extrema."""
    return one[0] + other[0], torch.maximum(one[1], other[1])


def _own_grid(dtype: torch.dtype) -> tuple[float, float]:
    """Return 2**-M of a dtype, and its smallest positive number that is not flushed to zero."""
    info = torch.finfo(dtype)
    return info.eps, max(info.tiny * info.eps, torch.finfo(torch.float64).tiny)
