"""`Peers`: the ranks that observe the same steps, as an interface with two implementations.

`Alone` is a rank without any others. `Together`, in the file `together`, is a rank of a run with
sharded parameters. A monitor makes the same calls for both: each rank measures its local shards,
and `combine` gives all ranks the sums of the whole layers. The docstrings of `Peers` also hold for
the methods of `Alone` and `Together`.
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
    """The sums of an observed step over one rank's elements, or over all after `Peers.combine`.

    Attributes:
        seconds: Time to observe the last observed step and mean time of a training step, in
            seconds; NaN where unknown.
        vectors: float64 (layers, columns) on the host: for each layer its sums, then its maxima.
        names: The layers that have elements on this rank, one for each row of `vectors`.
        present: The layers that the optimizer stepped.
        found_inf: Whether a fused optimizer under a GradScaler found gradients that are not finite.
        skipped: Why the step moved no weight; None if weights moved.
        error: The error of this rank; None if nothing failed.
        others: Further numbers of this rank that were copied to the host with `vectors`.
    """

    seconds: tuple[float, float]
    vectors: Numbers
    names: Sequence[str] = ()
    present: Sequence[str] = ()
    found_inf: bool = False
    skipped: SkipReason | None = None
    error: Exception | None = None
    others: Sequence[Numbers] = ()


class Peers(Protocol):
    """The ranks that observe the same steps as this rank, and what they exchange.

    Attributes:
        rank: The number of this rank.
        size: The number of ranks, this one included.
    """

    rank: int
    size: int

    def attach(self, check: Callable[[], Sequence[Optimizer]]) -> None:
        """Wait for the other ranks, and check that all have the same layers, settings and states.

        Args:
            check: Function that returns the optimizers to attach, or raises an error if an
                optimizer cannot be observed.

        Raises:
            Exception: `check` fails on this rank with this error.
            ValueError: Another rank cannot attach, or has other layers, settings or states.
            LostRankError: A rank has not called this method.
        """

    def before_step(self, optimizer: Optimizer) -> bool:
        """Check before an observed step that layers have changed alike on all ranks, or nowhere.

        Layers change if an optimizer gets new parameters, or a placement changes. Ranks communicate
        only if layers of this rank have changed.

        Args:
            optimizer: The optimizer that is about to step.

        Returns:
            True if there may be new layers; the same on all ranks.

        Raises:
            DisagreementError: The layers of another rank have changed in another way.
            LostRankError: Layers have changed on this rank alone.
        """

    def part(self, name: str, indices: Tensor | None) -> Part:
        """Return the elements among `indices` that this rank measures.

        Args:
            name: Name of the layer.
            indices: Elements that all ranks together measure, as indices into the flattened layer,
                int64 (elements). None for all elements.
        """

    def known(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return, by name, the parameters whose placement has not changed since `attach`."""

    def agreed(self, stepped: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the parameters that all ranks step, in the same order on every rank.

        Args:
            stepped: Function that returns the parameters that optimizers of this rank step now,
                which may differ between ranks. Only `Alone` calls the function.

        Returns:
            The parameters by name.
        """

    def amax(
        self, parameters: Mapping[str, Tensor], scaling: Scaling | None
    ) -> tuple[Sequence[Tensor], Sequence[bool]]:
        """Return the amax of whole parameters, by one MAX all-reduce; all ranks call this method.

        Args:
            parameters: Parameters by name.
            scaling: Which elements share a scale.

        Returns:
            For each parameter its amaxes, (1) or (channels), on its device: float32, or float64 for
            a float64 parameter. Also, for each parameter, whether any of its amaxes is 0.
        """

    def hold_errors(self) -> AbstractContextManager[None]:
        """Keep an error of a ``with`` block until `combine`, which raises it on all ranks.

        If a rank raised the error at once, other ranks would wait in `combine`. `Alone`, without
        other ranks, raises the error at once.
        """

    def take_error(self) -> Exception | None:
        """Return the error that `hold_errors` keeps, and forget it; None without an error."""

    def combine(self, optimizer: Optimizer, index: int, local: StepSums) -> StepSums:
        """Combine the sums of all ranks in an observed step, by one SUM and one MAX all-reduce.

        Args:
            optimizer: The optimizer that stepped.
            index: Index of the step.
            local: The sums of this rank.

        Raises:
            Exception: This rank has failed, and shares no parameters with others.
            RankError: One of several ranks has failed, or ranks observe different steps or layers.
            LostRankError: A rank does not answer.
        """

    def whole_history(
        self, here: dict[str, PackedBits], names: Sequence[str], kinds: int
    ) -> dict[str, PackedBits]:
        """Return the ever-moved flags of whole layers, gathered from the shards of all ranks.

        Args:
            here: Flags of the elements that this rank measures, by layer.
            names: Names of the layers.
            kinds: Number of flags of each element: one for any update, and one for each format.

        Returns:
            Packed bits of shape (kinds, elements) by layer, equal on all ranks.

        Raises:
            LostRankError: A rank has not called this method; every rank reports it in the next
                step.
        """

    def parts(self, names: Sequence[str]) -> dict[str, tuple[int, Tensor]]:
        """Return which of the measured elements of each layer this rank measures.

        Args:
            names: The layers.

        Returns:
            For each layer the number of elements that all ranks together measure, and the positions
            of this rank's elements among them, int64 (elements). Empty if no layer is sharded.
        """


class Alone(Peers):
    """A rank that holds whole parameters, and communicates with no other rank."""

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

    def whole_history(
        self,
        here: dict[str, PackedBits],
        names: Sequence[str],  # noqa: ARG002
        kinds: int,  # noqa: ARG002
    ) -> dict[str, PackedBits]:
        return here

    def parts(self, names: Sequence[str]) -> dict[str, tuple[int, Tensor]]:  # noqa: ARG002
        return {}
