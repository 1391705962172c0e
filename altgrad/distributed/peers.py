"""`Peers`: the ranks that observe the same steps; `Alone` is a rank without any others.

A monitor has one road for a step: each rank measures its local shards, and `combine` gives all
ranks the sums of the whole layers. A method of `Alone` or `Together` without a docstring does what
`Peers` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.optim import Optimizer

from altgrad.distributed.shards import Part
from altgrad.measurement.ever_moved import PackedBits
from altgrad.measurement.numbers import Numbers
from altgrad.observation.dtensor import is_sharded
from altgrad.observation.step import SkipReason
from altgrad.quantization.formats import Scaling
from altgrad.quantization.scale_groups import compute_layer_amaxes


class StepSums(NamedTuple):
    """The sums of an observed step on one rank; after `Peers.combine` those of all ranks.

    Attributes:
        seconds: Time to observe the last observed step and mean time of a training step, in
            seconds; NaN where unknown.
        vectors: float64 (layers, columns) on the host: sums, then maxima, of each layer.
        names: The layers that have elements on this rank, one for each row of `vectors`.
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
    """The ranks that observe the same steps as this rank, and what they do together.

    Attributes:
        rank: The number of this rank.
        size: The number of ranks, this one included.
    """

    rank: int
    size: int

    def attach(self, check: Callable[[], Sequence[Optimizer]]) -> None:
        """Meet the other ranks, and make sure that all are about to observe the same.

        Args:
            check: Returns the optimizers that are to be attached, or raises why they cannot be.

        Raises:
            Exception: What `check` raises on this rank.
            ValueError: Another rank cannot attach, or is about to observe something else.
            LostRankError: A rank has not called this method.
        """

    def before_step(self, optimizer: Optimizer) -> bool:
        """Compare with the other ranks what has changed, before an observed step.

        Returns:
            Whether all ranks are to look for layers that are new.

        Raises:
            DisagreementError: It has not changed alike.
            LostRankError: It has changed on this rank alone.
        """

    def part(self, name: str, indices: Tensor | None) -> Part:
        """Return the elements among `indices` that this rank measures.

        Args:
            name: Name of the layer.
            indices: int64, flat indices of the elements that all ranks measure; None for all.
        """

    def known(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters by name that are placed on ranks as they were at `attach`."""

    def agreed(self, stepped: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the parameters that all ranks step, in the same order on every rank.

        Args:
            stepped: Returns those that the optimizers of this rank step now. Not called if ranks
                share the parameters, since they may differ in it.

        Returns:
            The parameters by name.
        """

    def amax(
        self, parameters: Mapping[str, Tensor], scaling: Scaling | None
    ) -> tuple[Sequence[Tensor], Sequence[bool]]:
        """Return the amax of whole parameters; all ranks call it at once, for one MAX.

        Args:
            parameters: Parameters by name.
            scaling: Which elements share a scale.

        Returns:
            float32 (float64 for float64) (1) or (channels) for each parameter, on its device; and
            whether any of these is 0.
        """

    def hold_errors(self) -> AbstractContextManager[None]:
        """Keep an error within a ``with`` block for the next `combine`, where other ranks wait.

        A rank alone raises it at once.
        """

    def take_error(self) -> Exception | None:
        """Return the error that is kept for the next `combine`, and forget it."""

    def combine(self, optimizer: Optimizer, index: int, local: StepSums) -> StepSums:
        """Return the sums of all ranks, of the layers that were stepped; one SUM and one MAX.

        Args:
            optimizer: The optimizer that stepped.
            index: Index of the step.
            local: The sums of this rank.

        Raises:
            Exception: What failed on a rank alone.
            RankError: One of several ranks has failed, or they do not observe the same.
            LostRankError: A rank does not answer.
        """

    def total(self, find: Callable[[], Tensor], count: int) -> Tensor:
        """Return the sum of each number over all ranks, in a call beside steps.

        Args:
            find: Returns the numbers of this rank, float64 (count) on the host. If it raises while
                other ranks wait, they do not count, and the next step reports the error.
            count: How many there are.

        Returns:
            float64 (count) on the host.

        Raises:
            LostRankError: A rank has not called this method; every rank reports it in the next
                step.
        """

    def whole_history(
        self, here: dict[str, PackedBits], names: Sequence[str], kinds: int
    ) -> dict[str, PackedBits]:
        """Return what the elements of each layer have done so far, on whichever rank.

        Args:
            here: What the elements of local shards have done, by layer.
            names: The layers.
            kinds: Number of bits of each element.

        Returns:
            Packed bits of shape (kinds, elements) by layer, equal on all ranks.

        Raises:
            LostRankError: A rank has not called this method; every rank reports it in the next
                step.
        """

    def parts(self, names: Sequence[str]) -> dict[str, tuple[int, Tensor]]:
        """Return which of the measured elements of each layer are in the local shard.

        Args:
            names: The layers.

        Returns:
            By layer, how many elements all ranks measure, and int64 positions among these. Empty
            if no layer is sharded.
        """


class Alone(Peers):
    """A rank that holds all of the parameters, and has nobody to agree with."""

    rank = 0
    size = 1

    def attach(self, check: Callable[[], Sequence[Optimizer]]) -> None:
        check()

    def before_step(self, optimizer: Optimizer) -> bool:  # noqa: ARG002
        return False  # a new layer is looked at when it has its first gradient

    def part(self, name: str, indices: Tensor | None) -> Part:  # noqa: ARG002
        return Part(indices, indices, None)

    def known(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Those that are sharded were sharded after `attach`.
        return {name: each for name, each in parameters.items() if not is_sharded(each)}

    def agreed(self, stepped: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return stepped()

    def amax(
        self, parameters: Mapping[str, Tensor], scaling: Scaling | None
    ) -> tuple[Sequence[Tensor], Sequence[bool]]:
        return compute_layer_amaxes([*parameters.values()], scaling)

    def hold_errors(self) -> AbstractContextManager[None]:
        return nullcontext()

    def take_error(self) -> Exception | None:
        return None

    def combine(self, optimizer: Optimizer, index: int, local: StepSums) -> StepSums:  # noqa: ARG002
        if local.error is not None:
            raise local.error
        stepped = {*local.present}
        if stepped.issuperset(local.names):
            return local
        rows = [row for row, name in enumerate(local.names) if name in stepped]
        return local._replace(names=[local.names[k] for k in rows], vectors=local.vectors[rows])

    def total(self, find: Callable[[], Tensor], count: int) -> Tensor:  # noqa: ARG002
        return find()

    def whole_history(
        self,
        here: dict[str, PackedBits],
        names: Sequence[str],  # noqa: ARG002
        kinds: int,  # noqa: ARG002
    ) -> dict[str, PackedBits]:
        return here

    def parts(self, names: Sequence[str]) -> dict[str, tuple[int, Tensor]]:  # noqa: ARG002
        return {}
