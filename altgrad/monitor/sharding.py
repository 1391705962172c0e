"""`Sharding`: the ranks among which the parameters of a run are sharded, if there are any.

Whether parameters are sharded is known when a monitor is attached, and not before.

Read `measured_layers` first, and `altgrad.distributed.peers`, which says what ranks do together.
`recorder` comes next and has them add up their sums.
"""

from __future__ import annotations

from torch.optim import Optimizer

from altgrad._messages import few
from altgrad.distributed.peers import Alone, Peers
from altgrad.distributed.together import Together, Watched
from altgrad.monitor.measured_layers import MeasuredLayers
from altgrad.observation.dtensor import is_sharded


class Sharding:
    """The sharding of a run's parameters: a rank that holds them whole, or several with shards.

    Attributes:
        peers: The ranks that share the parameters; `Alone` until `find` has found others.
    """

    def __init__(self) -> None:
        self.peers: Peers = Alone()

    @property
    def is_shared(self) -> bool:
        """True if several ranks observe each step together."""
        return self.peers.size > 1

    def find(self, watched: Watched) -> Peers:
        """Return the ranks that share the parameters; look for them if none were found so far.

        Args:
            watched: The layers and settings of this rank.

        Raises:
            RuntimeError: Parameters are sharded, and there is no process group.
        """
        is_alone = isinstance(self.peers, Alone)
        if is_alone and any(map(is_sharded, watched.parameters.values())):
            self.peers = Together(watched)
        return self.peers

    def check(self, optimizer: Optimizer, layers: MeasuredLayers) -> None:
        """Raise an error if the layers of an optimizer were sharded after `find`.

        accelerate, for example, gives an optimizer sharded parameters in ``prepare``.

        Args:
            optimizer: The optimizer that is about to step.
            layers: The layers that are measured.

        Raises:
            RuntimeError: The layers were sharded.
        """
        groups = optimizer.param_groups if isinstance(self.peers, Alone) else ()
        if not any(is_sharded(parameter) for group in groups for parameter in group["params"]):
            return
        stepped = layers.find_stepped([optimizer])  # of which others are not observed
        if sharded := [name for name, parameter in stepped.items() if is_sharded(parameter)]:
            raise RuntimeError(
                f"{few(sharded)}: sharded after attach(); shard the module first, as by "
                "fully_shard or accelerate's prepare(), then call attach()"
            )
