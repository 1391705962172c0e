"""From tensors to `LayerStatistics`, in chunks that stay in cache; `measure` does it for one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad.figures import metrics_of
from altgrad.metrics import NEED_GRADIENT, NEED_TRACKING
from altgrad.quantization.arguments import check_pair
from altgrad.quantization.block_formats import BlockFormat, NumberFormat, get_formats
from altgrad.quantization.grids import Grids, grids_of
from altgrad.quantization.scaling import Scaling, check_scaling
from altgrad.row_kernel import EverMoved, Histograms, Rows, RowSums, row_sums
from altgrad.scales import Scales, is_scaled, scales_of, scales_of_each
from altgrad.statistics import LayerStatistics, sum_count
from altgrad.totals import LayersOfRows, Totals, bins_of, count_octaves, meant_columns
from altgrad.workspace import Workspace, columns_that_fit, fresh_buffers

DEFAULT_FORMATS = ("bf16", "e4m3fn", "e5m2")
"""What is judged where nothing else is asked: bf16 and the two FP8 formats in use."""

_COMPILED_COLUMNS = 4096
_COMPILED_CHUNK = 2**18  # elements, of which the octaves of five are held as integers

# Inductor splits what is summed together into loops that hand tensors on, unless told not to.
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp.max_horizontal_fusion_size": 256,
    "max_fusion_size": 512,
    "realize_opcount_threshold": 10**6,
    "realize_reads_threshold": 10**6,
    "realize_acc_reads_threshold": 10**6,
}

Formats = str | torch.dtype | NumberFormat | Iterable[str | torch.dtype | NumberFormat]


@torch.no_grad()
def measure(
    before: Tensor,
    after: Tensor,
    gradient: Tensor | None = None,
    formats: Formats = DEFAULT_FORMATS,
    scaling: Scaling | None = "tensor",
    *,
    compile: bool = False,
) -> dict[str, float]:
    """What one optimizer step did to one tensor, and what each format would have kept of it.

    Everything is computed in float64 over the elements that are finite before, after and in the
    gradient; the others are counted in ``nonfinite_frac`` alone. (So are float64 numbers from 1e289
    on.) A figure that has no value is NaN: nothing moved, no gradient, no element. Values whose
    squares leave float64 give inf or 0. Where the weights are already stored at or below a format's
    precision (bf16 weights judged for bf16), updates that stalled can no longer be seen, and the
    what-if figures of that format are NaN; ``unmoved_frac`` is the one to read.

    Args:
        before: The weights before the step: float16, bfloat16, float32 or float64, any shape.
        after: The same weights after it, of the same dtype.
        gradient: The gradient as the optimizer applied it: unscaled and clipped. Without it the
            figures that need it are left out.
        formats: Formats or their names, one or several; block formats (``"mxfp8_e4m3"``,
            ``"nvfp4"``, …) with the scales of their own.
        scaling: Which elements share an amax scale in formats of fewer than 16 bits, as in
            `compute_scale`, taken from `before` and kept for both sides of the step; None judges
            them unscaled, as those of 16 bits always are.
        compile: Whether to use torch.compile: half a minute for the first call, then faster on
            large tensors.

    Returns:
        Figures by key: ``metric`` for the tensor, ``metric/format`` for each format, under the
        format's own name: ``stall_frac/e4m3fn`` also where it was asked for as ``"e4m3"``.

        `altgrad.metrics` has their units, ranges and meanings. First come ``kept_update_ratio``
        (⟨effective update, update⟩ over ⟨update, update⟩: 1 is all, 0 is nothing) and
        ``stall_frac`` (share of non-zero updates that vanish); what compares the gradient is
        descriptive.

    Raises:
        TypeError: Not floating-point tensors, or before and after of different dtypes.
        ValueError: Shapes that differ, an unknown format, two formats of one name, or a wrong
            scaling.

    Example:
        >>> import torch
        >>> from altgrad import measure
        >>> before = torch.ones(4)  # a LayerNorm gain
        >>> after = before + 1e-3  # an update of AdamW at learning rate 1e-3
        >>> figures = measure(before, after, formats=["fp16", "bf16"])
        >>> figures["stall_frac/fp16"], figures["stall_frac/bf16"]
        (0.0, 1.0)
    """
    measurer = Measurer(formats, scaling, compile=compile)
    (figures,) = metrics_of([measurer.statistics_of(before, after, gradient)])
    left_out = NEED_TRACKING if gradient is not None else NEED_TRACKING | NEED_GRADIENT
    return {key: figures[key] for key in figures if key.split("/")[0] not in left_out}


class Batch(NamedTuple):
    """Rows of several layers that are stored in one dtype, and what does not change with a step.

    Attributes:
        rows: The elements.
        layers: Which layer each row belongs to.
        counted: float64, (layers, 2): how many elements the parameter has and the rows hold.
        grids: The formats, with the scale of each row.
        bins: Where the histogram of each row begins.
        meant: As in `Totals.vectors`.
        weights: (1, layers): how many elements each of those measured stands for.
        ever: What the elements have done so far; updated. None if they are not tracked.
    """

    rows: Rows
    layers: LayersOfRows
    counted: Tensor
    grids: Grids | None
    bins: tuple[Tensor, Tensor, Tensor]
    meant: Tensor | None
    weights: Tensor
    ever: EverMoved | None


class Measurer:
    """Measures steps on the same formats again and again, in memory that it keeps.

    Args:
        formats, scaling, compile: As in `measure`.
        histograms: Whether to count octaves, which the two medians of logarithms need.

    Attributes:
        formats: The formats.
        names: Their names.
        scaling: As given.
    """

    def __init__(
        self,
        formats: Formats = DEFAULT_FORMATS,
        scaling: Scaling | None = "tensor",
        *,
        compile: bool = False,
        histograms: bool = True,
    ) -> None:
        if scaling is not None:
            check_scaling(scaling)
        self.formats = get_formats(formats)
        self.names = tuple(format.name for format in self.formats)
        self.scaling = scaling
        self._histograms = histograms
        self._workspace = Workspace()
        self._compiled = (
            torch.compile(_compiled_rows, dynamic=True, fullgraph=True, options=_OPTIONS)
            if compile
            else None
        )

    def scales_of(self, parameter: Tensor) -> Scales:
        """The scales that these weights set."""
        return scales_of(parameter, self.formats, self.scaling)

    def scales_of_each(self, parameters: Sequence[Tensor]) -> list[Scales]:
        """Those of many; some of it is read on the host."""
        return scales_of_each(parameters, self.formats, self.scaling)

    def grids(self, scale: Tensor | None, device: torch.device) -> Grids | None:
        """The formats under a scale of (1 or rows, formats, 1 or columns); None without formats."""
        if not self.formats:
            return None
        blocks = [isinstance(format, BlockFormat) for format in self.formats]
        return grids_of(
            [f.element if isinstance(f, BlockFormat) else f for f in self.formats],
            [is_scaled(format, self.scaling) for format in self.formats],
            scale,
            power_of_two=not any(blocks),
            device=device,
        )

    @torch.no_grad()
    def statistics_of(
        self,
        before: Tensor,
        after: Tensor,
        gradient: Tensor | None = None,
        scales: Scales | None = None,
        ever: EverMoved | None = None,
    ) -> LayerStatistics:
        """The statistics that all metrics of one tensor's step follow from, on its device.

        Args:
            before: As in `measure`.
            after: Likewise.
            gradient: Likewise.
            scales: Of the weights, where they are kept from step to step; None takes those that
                `before` sets.
            ever: What the elements have done so far, as one row; updated.

        Raises:
            TypeError, ValueError: As `measure`.
        """
        check_step(before, after, gradient)
        scales = self.scales_of(before) if scales is None else scales
        device, count = before.device, before.numel()
        single = scales.are_single
        grids = self.grids(_single(scales), device) if single else None
        totals = Totals(1, len(self.formats), device)
        one_layer = torch.zeros(1, dtype=torch.int64, device=device)
        histograms = Histograms(totals.counts, *bins_of(one_layer, len(self.formats)))
        size = self.elements_that_fit(single=single)
        if not all(each is None or each.is_contiguous() for each in (before, after, gradient)):
            size -= size // 6  # chunks are copied
        columns = size if self._compiled is None else _COMPILED_COLUMNS
        start = 0
        for rows in _chunks(before, after, gradient, size, columns):
            stop = start + rows.before.numel()
            if not single:
                scale = scales.of_elements(torch.arange(start, stop, device=device))
                grids = self.grids(
                    scale.view(len(scale), rows.before.shape[0], -1).transpose(0, 1), device
                )
            part = _part(ever, start, stop, rows.before.shape)
            totals.add(self._rows(rows, grids, histograms, part))
            start = stop
        meant = meant_columns(self.judges(before.dtype), device)
        counted = torch.full((1, 2), count, dtype=torch.float64, device=device)
        vector = totals.vectors(counted, meant)[0]
        middle = sum_count(len(self.formats))
        return LayerStatistics(self.names, vector[:middle], vector[middle:])

    def batch(
        self,
        rows: Rows,
        layer_of_row: Tensor,
        counted: Tensor,
        scale: Tensor,
        ever: EverMoved | None,
    ) -> Batch:
        """What `vectors_of` measures step after step; the scale as in `grids`."""
        device = counted.device
        return Batch(
            rows,
            LayersOfRows.of(layer_of_row, len(self.formats)),
            counted,
            self.grids(scale, device),
            bins_of(layer_of_row, len(self.formats)),
            meant_columns(self.judges(rows.before.dtype), device),
            weights_of(counted),
            ever,
        )

    @torch.no_grad()
    def vectors_of(self, batch: Batch) -> Tensor:
        """A row for each of the batch's layers: its sums, then its maxima."""
        totals = Totals(len(batch.counted), len(self.formats), batch.counted.device)
        histograms = Histograms(totals.counts, *batch.bins)
        rows = self._rows(batch.rows, batch.grids, histograms, batch.ever)
        totals.add(rows, batch.layers)
        return totals.vectors(batch.counted, batch.meant)

    def _rows(
        self,
        rows: Rows,
        grids: Grids | None,
        histograms: Histograms,
        ever: EverMoved | None,
    ) -> RowSums:
        own_grid = _own_grid(rows.before.dtype)
        counting = histograms if self._histograms else None
        if self._compiled is not None:
            sums: RowSums = self._compiled(rows, grids, own_grid, counting, ever)
            if counting is not None:
                count_octaves(sums, counting)
            return sums
        shape = rows.before.shape[0], len(self.formats), rows.before.shape[-1]
        buffers = self._workspace.buffers(*shape, rows.before.device)
        return row_sums(rows, grids, own_grid, buffers, counting, ever)

    def elements_that_fit(self, *, single: bool) -> int:
        """How many elements one call of the kernel may measure, within the memory it may take."""
        if self._compiled is not None:
            return _COMPILED_CHUNK
        return columns_that_fit(len(self.formats), scale_per_element=not single)

    def judges(self, dtype: torch.dtype) -> list[bool]:
        """For each format, whether weights stored in this dtype show the updates it would lose."""
        return [format.is_coarser_than(dtype) for format in self.formats]


