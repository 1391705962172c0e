"""`RunWeights`: the sampled weights of the run, and what changes them besides its optimizer.

An average that is swapped in, a checkpoint that is loaded, or a pruning moves weights between two
steps. Twins take such weights over, or they would go another way than the run. torch counts most
writes to a tensor, but none through `.data`: these are found by comparing the reference twin with
the run. Read `layout` and `self_check` first; `lane` comes next.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from altgrad.recipes.layer_plan import LaneKind
from altgrad.recipes.layout import Layout
from altgrad.recipes.self_check import compare
from altgrad.recipes.twin import Sampled
from altgrad.recipes.twin_tensors import TwinTensors


class RunWeights:
    """The weights of the run at the elements that twins step.

    Args:
        kind: What the layers have in common.

    Attributes:
        values: The weights when they were last gathered, in the dtype of the run, (elements); 0 at
            padding.
        rows: Positions of the elements of each layer, int64 (layers, width).
        mask: bool (layers, width), False where a row is longer than its layer.
    """

    def __init__(self, kind: LaneKind) -> None:
        self._kind = kind
        self._layers: Mapping[str, Sampled] = {}
        self._places: list[Tensor] = []  # parts of `values`, one for each layer
        self._versions: dict[str, tuple[int, int]] = {}
        self.values = torch.zeros(0, dtype=kind.dtype, device=kind.device)
        self.rows = self._layer_rows = torch.zeros(0, dtype=torch.int64, device=kind.device)
        self.mask = self._unexplained = torch.zeros(0, dtype=torch.bool, device=kind.device)
        self._times_changed = torch.zeros(0, dtype=torch.float64, device=kind.device)

    def rearrange(self, layers: Mapping[str, Sampled], layout: Layout) -> None:
        """Gather the weights of another layout.

        Args:
            layers: The layers by name, in the order of the layout.
            layout: The places of the layers.
        """
        device, names = self._kind.device, [*layers]
        self._layers = layers
        self.values = torch.zeros(layout.length, dtype=self._kind.dtype, device=device)
        self._places = [self.values[place] for place in layout.places.values()]
        rows, mask = layout.find_rows(names, self._kind.block)
        self.rows, self.mask = rows.to(device), mask.to(device)
        self._layer_rows = torch.zeros(layout.length, dtype=torch.int64, device=device)
        for row, place in enumerate(layout.places.values()):
            self._layer_rows[place] = row
        self._times_changed = torch.zeros(len(names), dtype=torch.float64, device=device)
        self._unexplained = torch.zeros(len(names), dtype=torch.bool, device=device)
        self.gather()
        self.remember_writes()

    def gather(self) -> Tensor:
        """Gather the weights as they are now, and return `values`."""
        for layer, place in zip(self._layers.values(), self._places, strict=True):
            torch.take(layer.parameter, layer.indices, out=place)
        return self.values

    def check(self, reference: TwinTensors) -> Tensor:
        """Compare a reference twin with the run as it is now.

        Args:
            reference: The weights of the twin.

        Returns:
            float64 (layers, counts): the `COUNTS` of each layer, on the device. Weights that were
            taken over are counted since the last call.
        """
        times, self._times_changed = self._times_changed, torch.zeros_like(self._times_changed)
        further = torch.stack([times, self._unexplained.double()], dim=1)
        return torch.cat([self._compare(reference), further], dim=1)

    def _compare(self, reference: TwinTensors) -> Tensor:
        each = (self.gather(), reference.weights, reference.start)
        run, twin, start = (numbers[self.rows] for numbers in each)
        return compare(run, twin, start, self.mask)

    # --- weights that something other than a step has changed

    def remember_writes(self) -> None:
        """Take the writes so far as those of the optimizer, at the end of its step."""
        self._versions = self._read_versions()

    def _read_versions(self) -> dict[str, tuple[int, int]]:
        # Autograd counts in-place writes in `_version`, which has no public name:
        # https://docs.pytorch.org/docs/stable/notes/autograd.html#in-place-correctness-checks
        return {
            name: (each.parameter._version, each.parameter.data_ptr())  # noqa: SLF001
            for name, each in self._layers.items()
        }

    def find_written(self) -> list[str]:
        """Return the layers that were written to since `remember_writes`, without a look at them.

        Writes through `.data` are not among them.
        """
        now = self._read_versions()
        return [name for name, version in now.items() if version != self._versions.get(name)]

    def find_changed(
        self, reference: TwinTensors, written: list[str], *, is_checkable: bool
    ) -> Tensor:
        """Find the weights that something other than a step has changed, before a step.

        In layers that were not written to, as far as torch counts it, a weight counts as changed if
        most weights of its layer differ from the reference. If the reference twin is wrong instead,
        it is still wrong after the next step.

        Args:
            reference: The weights of the reference twin.
            written: Names of the layers that were written to.
            is_checkable: False if the reference twin cannot equal the run.

        Returns:
            bool (elements).
        """
        counts = self._compare(reference)
        layers = (counts[:, 1] > 0.5 * counts[:, 2]) & (counts[:, 0] > 0)
        if not is_checkable:
            layers = torch.zeros_like(layers)
        self._unexplained = layers
        if written:
            flags = [name in written for name in self._layers]
            is_written = torch.tensor(flags, device=self._kind.device)
            self._unexplained = layers & ~is_written
            layers = layers | (is_written & (counts[:, 0] > 0))
        self._times_changed += layers
        changed = layers[self._layer_rows] & (self.values != reference.weights)
        return changed & ~(self.values.isnan() & reference.weights.isnan())

    def nbytes(self) -> int:
        """Return the memory of the gathered weights in bytes."""
        return self.values.nbytes
