"""`LaneAverages`: the averages that the twins of a lane keep of their weights.

A *twin* is a sample of the layers that is stored and stepped as a recipe says; a *lane* has the
twins of similar layers. The *run*, the training that is watched, may keep several averages of its
weights. Each twin then keeps as many.

Read `statistic_follower` first; `fused_sgd` comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from altgrad.measurement.numbers import Numbers
from altgrad.observation.observer import describe_error
from altgrad.twins.average_followers import Follower, FunctionFollower, ShareFollower
from altgrad.twins.average_sample import AverageSample
from altgrad.twins.batch_norm import BatchStatistic
from altgrad.twins.layer_plan import LaneKind
from altgrad.twins.layout import Layout
from altgrad.twins.run_average import RunAverage
from altgrad.twins.sample import Sampled
from altgrad.twins.self_check import Check, judge
from altgrad.twins.statistic_follower import StatisticFollower
from altgrad.twins.twin import Twin

_MOST_WRONG = 2
"""Number of checks in a row that find an average wrong, after which twins keep it no longer.

Checks of averages that were only taken over since the last one do not count.

One wrong check may come from an average that was loaded, which torch counts as an update.
"""
_COUNTS = 4  # of `altgrad.twins.self_check.compare`


class LaneAverages:
    """The averages that twins keep of their weights, in one lane.

    A *twin* is a sample of the layers that is stored and stepped as a recipe says; a *lane* is a
    set of layers whose twins are stepped together. The *reference twin* is stepped as the training
    is, and the *baseline* in float32.

    Args:
        kind: The properties that the layers share.
        averages: The averages of the training; more may be added later.
        warn: Function that is called with each notice for the user.
    """

    def __init__(
        self,
        kind: LaneKind,
        averages: Sequence[RunAverage | BatchStatistic],
        warn: Callable[[str], None],
    ) -> None:
        self._kind = kind
        self._averages = averages
        self._warn = warn
        self._samples: dict[str, AverageSample] = {}
        self._followers: dict[str, Follower] = {}
        self._wrong: dict[str, int] = {}  # by name: checks in a row that found it wrong
        self._places: tuple[Mapping[str, Sampled], Layout] = {}, Layout()

    def rearrange(self, layers: Mapping[str, Sampled], layout: Layout) -> None:
        """Read the averages at other places of the flat tensors from now on, as layers come or go.

        The sampled elements of all layers lie one after another in a flat tensor. Each *twin*, a
        copy of them that is stored and stepped as a recipe says, has such tensors.

        Args:
            layers: The layers by name, with their sampled elements.
            layout: The new place of each layer in the flat tensors.
        """
        self._places = layers, layout
        for name, follower in self._followers.items():
            self._samples[name].rearrange(layers, layout)
            follower.rearrange()

    def follow(self, reference: Twin, baseline: Twin, twins: Sequence[Twin]) -> None:
        """Update the averages that twins keep of their weights, where the training has done so.

        A *twin* is a sample of the layers that is stored and stepped as a recipe says. It must have
        the weights with which the training updated its average: call this before each step at the
        latest.

        Args:
            reference: The twin that is stepped as the training is.
            baseline: The twin in float32, or the reference twin in its place.
            twins: All twins of these layers, with the two above.

        Raises:
            Warning: The user made warnings errors.
        """
        if not self._places[0]:
            return
        for average in self._averages:
            if self._has_ended(average.name):
                continue
            try:
                self._follow(average, reference, baseline, twins)
            except Warning:  # the user made warnings errors
                raise
            except Exception as error:  # noqa: BLE001 - whatever the user's function raises
                self._end(average.name, f"{describe_error(error)} in its update of a sample")

    def _follow(
        self,
        average: RunAverage | BatchStatistic,
        reference: Twin,
        baseline: Twin,
        twins: Sequence[Twin],
    ) -> None:
        name = average.name
        if name not in self._followers:
            self._begin(average)
        sample = self._samples[name]
        if not sample.tensors:
            return
        others = [each for each in twins if each is not baseline and average.concerns(each.recipe)]
        if not others:
            return
        concerned = [*dict.fromkeys([*others, reference, baseline])]
        for twin in concerned:
            dtype = self._find_dtype(sample.dtype, twin, is_baseline=twin is baseline)
            if name not in twin.averages or twin.averages[name].dtype != dtype:
                weights = twin.tensors.weights
                twin.averages[name] = torch.full_like(weights, torch.nan, dtype=dtype)
                self._followers[name].begin_anew()
        self._followers[name].follow(reference, concerned)

    def _begin(self, average: RunAverage | BatchStatistic) -> None:
        """Begin to follow an average of the training's weights: twins update theirs when it does.

        Args:
            average: The average of the training's weights, or a running statistic of BatchNorm.
        """
        sample = AverageSample(average, self._kind)
        sample.rearrange(*self._places)
        self._samples[average.name] = sample
        self._followers[average.name] = _make_follower(average, sample)

    def _find_dtype(self, dtype: torch.dtype, twin: Twin, *, is_baseline: bool) -> torch.dtype:
        """Return the dtype in which a twin, a sample of the training, keeps an average.

        An average with the dtype of the weights follows the weights: ``model.to(torch.bfloat16)``
        makes both bfloat16. Any other dtype was chosen for the average alone.

        Args:
            dtype: The dtype of the training's average.
            twin: The twin.
            is_baseline: True for the twin in float32, with which others are compared.
        """
        own = twin.dtype if dtype == self._kind.dtype else dtype
        return torch.promote_types(own, torch.float32) if is_baseline else own

    def iterate_whole(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield each average that the training keeps, layer by layer, with all of its elements.

        An average is one of the weights, or a running statistic of BatchNorm.

        Returns:
            An iterator over tuples: name of the average, name of the layer, and the average, in the
            shape of the layer.
        """
        for name, sample in self._samples.items():
            for layer, each in sample.tensors.items():
                yield name, layer, each

    # --- checks

    def check(self, reference: Twin, rows: Tensor, mask: Tensor) -> list[Tensor]:
        """Compare the averages that the training and the reference twin keep of their weights.

        The *reference twin* is a sample of the layers that is stepped as the training is, so that
        its averages should equal those of the training at the sampled elements.

        Args:
            reference: The reference twin.
            rows: Positions of the elements of each layer, int64 (layers, width).
            mask: bool (layers, width), False where a row has no element of its layer.

        Returns:
            For each average float64 (layers, 4), on the device: the number of sampled elements that
            differ, that differ by more than rounding, and that moved, and the largest difference in
            spacings of the dtype.
        """
        return [each.check(reference, rows, mask) for each in self._find_active(reference).values()]

    def read(self, reference: Twin, names: Sequence[str], counts: Numbers) -> None:
        """Correct or end the averages in which `check` found a twin to differ from the training.

        A *twin*, a sample of the layers, keeps averages of its weights as the training does. After
        a first difference, all twins take the training's average over. After a second one in a row,
        they keep that average no longer, and the user gets a notice.

        Args:
            reference: The twin that is stepped as the training is.
            names: Names of the layers.
            counts: The result of `check` on the host, float64 (layers, 4 · averages).
        """
        for number, (name, follower) in enumerate(self._find_active(reference).items()):
            found = judge(counts[:, number * _COUNTS :])
            wrong = [k for k, check in enumerate(found) if check is Check.DIFFERENT]
            before = self._wrong.get(name, 0)
            if wrong:
                self._wrong[name] = before + 1
            else:  # averages that were only taken over are right in any case
                self._wrong[name] = 0 if follower.has_followed else before
            follower.has_followed = False
            if self._wrong[name] >= _MOST_WRONG:
                self._end(
                    name,
                    f"its updates on a sample differ from the run in {names[wrong[0]]}"
                    f"{follower.advice}",
                )
            elif wrong:
                follower.begin_anew()

    def _find_active(self, reference: Twin) -> dict[str, Follower]:
        return {n: each for n, each in self._followers.items() if n in reference.averages}

    def _end(self, name: str, reason: str) -> None:
        """Stop updating an average of the weights in all twins, and give the user a notice.

        A *twin* is a sample of the layers. Its average is freed by the next `drop_ended`.

        Args:
            name: Name of the average.
            reason: The reason, for the notice.
        """
        self._wrong[name] = _MOST_WRONG
        self._followers.pop(name, None)
        self._samples.pop(name, None)
        self._warn(f"ends the figures of the average {name!r}: {reason}")

    def drop_ended(self, twins: Collection[Twin]) -> None:
        """Free the averages that twins no longer update.

        A *twin*, a sample of the layers, keeps averages of its weights as the training does. Those
        are freed that the training does not keep, and those that were found to differ from it.

        Args:
            twins: All twins of the lane, whose samples lie in one tensor.
        """
        kept = {each.name for each in self._averages if not self._has_ended(each.name)}
        for twin in twins:
            for name in twin.averages.keys() - kept:
                del twin.averages[name]

    def _has_ended(self, name: str) -> bool:
        return self._wrong.get(name, 0) >= _MOST_WRONG

    def state_dict(self) -> dict[str, int]:
        """Return for each average how many checks in a row have found it wrong, by name."""
        return dict(self._wrong)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore a `state_dict`, before the first step."""
        self._wrong = dict(state)


def _make_follower(average: RunAverage | BatchStatistic, sample: AverageSample) -> Follower:
    if isinstance(average, BatchStatistic):
        return StatisticFollower(average, sample)
    return (
        ShareFollower(average, sample)
        if average.counter is None
        else FunctionFollower(average, sample)
    )
