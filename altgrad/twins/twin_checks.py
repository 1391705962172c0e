"""`TwinChecks`: the results of the self-checks of all layers, and what follows from them.

The self-check compares the *reference twin*, a sample that steps as the *run* does, with the run,
the training that is watched. Where they differ, no twin of these layers can step an optimizer.

Read `loaded_lanes` first; `twins` comes next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch.optim import Optimizer

from altgrad._messages import few
from altgrad.measurement.numbers import Numbers
from altgrad.measurement.twin_parts import TwinShare
from altgrad.twins.layer_plan import LaneKind
from altgrad.twins.optimizer_run import OptimizerRun
from altgrad.twins.self_check import Check, are_rounded_otherwise, judge

_RANKS = "ranks"
"""The key of the self-checks of all ranks together, beside the keys of this rank's lanes."""


class TwinChecks:
    """The results of the last self-checks of each layer, on this rank and on others.

    A self-check compares a sample that is stepped as the training is with the training.

    Args:
        warn: Function that is called with each notice for the user.

    Attributes:
        resynchronised: How often twins took over weights that something other than a step had
            changed, by name of the layer.
    """

    def __init__(self, warn: Callable[[str], object]) -> None:
        self.resynchronised: Counter[str] = Counter()
        self._warn = warn
        self._results: dict[str, dict[str, Check]] = {}  # by kind of lane, then by layer
        self._missing: set[tuple[str, str]] = set()  # recipe and layer, in the last observed step

    def find_worst(self) -> dict[str, Check]:
        """Return the worst result of each layer on all ranks, by name."""
        return _find_worst(self._results.values())

    def find_own(self) -> dict[str, Check]:
        """Return the worst result of each layer on this rank, by name."""
        return _find_worst([each for kind, each in self._results.items() if kind != _RANKS])

    def note(self, kind: LaneKind, checks: Mapping[str, Check]) -> None:
        """Note results of a lane, a set of layers.

        Args:
            kind: The kind of the lane.
            checks: The result of each layer, by name.
        """
        self._results.setdefault(str(kind.describe()), {}).update(checks)

    def read_counts(
        self,
        run: OptimizerRun,
        optimizer: Optimizer,
        kind: LaneKind,
        names: Sequence[str],
        counts: Numbers,
        *,
        is_measured: bool = False,
    ) -> None:
        """Note the result of a self-check: whether the reference twin equals the training.

        The *reference twin* is a sample of the layers that is stepped as the training is. If it is
        not equal, all twins step no optimizer from then on: they end, or get the training's
        updates.

        Args:
            run: The lanes of the training's optimizer, and what is known of it.
            optimizer: The training's optimizer.
            kind: The kind of the lane, a set of layers, that was checked.
            names: Names of its layers.
            counts: Its counts, float64 (layers, counts) on the host, in the order of
                `altgrad.twins.self_check.COUNTS`.
            is_measured: True after `Lane.measure`, where another window has begun.
        """
        lane = run.lanes[kind]
        times = zip(names, counts[:, 4].astype(int).tolist(), strict=True)
        self.resynchronised.update({name: count for name, count in times if count})
        lane.note_check(is_suspected=bool(counts[:, 5].any()), are_found=bool(counts[:, 4].any()))
        if lane.follows_updates:
            return
        is_first = run.is_first_check(kind, has_moved=bool(counts[:, 2].any()))
        draws = run.draws or kind.is_stored or lane.rounds_itself
        found = judge(counts, draws=draws, is_first=is_first)
        if is_first and kind.is_low and Check.DIFFERENT in found and are_rounded_otherwise(counts):
            lane.begin_recording()
            found, draws = judge(counts, draws=True, is_first=True), True
        reason = _describe_differences(names, found, counts)
        # Where the run rounds, a wrong step may be hidden by the rounding.
        is_hidden = draws and not reason and {*found} != {Check.EQUAL}
        if is_first and not lane.end_probe() and is_hidden:
            found = [Check.DIFFERENT] * len(found)
            reason = "an element steps otherwise if other elements of its tensor differ"
        if reason:
            lane.follow_updates(optimizer, reason, is_measured=is_measured)
        self.note(kind, dict(zip(names, found, strict=True)))

    def note_ranks(self, share: TwinShare) -> None:
        """Note the results of all ranks' self-checks, and warn of layers that a rank does not step.

        A self-check compares a sample that is stepped as the training is with the training.

        Args:
            share: The sums of all ranks, with the worst result of each self-check, and the layers
                that a rank does not step.
        """
        others = {name: [*Check][place] for name, place in share.checks.items()}
        self._results[_RANKS] = others
        own = self.find_own()
        if wrong := [
            name
            for name, check in others.items()
            if check is Check.DIFFERENT and own.get(name) is not check
        ]:
            self._warn(
                f"has twins that differ from the run in {few(wrong)} on another rank: the "
                "optimizer does not work element by element there"
            )
        missing = {(recipe, name) for recipe, names in share.missing.items() for name in names}
        again, self._missing = missing & self._missing, missing
        by_layers: dict[tuple[str, ...], list[str]] = {}
        for recipe in share.missing:
            if names := tuple(sorted(name for each, name in again if each == recipe)):
                by_layers.setdefault(names, []).append(recipe)
        for absent, recipes in by_layers.items():
            self._warn(
                f"has no figures of the twins of {few(recipes)} in {few(absent)}: a rank steps no "
                "more of its elements"
            )


def _find_worst(each: Iterable[Mapping[str, Check]]) -> dict[str, Check]:
    """Return the worst result of several self-checks of each layer, by name."""
    worst: dict[str, Check] = {}
    for checks in each:
        for name, check in checks.items():
            worst[name] = max(check, worst.get(name, check), key=[*Check].index)
    return worst


def _describe_differences(names: Sequence[str], found: Sequence[Check], counts: Numbers) -> str:
    """Return the reason why a self-check has failed; empty if it has not.

    Args:
        names: Names of the layers.
        found: The result of each.
        counts: Their counts, in the order of `altgrad.twins.self_check.COUNTS`.
    """
    wrong = [k for k, check in enumerate(found) if check is Check.DIFFERENT]
    if not wrong:
        return ""
    most = max(counts[k, 3] for k in wrong)
    return (
        f"the optimizer on a sample differs from the run in {few([names[k] for k in wrong])}, by "
        f"up to {most:.3g} spacings of the dtype"
    )