def weights_of(counted: Tensor) -> Tensor:
    """(1, layers) from populations and elements in columns."""
    return (counted[:, 0] / counted[:, 1].clamp(min=1)).unsqueeze(0)


def check_step(before: Tensor, after: Tensor, gradient: Tensor | None) -> None:
    """TypeError or ValueError unless they can be measured."""
    check_pair("before", before, "after", after)
    if before.dtype != after.dtype:
        raise TypeError(
            f"before has dtype {before.dtype} and after {after.dtype}; expected the same"
        )
    if gradient is not None:
        check_pair("before", before, "gradient", gradient)


def _compiled_rows(
    rows: Rows,
    grids: Grids | None,
    own_grid: tuple[float, float],
    histograms: Histograms | None,
    ever: EverMoved | None,
) -> RowSums:
    formats = 0 if grids is None else grids.eps.shape[1]
    buffers = fresh_buffers(
        rows.before.shape[0], formats, rows.before.shape[-1], rows.before.device
    )
    return row_sums(rows, grids, own_grid, buffers, histograms, ever)


def _own_grid(dtype: torch.dtype) -> tuple[float, float]:
    """2**-M and the smallest positive number of a dtype."""
    info = torch.finfo(dtype)
    return info.eps, info.tiny * info.eps


def _single(scales: Scales) -> Tensor | None:
    """(1, formats, 1)."""
    return scales.single.view(1, -1, 1) if scales.values else None


