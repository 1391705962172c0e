"""`MovedHistory`: which elements have moved so far, on all ranks and in the runs before this one.

The flags of a checkpoint are those of whole layers. They wait here until the monitor is attached,
when ranks know which part of each layer they hold.

Read `altgrad.measurement.ever_moved` and `engine` first, which have the flags of this rank.
`checkpoint` comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from altgrad._messages import few
from altgrad.distributed.peers import Peers
from altgrad.measurement.ever_moved import EverMovedStore, PackedBits, check_packed_bits
from altgrad.monitor.engine import Engine
from altgrad.monitor.measured_layers import MeasuredLayers


class MovedHistory:
    """The history of moved elements: flags, for whole layers, of which have moved in any step.

    Args:
        formats: Names of the formats for which there are flags.
        store: The flags of this rank's layers in no arena.
        engine: The engine, which has the flags of the other layers.
        layers: The layers that are measured.
        warn: Function that is called with each notice for the user.
    """

    def __init__(
        self,
        formats: Sequence[str],
        store: EverMovedStore,
        engine: Engine,
        layers: MeasuredLayers,
        warn: Callable[[str], object],
    ) -> None:
        self._formats = tuple(formats)
        self._store = store
        self._engine = engine
        self._layers = layers
        self._warn = warn
        self._loaded: Mapping[str, PackedBits] | None = None  # until ranks know their local shards

    def describe(self) -> dict[str, Any]:
        """Return which flags there are: of which formats, and of which elements.

        Returns:
            A dict with the keys ``formats`` and ``samples``.
        """
        return {"formats": self._formats, "samples": self._layers.settings.describe_samples()}

    def gather_flags(self, peers: Peers) -> dict[str, PackedBits]:
        """Return the packed flags of whole layers, by name.

        Args:
            peers: The ranks that share the parameters, all of which call this method.

        Returns:
            By name of the layer the shape of its flags and their bits; equal on all ranks.

        Raises:
            LostRankError: A rank has not called this method.
        """
        if self._loaded is not None:
            return dict(self._loaded)
        here = self._store.state_dict(self._engine.flags())
        return peers.whole_history(here, self._layers.names, 1 + len(self._formats))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the flags of layers with the same formats and samples as in an earlier run.

        Flags of other layers begin anew, with a notice.

        Args:
            state: The flags of the earlier run under ``ever_moved``, and what `describe` returned
                in it. Version 0.1.0 wrote no ``samples``.

        Raises:
            ValueError: Flags are damaged.
        """
        check_packed_bits(state["ever_moved"])
        self._engine.free_arenas()
        formats, self._loaded = tuple(state["formats"]), dict(state["ever_moved"])
        if formats != self._formats:
            self._loaded = {}
            self._warn(
                f"restores a run with formats {formats}, and judges {self._formats}: "
                "never_moved_frac begins anew"
            )
        others = self._layers.settings.find_other_samples(self._loaded, state.get("samples"))
        if others := [name for name in others if not self._layers.is_whole(name)]:
            self._loaded = {n: each for n, each in self._loaded.items() if n not in others}
            self._warn(
                f"has never_moved_frac of {few(others)} begin anew: the run before drew other "
                "elements, by another seed, block size or version"
            )

    def begin(self, peers: Peers) -> None:
        """Take over the restored flags of the elements that this rank holds, if there are any."""
        if self._loaded is not None:
            self._store.load_state_dict(self._loaded, peers.parts(self._layers.names))
            self._loaded = None
