"""`Agreement`: that all processes which share a model are about to observe the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from altgrad._messages import few
from altgrad.distributed.layers import ShardedLayers
from altgrad.distributed.ranks import Call, Description, Expected
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.observation import StepObserver
from altgrad.observation.observer import FaultElsewhereError
from altgrad.quantization.format_set import FormatSet


class Agreement:
    """What each process would observe, compared with the others: at first, and when it changes.

    Nothing is measured together that was not agreed upon: messages could not be of one length.

    Args:
        sharded: Where the layers lie.
        observer: What sees the steps.
        settings: How each layer is observed.
        formats: The formats with their scaling.
        decides: What else has to be alike, by name: arguments, and what a state brings.
        tell: Called with what a user is to know.

    Attributes:
        ranks: The processes.
        rows: How many layers an optimizer has at most.
    """

    def __init__(
        self,
        sharded: ShardedLayers,
        observer: StepObserver,
        settings: LayerSettings,
        formats: FormatSet,
        decides: Callable[[], Mapping[str, Mapping[str, Any]]],
        tell: Callable[[str], object],
    ) -> None:
        self.ranks = sharded.ranks
        self.rows = 0
        self._sharded = sharded
        self._observer = observer
        self._settings = settings
        self._formats = formats
        self._decides = decides
        self._tell = tell
        self._agreed: set[tuple[str, ...]] = set()  # the layers of each optimizer
        self._stepping: WeakKeyDictionary[Optimizer, tuple[str, ...]] = WeakKeyDictionary()
        self._are_copies_known = False

    def attach(self, optimizers: Sequence[Any], scaler: GradScaler | None) -> None:
        """Meet the other processes, and have all of them about to attach the same.

        Raises:
            Exception: What attaching here would raise.
            ValueError: Another process has a problem, or something else to observe.
            LostRankError: One does not come.
        """
        self.ranks.meet()
        self._agree("attach()", lambda: self._observer.check(*optimizers, scaler=scaler))

    def before_step(self, optimizer: Optimizer) -> None:
        """Before an observed one; compares what has changed.

        Raises:
            ValueError, FaultElsewhereError: Of the first process, and of others: it has not
                changed alike.
            LostRankError: It has changed here alone.
        """
        self._leave_out_different_copies()
        names = self._layers_of(optimizer)
        parameters = self._observer.parameters
        placed = self._sharded.are_placed_as_before({name: parameters[name] for name in names})
        if names not in self._agreed or not placed:
            try:
                self._agree("optimizer.step()", lambda: [optimizer])
            except ValueError as fault:
                if self.ranks.rank > 0:  # the first one says it
                    raise FaultElsewhereError(str(fault)) from fault
                raise
            names = self._layers_of(optimizer)
        self._stepping[optimizer] = names

    def layers_of_step(self, optimizer: Optimizer) -> dict[str, Expected]:
        """What all processes together may contribute to the step that is under way."""
        return self._sharded.expected(self._stepping[optimizer])

    @property
    def stepped(self) -> dict[str, Tensor]:
        """All that any of the optimizers steps, in the order of the model."""
        names = {name for names in self._agreed for name in names}
        return {n: p for n, p in self._observer.parameters.items() if n in names}

    def _agree(self, during: Call, optimizers: Callable[[], Sequence[Optimizer]]) -> None:
        description: Description = {}
        layers: list[tuple[str, ...]] = []
        problem = None
        try:
            attaching = optimizers()
            self._sharded.look_at(self._observer.parameters)
            self._sharded.check_formats(self._formats)
            self._leave_out_torn_layers()
            layers = [self._layers_of(each) for each in attaching]
            description = self._description(layers)
        except Exception as error:  # noqa: BLE001 - the others are told, and then it is raised
            problem = error
        self.ranks.check_alike(description, problem, during)
        self._agreed |= {*layers}
        self.rows = max(map(len, self._agreed), default=0)

    def _layers_of(self, optimizer: Optimizer) -> tuple[str, ...]:
        names = self._observer.names_of(optimizer)
        return tuple(self._settings.measured_names(names, self._observer.parameters))

    def _description(self, layers: Sequence[Sequence[str]]) -> Description:
        decides = {
            kind: [f"{name}={value!r}" for name, value in values.items()]
            for kind, values in self._decides().items()
        }
        of_model = [
            f"{name} {tuple(parameter.shape)} {parameter.dtype} "
            f"{self._sharded.placements(name)} {self._settings.of(name)}"
            for name, parameter in self._observer.parameters.items()
        ]
        return decides | {
            "layers": of_model,
            "optimizers": [f"of {', '.join(names)}" for names in layers],
        }

    def _leave_out_torn_layers(self) -> None:
        sizes = self._formats.block_sizes
        names = [name for name in self._observer.names if self._settings.of(name).enabled]
        if torn := self._sharded.torn(names, sizes):
            self._settings.leave_out(torn)
            self._tell(
                f"leaves out {few(torn)}, of which blocks of {sizes} elements that share a scale "
                "lie in several processes"
            )

    def _leave_out_different_copies(self) -> None:
        """Before the first observed step, when weights are sure to be those that are trained."""
        if self._are_copies_known:
            return
        self._are_copies_known = True
        if different := self._sharded.different_copies(self.stepped):
            self._settings.leave_out(different)
            self._tell(
                f"leaves out {few(different)}: not all processes have the same values of what "
                "should be copies, so that they are different experts or models, or were not "
                "initialised alike"
            )
