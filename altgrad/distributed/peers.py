"""`Peers`: the ranks that observe the same steps; `Alone` is a rank without any others.

A monitor has one road for a step, whoever its peers are: each rank brings what it measured, and
`combine` gives all of them what the step came to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.optim import Optimizer

from altgrad.distributed.shards import Part
from altgrad.measurement.columns import Numbers
from altgrad.measurement.ever_moved import PackedBits
from altgrad.observation.dtensor import is_sharded
from altgrad.observation.step import SkipReason
from altgrad.quantization.formats import Scaling
from altgrad.quantization.scale_groups import compute_layer_amaxes


class StepSums(NamedTuple):
    """The sums of an observed step on one rank; after `Peers.combine` those of all ranks.

    Attributes:
        seconds: What observing took since the observed step before, and what a step of training
            takes, in seconds; NaN where they are not known.
        vectors: float64 (layers, columns) on the host: sums, then maxima, of each layer.
        names: The layers that have elements here, one for each row of `vectors`.
        present: The layers that the optimizer stepped.
        found_inf: Whether a fused optimizer under a GradScaler found gradients that are not finite.
        skipped: Why the step moved no weight; None if it did.
        error: What failed on this rank.
    """

    seconds: tuple[float, float]
    vectors: Numbers
    names: Sequence[str] = ()
    present: Sequence[str] = ()
    found_inf: bool = False
    skipped: SkipReason | None = None
    error: Exception | None = None


class Peers(Protocol):
    """The ranks that observe the same steps as this one, and what they do together.

    Attributes:
        rank: The number of this one.
        size: How many there are, this one included.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def attach(self, check: Callable[[], Sequence[Optimizer]]) -> None:
        """Meet, and make sure that all ranks are about to observe the same.

        Args:
            check: Returns the optimizers that are to be attached, or raises why they cannot be.
        """

    def before_step(self, optimizer: Optimizer) -> bool:
        """Compare with the other ranks what has changed, before an observed step.

        Returns:
            Whether all ranks are to look for layers that are new.
        """

    def part(self, name: str, indices: Tensor | None) -> Part:
        """Return the elements among `indices` that this rank measures.

        Args:
            name: Name of the layer.
            indices: int64, flat indices of the elements that all ranks measure; None for all.
        """

    def known(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters whose placement on the ranks is known, by name."""

    def agreed(self, stepped: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the parameters that all ranks step, by name, in the same order on every rank.

        Args:
            stepped: Returns those that the optimizers of this rank step now.

        Returns:
            The parameters by name.
        """

    def amax(
        self, parameters: Mapping[str, Tensor], scaling: Scaling | None
    ) -> tuple[Sequence[Tensor], Sequence[bool]]:
        """Return the amax of whole parameters; all ranks call it at once.

        Args:
            parameters: By name.
            scaling: Which elements share a scale.

        Returns:
            float32 (float64 for float64) (1) or (channels) for each parameter, on its device; and
            whether any of these is 0.
        """

    def hold_errors(self) -> AbstractContextManager[None]:
        """Keep an error within for the next `combine`, where other ranks wait until then."""

    def take_error(self) -> Exception | None:
        """Return the error that is kept for the next `combine`, and forget it."""

    def combine(self, optimizer: Optimizer, index: int, local: StepSums) -> StepSums:
        """Return the sums of all ranks; their names are those of the layers that were stepped.

        Args:
            optimizer: The optimizer that stepped.
            index: Index of the step.
            local: The sums of this rank.

        Raises:
            Exception: What failed, here or on another rank.
        """

    def total(self, take: Callable[[], Tensor], count: int) -> Tensor:
        """Return the sums over all ranks of some numbers.

        Args:
            take: Returns the numbers of this rank, float64 (count) on the host.
            count: How many there are.

        Returns:
            float64 (count) on the host.
        """

    def whole_history(
        self, here: dict[str, PackedBits], names: Sequence[str], kinds: int
    ) -> dict[str, PackedBits]:
        """Return what the elements of each layer have done so far, on whichever rank.

        Args:
            here: What the elements on this rank have done, by layer.
            names: The layers.
            kinds: Number of bits of each element.

        Returns:
            Packed bits of shape (kinds, elements) by layer.

        Raises:
            LostRankError: Not all ranks have called it.
        """

    def parts(self, names: Sequence[str]) -> dict[str, tuple[int, Tensor]]:
        """Return which of the measured elements of each layer lie on this rank.

        Args:
            names: The layers.

        Returns:
            By layer, how many elements all ranks measure, and int64 positions among these; layers
            that this rank holds as a whole are left out.
        """


class Alone:
    """A rank that holds all of the parameters, and has nobody to agree with."""

    rank = 0
    size = 1

    def attach(self, check: Callable[[], Sequence[Optimizer]]) -> None:
        """Raise what `check` raises."""
        check()

    def before_step(self, optimizer: Optimizer) -> bool:  # noqa: ARG002
        """Return False: a new layer is looked at when it has its first gradient."""
        return False

    def part(self, name: str, indices: Tensor | None) -> Part:  # noqa: ARG002
        """Return all of the elements.

        Args:
            name: Name of the layer.
            indices: int64, flat indices; None for all.
        """
        return Part(indices, indices, None)

    def known(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters that are not sharded; others were sharded after `attach`."""
        return {name: each for name, each in parameters.items() if not is_sharded(each)}

    def agreed(self, stepped: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return what `stepped` returns."""
        return stepped()

    def amax(
        self, parameters: Mapping[str, Tensor], scaling: Scaling | None
    ) -> tuple[Sequence[Tensor], Sequence[bool]]:
        """Return the amax of each parameter, on its device.

        Args:
            parameters: By name.
            scaling: Which elements share a scale.

        Returns:
            float32 (float64 for float64) (1) or (channels) for each; and whether any is 0.
        """
        return compute_layer_amaxes([*parameters.values()], scaling)

    def hold_errors(self) -> AbstractContextManager[None]:
        """Raise errors at once: nobody waits."""
        return nullcontext()

    def take_error(self) -> Exception | None:
        """Return None: no error is kept."""
        return None

    def combine(self, optimizer: Optimizer, index: int, local: StepSums) -> StepSums:  # noqa: ARG002
        """Return the sums of the layers that were stepped.

        Args:
            optimizer: The optimizer that stepped.
            index: Index of the step.
            local: The sums of this rank.

        Raises:
            Exception: What failed here.
        """
        if local.error is not None:
            raise local.error
        stepped = {*local.present}
        if stepped.issuperset(local.names):
            return local
        rows = [row for row, name in enumerate(local.names) if name in stepped]
        return local._replace(names=[local.names[k] for k in rows], vectors=local.vectors[rows])

    def total(self, take: Callable[[], Tensor], count: int) -> Tensor:  # noqa: ARG002
        """Return the numbers that `take` gives.

        Args:
            take: Returns float64 (count) on the host.
            count: How many there are.

        Returns:
            The same.
        """
        return take()

    def whole_history(
        self,
        here: dict[str, PackedBits],
        names: Sequence[str],  # noqa: ARG002
        kinds: int,  # noqa: ARG002
    ) -> dict[str, PackedBits]:
        """Return `here`.

        Args:
            here: What elements have done, by layer.
            names: The layers.
            kinds: Number of bits of each element.

        Returns:
            The same.
        """
        return here

    def parts(self, names: Sequence[str]) -> dict[str, tuple[int, Tensor]]:  # noqa: ARG002
        """Return an empty dict: no layer is sharded."""
        return {}
