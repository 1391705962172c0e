"""`Measurer`: compute the sums and maxima of each layer in a step, from which figures follow.

The weights before and after the step, and the gradients, are measured on their device. Large layers
are measured one by one in chunks (`measure_tensor`), small ones together in one call of the kernel
(`measure_batch`).

Read `kernel`, `totals` and `chunks` first; `step_table` comes next and turns the sums and maxima
into figures.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.measurement.chunks import Sample, as_row, slice_flags, split_chunks
from altgrad.measurement.kernel import EverMoved, Histograms, Rows, row_sums
from altgrad.measurement.native_code import native_code
from altgrad.measurement.native_rows import can_measure, native_row_sums
from altgrad.measurement.totals import Clusters, Layers
from altgrad.measurement.workspace import BATCH_BYTES, CHUNK_BYTES, Workspace, compute_capacity
from altgrad.quantization.arguments import check_pair
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.grids import Grids, make_grids
from altgrad.quantization.scale_groups import (
    Amaxes,
    Sharing,
    compute_element_scales,
    compute_layer_amax,
    compute_single_scales,
    update_tensor_amaxes,
)

# Least number of chunks of a sample that was drawn in blocks, if it has as many blocks. Each chunk
# is a cluster, and a standard error follows from the differences between clusters.
_FEWEST_CHUNKS = 32


class Batch(NamedTuple):
    """A batch of small layers with weights in one dtype, prepared once and measured at many steps.

    Attributes:
        rows: Weights before and after the step, and gradients, of the measured elements, each row
            with elements of one layer. Each step is copied into this memory.
        layers: The layers that the rows belong to, with the constants to add up rows to layers.
        dtype_grid: For the dtype of the weights: 2**-M for M mantissa bits, and its smallest normal
            number.
        grids: The grids of the formats, under the scales of each row. None without formats, or if
            `sharing` is set.
        sharing: A map of the elements that share a scale, over all rows end to end, and the amaxes,
            the largest magnitudes that scales follow from. None if each row has one scale for each
            format.
        ever: Flags that say which elements have moved so far, updated at each step. None if
            never_moved_frac is not measured.
    """

    rows: Rows
    layers: Layers
    dtype_grid: tuple[float, float]
    grids: Grids | None
    sharing: tuple[Sharing, Amaxes | None] | None
    ever: EverMoved | None


class Measurer:
    """A measurer of optimizer steps, which computes sums for a set of number formats.

    The sums are over elements of each layer, of quantities such as update². The metrics of a step
    follow from these, see `step_table`. The working memory is reused.

    Args:
        formats: The formats with their scaling.

    Attributes:
        formats: The `formats` argument.
        capacity: Maximum number of elements in a chunk of a large tensor.
        batch_capacity: Maximum number of elements in a batch of small layers.

    Raises:
        ValueError: A block that shares a scale has more elements than `capacity`.
    """

    def __init__(self, formats: FormatSet) -> None:
        self.formats = formats
        self.capacity, self.batch_capacity = (
            compute_capacity(memory, len(formats), scale_per_element=not formats.is_single)
            for memory in (CHUNK_BYTES, BATCH_BYTES)
        )
        if formats.block > self.capacity:
            raise ValueError(
                f"scaling={formats.scaling!r}: blocks of all formats fit into {formats.block} "
                f"elements together; expected at most {self.capacity}, as many as are measured at "
                "once; use 'tensor' or 'channel'"
            )
        self._workspace = Workspace()

    def make_grids(self, scale: Tensor | None, device: torch.device) -> Grids | None:
        """Make the grids of the formats, the numbers that each can store, under some scales.

        Args:
            scale: Scales, float64 (1 or rows, formats, 1 or elements). None for a scale of 1.
            device: Device of the grids.

        Returns:
            The grids; None without formats.
        """
        if not self.formats:
            return None
        return make_grids(
            [format.element for format in self.formats],
            [applied is not None for applied in self.formats.applied],
            scale,
            power_of_two=all(format.power_of_two for format in self.formats),
            device=device,
        )

    def take_amaxes(self, before: Tensor, after: Tensor) -> Amaxes:
        """Compute the amax, the largest finite magnitude, of a layer.

        If channels have scales, compute that of each channel, a slice along dimension 0, as well.

        Args:
            before: Weights before the step, any floating-point dtype and shape.
            after: Weights after the step. Their amax is used where that of `before` is 0.

        Returns:
            The amaxes of one layer, float64 for float64 weights and float32 for others.
        """
        amaxes = Amaxes.from_groups(compute_layer_amax(before, self.formats.scaling))
        # bool() waits for the device. A monitor keeps amaxes from step to step instead, see
        # `altgrad.monitor.scale_state`.
        if not bool((amaxes.groups == 0).any()):
            return amaxes
        later = compute_layer_amax(after, self.formats.scaling)
        return amaxes.fill_zeros(Amaxes.from_groups(later))

    @torch.no_grad()
    def measure_tensor(
        self,
        before: Tensor,
        after: Tensor,
        gradient: Tensor | None = None,
        amaxes: Amaxes | None = None,
        ever: EverMoved | None = None,
        sample: Sample | None = None,
    ) -> Tensor:
        """Compute the sums and maxima, from which metrics follow, of a step of one tensor.

        The tensor may have any size. The sums are over its elements, of quantities such as update².

        Args:
            before: Weights before the step, float16, bfloat16, float32 or float64, any shape.
            after: The same weights after the step, with the dtype and shape of `before`.
            gradient: The gradient as the optimizer applied it, with the shape of `before`. None if
                there is no gradient.
            amaxes: Amaxes (largest magnitudes, from which scales follow) that the caller keeps from
                step to step, as `take_amaxes` returns them. If None, they are computed here, and
                the host waits for the device.
            ever: Flags that say which elements have moved so far, as one row, updated in place.
                None if never_moved_frac is not measured.
            sample: The elements of a layer that the tensors hold, which then have one dimension.
                None if they hold a whole layer.

        Returns:
            Sums and maxima on the device, float64 (columns), in the order of
            `altgrad.measurement.columns`.

        Raises:
            TypeError: A tensor is not floating-point, or `before` and `after` differ in dtype.
            ValueError: Shapes differ.
        """
        check_step(before, after, gradient)
        if amaxes is None and self.formats.needs_amax:
            amaxes = self.take_amaxes(before, after)
        device, shape = before.device, before.shape if sample is None else sample.shape
        grids = found = None
        if self.formats.is_single:
            groups = None if amaxes is None else amaxes.groups
            grids = self.make_grids(self.compute_scales(groups, 1, device), device)
        elif amaxes is not None and self.formats.needs_tensor_amax:
            amaxes = amaxes._replace(layers=update_tensor_amaxes(before, amaxes.layers))
        layers = self._describe_layer(before, shape.numel())
        dtype_grid = _get_dtype_grid(before.dtype)
        tensors = (before, after) if gradient is None else (before, after, gradient)
        # start: position of a chunk; size: maximum number of elements in it; block: number of
        # neighbours that stay in one chunk.
        start, size, block = 0, self._chunk_size(tensors), self.formats.block
        has_blocks = sample is not None and sample.block > 1
        if has_blocks:
            size = max(min(size, before.numel() // _FEWEST_CHUNKS), block)
        for flat in split_chunks(tensors, size, block=block, sample=sample):
            count = len(flat[0])
            if not self.formats.is_single:
                scales = self._compute_element_scales(flat, amaxes, start, shape, sample)
                grids = self.make_grids(scales.unsqueeze(0), device)
            # The kernel adds counts to the histograms of `layers`; `_add_chunks` adds up the sums.
            part = None if ever is None else slice_flags(ever, start, count)
            chunk = self._sum_rows(as_row(flat), grids, dtype_grid, layers.histograms, part)
            if has_blocks:
                layers = layers.add_cluster(chunk[0], count)
            found = chunk if found is None else _add_chunks(found, chunk)
            start += count
        return layers.add_up(*(found or layers.make_empty_row()))[0]

    def _describe_layer(self, before: Tensor, population: int) -> Layers:
        """Return an empty `Layers`, to add up the chunks of one layer to its sums and maxima.

        The sums and maxima are those over weights and updates, such as Σ update², from which all
        metrics follow. A chunk is a part of the layer's elements.

        Args:
            before: Weights of the measured elements before the step.
            population: Number of elements of the whole layer.

        Returns:
            A `Layers` with this layer alone, whose elements form one row; nothing is counted in its
            histograms of weights and updates so far.
        """
        row = torch.zeros(1, dtype=torch.int64, device=before.device)
        counted = torch.tensor([[population, before.numel(), 0]], dtype=torch.float64, device="cpu")
        return Layers.create(row, counted.to(before.device), self.formats.judged(before.dtype))

    def _chunk_size(self, tensors: tuple[Tensor, ...]) -> int:
        """Return the maximum number of elements in a chunk; less if a tensor is not contiguous."""
        size = self.capacity
        if not all(each.is_contiguous() for each in tensors):
            # Chunks are copied. Copies take up to 3 · 8 bytes for each element, a sixth of the 144
            # bytes that buffers take with one format.
            size -= size // 6
        return size

    def _compute_element_scales(
        self,
        flat: tuple[Tensor, ...],
        amaxes: Amaxes | None,
        start: int,
        shape: torch.Size,
        sample: Sample | None,
    ) -> Tensor:
        """Compute the scale of each element of a chunk, by which a format divides the element.

        Args:
            flat: The chunk's weights before the step and after it, (elements) each.
            amaxes: The amaxes of the layer, largest magnitudes of it and its channels. None if no
                format needs them.
            start: Position of the chunk's first element among the measured elements.
            shape: Shape of the whole layer.
            sample: The elements that are measured; None for all.

        Returns:
            Scales, float64 (formats, elements).
        """
        stop = start + len(flat[0])
        indices = (
            torch.arange(start, stop, device="cpu")
            if sample is None
            else sample.indices[start:stop].cpu()
        )
        sharing = self.find_sharing(shape, indices)
        if amaxes is not None:
            # A chunk has a few of the layer's channels. Number these from 0, and select their amax.
            sharing, groups = sharing.trim_groups()
            amaxes = amaxes._replace(groups=amaxes.groups[groups])
        sharing = sharing.to(flat[0].device)
        return compute_element_scales(flat[0], flat[1], amaxes, sharing, self.formats)

    def find_sharing(self, shape: torch.Size, indices: Tensor) -> Sharing:
        """Find which elements of a layer share a scale, by which formats divide weights.

        Args:
            shape: Shape of the whole layer.
            indices: Indices of the measured elements into the flattened layer, int64 (elements) on
                the CPU, ascending.

        Returns:
            A map from each element to its channel or layer, and to its blocks, on the CPU.
        """
        return Sharing.from_indices(shape, indices, self.formats.block_sizes, self.formats.scaling)

    def compute_scales(self, amax: Tensor | None, layers: int, device: torch.device) -> Tensor:
        """Compute one scale for each layer and format, by which the format divides weights.

        Args:
            amax: Amax (largest magnitude) of each layer, float32 or float64 (layers). None if no
                format needs one.
            layers: Number of layers.
            device: Device of the layers.

        Returns:
            Scales, float64 (layers, formats, 1).
        """
        if amax is None:
            amax = torch.zeros(layers, device=device)  # only the shape matters: no format uses it
        return compute_single_scales(amax, self.formats).unsqueeze(-1)

    def prepare_batch(
        self,
        rows: Rows,
        row_layers: Tensor,
        counted: Tensor,
        scales: Tensor | tuple[Sharing, Amaxes | None],
        ever: EverMoved | None,
        clusters: tuple[Tensor, Tensor] | None = None,
    ) -> Batch:
        """Prepare a batch of small layers, which `measure_batch` measures at each step.

        Args:
            rows: The memory that each step is copied to, each row with elements of one layer.
            row_layers: Index of the layer of each row, int64 (rows).
            counted: For each layer its number of elements, its number of measured elements, and the
                number of clusters of these, 0 without clusters, float64 (layers, 3).
            scales: Scales, or the elements that share scales; see `with_scales`.
            ever: Flags that say which elements have moved so far, updated at each step. None if
                never_moved_frac is not measured.
            clusters: Index of the cluster of each row, int64 (rows), and the number of elements of
                each row, float64 (rows), on any device. A cluster is one or several rows of a
                sample that was drawn in blocks. None without such samples.

        Returns:
            The batch, on the device of the rows.
        """
        judged = self.formats.judged(rows.before.dtype)
        described = None
        if clusters is not None:
            row_clusters, row_elements = (each.to(counted.device) for each in clusters)
            described = Clusters.create(row_clusters, row_layers, row_elements, len(judged))
        layers = Layers.create(row_layers, counted, judged, described)
        batch = Batch(rows, layers, _get_dtype_grid(rows.before.dtype), None, None, ever)
        return self.with_scales(batch, scales)

    def with_scales(self, batch: Batch, scales: Tensor | tuple[Sharing, Amaxes | None]) -> Batch:
        """Return a copy of a batch of layers with other scales, by which formats divide weights.

        Args:
            batch: The batch; it is not changed.
            scales: One scale for each row and format, float64 (1 or rows, formats, 1). If scales
                differ within a row, a pair: the map of elements that share a scale, and amaxes, the
                largest magnitudes among these.
        """
        if isinstance(scales, tuple):
            return batch._replace(sharing=scales)
        return batch._replace(grids=self.make_grids(scales, batch.rows.before.device))

    @torch.no_grad()
    def measure_batch(self, batch: Batch) -> Tensor:
        """Compute the sums and maxima, from which metrics follow, of a step of many small layers.

        The sums are over the elements of each layer, of quantities such as update².

        Args:
            batch: The batch, into whose memory the step was copied.

        Returns:
            Sums and maxima on the device, float64 (layers, columns), in the order of
            `altgrad.measurement.columns`.
        """
        grids = batch.grids if batch.sharing is None else self._make_element_grids(batch)
        histograms = batch.layers.histograms
        histograms.counts.zero_()  # the counts of the previous step
        found = self._sum_rows(batch.rows, grids, batch.dtype_grid, histograms, batch.ever)
        return batch.layers.add_up(*found)

    def _sum_rows(
        self,
        rows: Rows,
        grids: Grids | None,
        dtype_grid: tuple[float, float],
        histograms: Histograms,
        ever: EverMoved | None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the sums and extrema of rows by the native kernel, if it is loaded, or eagerly.

        The eager kernel alone needs the buffers of the workspace, and measures on all devices.

        Args:
            rows: Weights and gradients of the elements.
            grids: The grids of the formats. None without formats.
            dtype_grid: 2**-M and the smallest normal number of the dtype of the weights.
            histograms: Counts of elements by octave (power of two); updated in place.
            ever: Flags that say which elements have moved so far; updated in place.

        Returns:
            Sums and extrema of each row, as those of `row_sums`.
        """
        native = native_code.function
        if native is not None and can_measure(rows.before):
            return native_row_sums(native, rows, grids, dtype_grid, histograms, ever)
        (count, _, elements), device = rows.before.shape, rows.before.device
        buffers = self._workspace.buffers(count, len(self.formats), elements, device)
        return row_sums(rows, grids, dtype_grid, buffers, histograms, ever)

    def _make_element_grids(self, batch: Batch) -> Grids | None:
        """Make grids of the formats with a scale for each element, from weights of this step."""
        assert batch.sharing is not None
        (sharing, amaxes), before = batch.sharing, batch.rows.before
        # `sharing` numbers the elements of all rows, end to end.
        flat = before.reshape(-1), batch.rows.after.reshape(-1)
        if amaxes is not None and self.formats.needs_tensor_amax:
            raised = update_tensor_amaxes(flat[0], amaxes.layers, sharing)
            amaxes = amaxes._replace(layers=raised)
        scales = compute_element_scales(*flat, amaxes, sharing, self.formats)
        by_row = scales.view(-1, before.shape[0], before.shape[2]).transpose(0, 1)
        return self.make_grids(by_row, before.device)


def check_step(before: Tensor, after: Tensor, gradient: Tensor | None) -> None:
    """Raise an error unless the tensors of a step have the same shape and suitable dtypes.

    Args:
        before: Weights before the step.
        after: Weights after the step.
        gradient: The gradient; None if there is no gradient.

    Raises:
        TypeError: A tensor is not floating-point, or `before` and `after` differ in dtype.
        ValueError: Shapes differ.
    """
    check_pair("before", before, "after", after)
    if before.dtype != after.dtype:
        raise TypeError(
            f"before has dtype {before.dtype} and after {after.dtype}; expected the same"
        )
    if gradient is not None:
        check_pair("before", before, "gradient", gradient)


def _add_chunks(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Combine the sums and extrema of two chunks: add the sums, and keep the larger extrema."""
    return one[0] + other[0], torch.maximum(one[1], other[1])


def _get_dtype_grid(dtype: torch.dtype) -> tuple[float, float]:
    """Return 2**-M for the M mantissa bits of a dtype, and its smallest normal number."""
    info = torch.finfo(dtype)
    return info.eps, info.tiny
