"""`RunWeights`: the sampled weights of the run, and those that something besides a step changed.

The *run* is the training that is watched. An average that is swapped in, a checkpoint that is
loaded, or a pruning changes its weights between two steps. Twins take such weights over, or they
would go another way than the run. The changes are found in two ways:

- torch counts most writes to a tensor. A layer that was written to is compared with the *reference
  twin*, which steps a sample just as the run does, so that its weights should be those of the run.
- Writes through `.data` are not counted. If the reference twin differs from a layer before a step
  that is checked, there was such a write, or the twin is wrong. The weights are taken over, and
  *watched* from then on: gathered at the end of each step and compared at the beginning of the
  next. Every write is then found, and a twin that still differs is wrong.

Read `lane_sorter` first; `run_states` comes next.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from altgrad.quantization.devices import gather_all
from altgrad.twins.layer_plan import LaneKind
from altgrad.twins.layout import Layout
from altgrad.twins.sample import Sampled, find_columns, get_block_size
from altgrad.twins.self_check import compare, find_suspected
from altgrad.twins.twin_tensors import TwinTensors
from altgrad.twins.writes import count_writes_to_each


class RunWeights:
    """The weights of the training at the elements that twins step.

    *Twins* step a sample of each layer. All samples lie one after another in a flat tensor.

    Args:
        kind: The properties that the layers share.

    Attributes:
        values: The weights when they were last gathered, in the dtype of the training, (elements);
            0 at padding.
        rows: Positions in `values` of the elements of each layer, int64 (layers, width).
        layer_rows: The row in `rows` of each element's layer, int64 (elements); 0 at padding.
        mask: bool (layers, width), False where a row has no element of its layer.
        blocks: Number of neighbours that were drawn together in each layer; 1 for single elements.
        block_counts: Number of blocks in the sample of each layer; 0 for single elements.
        has_gradient: bool (elements), True if `note_gradients` got a gradient other than 0 since
            `begin_window`.
        is_watching: True if weights are gathered after each step, and compared before the next, to
            find writes that torch does not count.
    """

    def __init__(self, kind: LaneKind) -> None:
        self.is_watching = False
        self._kind = kind
        self._layers: Mapping[str, Sampled] = {}
        self._layout = Layout()
        self._places: list[Tensor] = []  # parts of `values`, one for each layer
        self._indices: list[Tensor] = []  # the sample of each layer, on the layer's own device
        self._versions: tuple[list[int], ...] = ([], [])
        self.values = torch.zeros(0, dtype=kind.dtype, device=kind.device)
        self.rows = self.layer_rows = torch.zeros(0, dtype=torch.int64, device=kind.device)
        self.mask = torch.zeros(0, dtype=torch.bool, device=kind.device)
        self.has_gradient = torch.zeros(0, dtype=torch.bool, device=kind.device)
        # By layer, the last two of COUNTS: how often weights were taken over since the last check,
        # and whether they were before the last checked step, without a write that torch counted.
        self._times_changed = torch.zeros(0, dtype=torch.float64, device=kind.device)
        self._suspected = torch.zeros(0, dtype=torch.bool, device=kind.device)
        self.blocks: tuple[int, ...] = ()
        self.block_counts: tuple[int, ...] = ()

    def rearrange(
        self, layers: Mapping[str, Sampled], layout: Layout, begun: Collection[str] = ()
    ) -> list[str]:
        """Give the sampled elements other places in the flat tensor, and gather their weights.

        The samples of all layers lie one after another in a flat tensor. Weights of layers that
        stay are those after the last step, not those gathered now, so that a comparison finds what
        was written in between.

        Args:
            layers: The layers by name, in the order of the layout.
            layout: The places of the layers in a flat tensor.
            begun: Names of the layers that are new or have another sample than before.

        Returns:
            Names of the other layers whose parameter is another object than before.
        """
        device, names = self._kind.device, [*layers]
        known = {name: each for name, each in self._layers.items() if name not in begun}
        old, self._layers = [*self._layout.places], dict(layers)
        sources = self._layout.find_sources(layout, begun).to(device)
        last, self._layout = self.values, layout
        self.values = torch.zeros(layout.length, dtype=self._kind.dtype, device=device)
        self._places = [self.values[place] for place in layout.places.values()]
        self._indices = [each.places.to(each.weights.device) for each in layers.values()]
        shapes = [self._kind.find_block_shape(each.shape) for each in layers.values()]
        columns = [
            find_columns(each.indices, shape, self._kind.block)
            for each, shape in zip(layers.values(), shapes, strict=True)
        ]
        rows, mask = layout.find_rows(names, columns)
        for row, own, each in zip(mask, columns, layers.values(), strict=True):
            if each.shard is not None:
                row[own] &= each.shard.is_counted.cpu()
        self.blocks = tuple(get_block_size(shape, self._kind.block) for shape in shapes)
        self.block_counts = tuple(
            int(own[-1]) // size + 1 if size > 1 else 0
            for own, size in zip(columns, self.blocks, strict=True)
        )
        self.rows, self.mask = rows.to(device), mask.to(device)
        self.layer_rows = torch.zeros(layout.length, dtype=torch.int64, device=device)
        for row, place in enumerate(layout.places.values()):
            self.layer_rows[place] = row
        self._carry_counts(old, names)
        self.gather()
        if len(self.has_gradient):
            self.has_gradient = (sources >= 0) & self.has_gradient[sources]
        else:
            self.has_gradient = torch.zeros(layout.length, dtype=torch.bool, device=device)
        if len(last):
            self.values = torch.where(sources < 0, self.values, last[sources])
            self._places = [self.values[place] for place in layout.places.values()]
        self._versions = self._read_versions()
        return [n for n, each in known.items() if n in layers and _is_replaced(each, layers[n])]

    def _carry_counts(self, old: list[str], names: list[str]) -> None:
        """Carry over, to another order of layers, how often each was changed outside of steps.

        Args:
            old: Names of the layers before; some may be gone.
            names: Names of the layers now; some may be new, with counts of 0.
        """
        times, suspected = self._times_changed, self._suspected
        self._times_changed = times.new_zeros(len(names))
        self._suspected = suspected.new_zeros(len(names))
        for row, name in enumerate(old):
            if name in names:
                self._times_changed[names.index(name)] = times[row]
                self._suspected[names.index(name)] = suspected[row]

    def gather(self) -> Tensor:
        """Gather the weights as they are now into `values`, (elements), and return it."""
        weights = [each.weights for each in self._layers.values()]
        gather_all(weights, self._indices, self._places)
        return self.values

    def check(self, reference: TwinTensors, spacings: Tensor | None = None) -> Tensor:
        """Compare the reference twin, a sample stepped as the training is, with the training now.

        Args:
            reference: The weights of the reference twin.
            spacings: The distance between neighbouring numbers of the format in which the training
                stores each weight, float64 (elements); None if it stores them in their dtype.

        Returns:
            float64 (layers, counts): the differences in each layer,
            `altgrad.twins.self_check.COUNTS`, on the device. Counts of weights that were taken over
            begin anew with each call.
        """
        self.gather()
        times, self._times_changed = self._times_changed, torch.zeros_like(self._times_changed)
        suspected, self._suspected = self._suspected, torch.zeros_like(self._suspected)
        further = torch.stack([times, suspected.double()], dim=1)
        return torch.cat([self._compare(reference, spacings), further], dim=1)

    def _compare(self, reference: TwinTensors, spacings: Tensor | None = None) -> Tensor:
        each = (self.values, reference.weights, reference.start)
        run, twin, start = (numbers[self.rows] for numbers in each)
        own = None if spacings is None else spacings[self.rows]
        return compare(run, twin, start, self.mask, own)

    def note_gradients(self, gradients: Tensor, found_inf: Tensor | None) -> None:
        """Note in `has_gradient` which elements have a gradient other than 0 in a step.

        Args:
            gradients: The sampled gradients, floating-point (elements).
            found_inf: The flag of a GradScaler, not 0 if it skips the step; None without it.
        """
        is_made = True if found_inf is None else found_inf == 0
        self.has_gradient.logical_or_((gradients != 0) & is_made)

    def begin_window(self, shown: Tensor) -> None:
        """Forget in `has_gradient` which elements of recorded layers have had a gradient so far.

        It is called after a step whose figures are recorded. The time until the next such step is a
        *window*; some figures are about one window.

        Args:
            shown: bool (elements), False for layers that this step does not record, and whose
                window goes on.
        """
        self.has_gradient.logical_and_(~shown)

    # --- weights that something other than a step has changed

    def remember_writes(self) -> None:
        """Remember how often each weight was written to; called right after a step.

        Only later writes count as changes by something other than a step.
        """
        self._versions = self._read_versions()
        if self.is_watching:
            self.gather()

    def _read_versions(self) -> tuple[list[int], ...]:
        """Return lists with, for each layer, the number of writes to it, and its address.

        A write as by `p.data = …` changes the address. torch counts writes to a DTensor apart from
        those to its local shard.
        """
        layers = self._layers.values()
        held = [each.weights for each in layers]
        lists = count_writes_to_each(held), [*map(Tensor.data_ptr, held)]
        if all(each.shard is None for each in layers):
            return lists
        return (*lists, count_writes_to_each([each.parameter for each in layers]))

    def find_written(self) -> list[str]:
        """Return the layers to which torch has counted a write since `remember_writes`."""
        now, before = self._read_versions(), self._versions
        if now == before:
            return []
        each = zip(self._layers, zip(*now, strict=True), zip(*before, strict=True), strict=True)
        return [name for name, version, earlier in each if version != earlier]

    def find_changed(
        self, reference: TwinTensors, written: Collection[str], *, is_checkable: bool
    ) -> Tensor:
        """Find the weights that something other than a step has changed, before a step.

        The *reference twin* is a sample of the layers that is stepped just as the training is.

        Args:
            reference: The weights of the reference twin.
            written: Names of the layers with a write that torch has counted.
            is_checkable: False if the reference twin cannot equal the training, since the
                training's optimizer rounds at random.

        Returns:
            bool (elements): True for changed weights.
        """
        if self.is_watching:
            last = self.values.clone()
            changed = _differ(self.gather(), last)
        else:
            self.gather()
            layers = self._find_changed_layers(reference, written, is_checkable=is_checkable)
            changed = _differ(self.values, reference.weights) & layers[self.layer_rows]
        self._times_changed += (changed[self.rows] & self.mask).any(1)
        return changed

    def _find_changed_layers(
        self, reference: TwinTensors, written: Collection[str], *, is_checkable: bool
    ) -> Tensor:
        """Return a mask of the layers that were written to, or differ from the reference twin.

        The *reference twin* is a sample of the layers that is stepped just as the training is.
        Differences count only with `is_checkable`.

        Returns:
            bool (layers).
        """
        each = [name in written for name in self._layers]
        is_written = make_mask(each, self._kind.device)
        if not is_checkable:
            return is_written
        self._suspected = find_suspected(self._compare(reference)) & ~is_written
        return self._suspected | is_written

    def state_dict(self) -> dict[str, Tensor | None]:
        """Return the state that a resumed run needs to find the same writes.

        Returns:
            A dict with three keys. Under ``times_changed`` is how often something other than a step
            changed each layer since the last `check`, float64 (layers). Under ``has_gradient`` is
            the attribute, bool (elements). Under ``watched`` are the weights after the last step,
            (elements), or None if they are not watched.
        """
        return {
            "times_changed": self._times_changed.clone(),
            "has_gradient": self.has_gradient.clone(),
            "watched": self.values.clone() if self.is_watching else None,
        }

    def load_state_dict(self, state: Mapping[str, Tensor | None], layout: Layout) -> None:
        """Restore from a checkpoint what is known of the training's sampled weights.

        The checkpoint has how often something other than a step changed each layer, which elements
        had gradients, and the weights if they are watched. The next `rearrange` moves these numbers
        to the places that the elements have now.

        Args:
            state: A result of `state_dict`.
            layout: The places of the sampled elements in a flat tensor when the state was saved.
        """
        device, times, watched = self._kind.device, state["times_changed"], state["watched"]
        has_gradient = state["has_gradient"]
        assert times is not None
        assert has_gradient is not None
        self._layout, self._times_changed = layout, times.to(device, copy=True)
        self.has_gradient = has_gradient.to(device, copy=True)
        self._suspected = torch.zeros_like(self._times_changed, dtype=torch.bool)
        if watched is not None:
            self.is_watching, self.values = True, watched.to(device, copy=True)

    def nbytes(self) -> int:
        """Return the memory of the gathered weights and flags in bytes."""
        return self.values.nbytes + self.has_gradient.nbytes


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """Return True for each element in which two tensors differ; NaN equals NaN."""
    return (one != other) & ~(one.isnan() & other.isnan())


def _is_replaced(old: Sampled, new: Sampled) -> bool:
    """Return True if the parameter of a layer is another object than before."""
    return old.parameter is not new.parameter


def make_mask(each: Sequence[bool], device: torch.device) -> Tensor:
    """Make a mask on a device; if all its values are alike, none is copied from the host.

    Args:
        each: The values.
        device: The device of the mask.

    Returns:
        The mask, bool (values).
    """
    if each and all(one == each[0] for one in each):
        return torch.full((len(each),), each[0], dtype=torch.bool, device=device)
    return torch.tensor(each, dtype=torch.bool, device="cpu").to(device)