def _chunks(
    before: Tensor, after: Tensor, gradient: Tensor | None, size: int, columns: int
) -> Iterator[Rows]:
    """All elements in row-major order; those that do not fill a row are one of their own."""
    tensors = (before, after) if gradient is None else (before, after, gradient)
    for flat in _flat(tensors, size):
        whole = flat[0].numel() // columns * columns
        for part in (slice(whole), slice(whole, None)):
            count = flat[0][part].numel()
            if count:
                shape = (-1, 1, columns) if part.start is None else (1, 1, count)
                rows = [each[part].view(shape) for each in flat]
                yield Rows(rows[0], rows[1], rows[2] if gradient is not None else None)


def _flat(tensors: tuple[Tensor, ...], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of up to `size` elements in one dimension; copies only where it must be."""
    if all(each.is_contiguous() for each in tensors):
        yield from zip(
            *(torch.split(each.detach().view(-1), size) for each in tensors), strict=True
        )
    elif tensors[0].numel() <= size:
        yield tuple(each.detach().reshape(-1) for each in tensors)
    else:
        length = max(size * tensors[0].shape[0] // tensors[0].numel(), 1)
        for parts in zip(*(torch.split(each, length) for each in tensors), strict=True):
            yield from _flat(
                tuple(part.squeeze(0) if length == 1 else part for part in parts), size
            )


def _part(ever: EverMoved | None, start: int, stop: int, shape: torch.Size) -> EverMoved | None:
    """Of one row, those elements, as so many rows."""
    if ever is None:
        return None
    moved, effective = (
        each[0, :, start:stop].reshape(each.shape[1], shape[0], shape[2]) for each in ever
    )
    return EverMoved(moved.transpose(0, 1), effective.transpose(0, 1))
