"""`Peers`: the ranks that observe the same steps, as an interface with two implementations.

A rank is one process of a torch.distributed run. `Alone` is a rank without any others. `Together`,
in the file `together`, is a rank of a run with sharded parameters. A monitor makes the same calls
for both: each rank measures its local shards, and `combine` gives all ranks the sums of the whole
layers. The docstrings of `Peers` also hold for the methods of `Alone` and `Together`.
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
from altgrad.measurement.twin_parts import TwinShare
from altgrad.observation.dtensor import is_sharded
from altgrad.observation.step import SkipReason
from altgrad.quantization.formats import Scaling
from altgrad.quantization.scale_groups import compute_layer_amaxes


class StepSums(NamedTuple):
    """The sums and maxima over elements from which the metrics of an optimizer step are computed.

    They are over one rank's elements, or over those of all ranks after `Peers.combine`. A layer is
    one parameter tensor.

    Attributes:
        seconds: Time to observe the last observed step and mean time of a training step, in
            seconds; NaN where unknown.
        vectors: float64 (layers, columns) on the host: for each layer its sums, then its maxima, in
            the columns that `altgrad.measurement.columns` lists.
        names: The names of layers with elements on this rank, one for each row of `vectors`.
        present: The names of all layers that the optimizer stepped, on this or another rank.
        found_inf: Whether a fused optimizer under a GradScaler found gradients that are not finite.
        skipped: Why the step moved no weight; None if weights moved.
        error: The error of this rank; None if nothing failed.
        others: Further arrays of this rank, copied to the host with `vectors`, in which `twins` are
            read.
        twins: The sums of twins, samples of layers that are stored and stepped as recipes say.
    """

    seconds: tuple[float, float]
    vectors: Numbers
    names: Sequence[str] = ()
    present: Sequence[str] = ()
    found_inf: bool = False
    skipped: SkipReason | None = None
    error: Exception | None = None
    others: Sequence[Numbers] = ()
    twins: TwinShare = TwinShare()


class Peers(Protocol):
    """The interface (Protocol) by which a monitor exchanges sums and errors with other ranks.

    All ranks measure the same optimizer steps, each the elements that it holds.

    `Alone` implements it for a single rank, and `altgrad.distributed.together.Together` for ranks
    that share parameters.

    Attributes:
        rank: The number of this rank.
        size: The number of ranks, this one included.
    """

    rank: int
    size: int

    def attach(self, check: Callable[[], Sequence[Optimizer]]) -> None:
        """Wait for the other ranks, and check that all ranks observe the same layers alike.

        Their settings, such as formats and sampling, and their loaded states must be equal, too.

        Args:
            check: Function that returns the optimizers to attach, or raises an error if an
                optimizer cannot be observed.

        Raises:
            Exception: `check` fails on this rank with this error.
            ValueError: Another rank cannot attach, or has other layers, settings or states.
            LostRankError: A rank has not called this method.
        """

    def before_step(self, optimizer: Optimizer) -> bool:
        """Check, before an observed step, that layers are new or placed anew on all ranks or none.

        Layers change if an optimizer gets new parameters, or the placement of a DTensor changes.
        Ranks communicate only if layers of this rank have changed.

        Args:
            optimizer: The optimizer that is about to step.

        Returns:
            True if there may be new layers; the same on all ranks.

        Raises:
            DisagreementError: The layers of another rank have changed in another way.
            LostRankError: Layers have changed on this rank alone.
        """

    def part(self, name: str, indices: Tensor | None) -> Part:
        """Return the elements that this rank measures, among those that all ranks together measure.

        Args:
            name: Name of the layer, a parameter tensor.
            indices: Elements that all ranks together measure, as indices into the flattened layer,
                int64 (elements). None for all elements.

        Returns:
            For each element its index in the flattened layer, its index in the flattened local
            shard, and its position in `indices`.
        """

    def tears(self, name: str, block: int) -> bool:
        """Return whether several ranks hold parts of one block of neighbours of a layer.

        Args:
            name: Name of the layer.
            block: Number of elements in a block along the last dimension.
        """

    def known(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of the given parameters whose placement has not changed since `attach`."""

    def agreed(self, stepped: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the measured parameters that all ranks step, in the same order on every rank.

        Args:
            stepped: Function that returns the parameters that optimizers of this rank step now,
                which may differ between ranks. Only `Alone` calls the function.

        Returns:
            The parameters by name. `Together` returns those of all optimizers that ranks have
            compared so far.
        """

    def amax(
        self, parameters: Mapping[str, Tensor], scaling: Scaling | None
    ) -> tuple[Sequence[Tensor], Sequence[bool]]:
        """Return the amax (largest finite magnitude) of whole parameters, over their shards.

        Ranks communicate by one MAX all-reduce, and all must call this method.

        Args:
            parameters: Parameters by name.
            scaling: Which elements share a scale. ``"channel"`` gives an amax for each index of
                dimension 0, any other value one amax for each parameter.

        Returns:
            For each parameter its amaxes, (1) or (channels), on its device: float32, or float64 for
            a float64 parameter. Also, for each parameter, whether any of its amaxes is 0.
        """

    def hold_errors(self) -> AbstractContextManager[None]:
        """Return a context manager that keeps an error of its block until the ranks communicate.

        `combine` then raises the error on all ranks. If this rank raised the error at once, the
        others would wait in `combine`. `Alone`, without other ranks, raises the error at once.
        """

    def take_error(self) -> Exception | None:
        """Return the error raised in a block of `hold_errors`, and forget it; None without one."""

    def combine(self, optimizer: Optimizer, index: int, local: StepSums) -> StepSums:
        """Return the sums and maxima of a measured step over the elements of all ranks.

        Ranks communicate by one SUM and one MAX all-reduce.

        Args:
            optimizer: The optimizer that stepped.
            index: Index of the step.
            local: The sums and maxima of this rank, or its error.

        Returns:
            The sums and maxima over all ranks, for each layer that any rank stepped.

        Raises:
            Exception: This rank has failed, and shares no parameters with others.
            RankError: One of several ranks has failed, or ranks observe different steps or layers.
            LostRankError: A rank does not answer.
        """

    def whole_history(
        self, here: dict[str, PackedBits], names: Sequence[str], kinds: int
    ) -> dict[str, PackedBits]:
        """Return the ever-moved flags of whole layers, gathered from the shards of all ranks.

        The flags say for each element whether an update has moved it so far, and for each format
        whether the format would have kept a part of such an update.

        Args:
            here: Flags of the elements that this rank measures, by layer.
            names: Names of the layers.
            kinds: Number of flags of each element: one for any update, and one for each format.

        Returns:
            By layer the shape (kinds, elements), and the flags of all measured elements packed into
            uint8 (bytes); equal on all ranks.

        Raises:
            LostRankError: A rank has not called this method; every rank reports it in the next
                step.
        """

    def exchange(self, own: bytes) -> list[bytes]:
        """Return the bytes that all ranks pass, by rank, once every rank has called this method.

        Args:
            own: The bytes of this rank.

        Raises:
            LostRankError: A rank has not called this method.
        """

    def parts(self, names: Sequence[str]) -> dict[str, tuple[int, Tensor]]:
        """Return by layer the elements that this rank measures, among those that all ranks measure.

        Args:
            names: The names of the layers.

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

    def tears(self, name: str, block: int) -> bool:  # noqa: ARG002
        return False

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

    def exchange(self, own: bytes) -> list[bytes]:
        return [own]

    def parts(self, names: Sequence[str]) -> dict[str, tuple[int, Tensor]]:  # noqa: ARG002
        return {}
