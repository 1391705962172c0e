"""`Output`: write the figures of a run to the run file and to the loggers.

A run file or logger that raises an error is left out from then on, with one warning.

Read this file first. Whoever observes a run passes each record to `Output.write`: see
`altgrad.integrations.run_watch`, or `altgrad_lightning.session`. The next file is `charts`, which
makes the rows of numbers; `history` follows, and `loggers`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import altgrad.output.loggers as boards
from altgrad.measurement.figure_columns import split_columns
from altgrad.measurement.figures import Figures, model_figures
from altgrad.measurement.histogram import Histogram
from altgrad.measurement.step_record import StepRecord
from altgrad.observation.step import SkipReason
from altgrad.output.charts import ChartKind, Charts, Row
from altgrad.output.history import History
from altgrad.output.panels import Panels
from altgrad.report import (
    Assessment,
    Header,
    Judge,
    LayerInfo,
    RunFile,
    RunFileError,
    describe_frozen_now,
    find_frozen,
    ranges,
)
from altgrad.report.answers import is_low
from altgrad.report.records.schema import RecipeInfo

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class OutputSettings(NamedTuple):
    """Settings of an `Output`: which charts it makes, and what becomes of errors.

    Attributes:
        layer_charts: Number of layers with charts of their own, or patterns of their names; None
            for as many as there is room for.
        charts: ``"default"`` for the headline and DIAG-01 to 04, ``"all"`` for all metrics.
        histograms: If True, log histograms of updates in units of the spacing of each format, the
            distance between its neighbouring numbers at a weight.
        run_file: If True, a run file is written.
        strict: If True, errors of files and loggers are raised; otherwise each gives a warning.
    """

    layer_charts: int | Sequence[str] | None = None
    charts: ChartKind = "default"
    histograms: bool = False
    run_file: bool = True
    strict: bool = False


class Output:
    """A writer of the figures of one run: to the run file, and as charts and pictures to loggers.

    It also judges what each recipe, a way to store weights, would make of the run and its layers.

    Args:
        loggers: Loggers, each with a method ``log_metrics(metrics, step)``, as those of Lightning.
        folder: The folder in which to create the run file; None for no run file.
        describe_run: Function that returns the judged formats and the layers observed so far, such
            as `UpdateMonitor.run_header`. It is called again when a record has a new layer.
        settings: Which charts are made, and what becomes of errors.
        state: The `state_dict` of the run to resume; None for a new run.
        first_step: The step at which the next figures are logged, if `state` has no last step.
        warn: Function that is called with each notice for the user.

    Attributes:
        path: The path of the run file, also after it was closed; None if no run file is written.
    """

    def __init__(
        self,
        loggers: Iterable[Any],
        folder: Path | None,
        describe_run: Callable[[], Mapping[str, Any]],
        settings: OutputSettings,
        state: Mapping[str, Any] | None,
        first_step: int,
        warn: Callable[[str], object],
    ) -> None:
        self._settings = settings
        self._warn = warn
        self._describe_run = describe_run
        runs = boards.describe_runs(loggers := [*loggers])
        self._loggers = boards.wrap_loggers(loggers)
        self._header = Header.from_json({**describe_run(), "loggers": runs})
        self._known = _list_described(self._header.layers)
        self._latest: dict[str, Figures] = {}  # of each layer, from its last observed step
        self._written = 0  # number of records
        self._history = History()
        self._panels = Panels()
        self._row: Row | None = None  # the last one that was logged
        self._has_warned = False  # of frozen layers
        self._write_seconds = 0.0  # of the last `write`
        self._last_step = first_step - 1
        self._file: RunFile | None = None
        self.path: Path | None = None
        self._charts, self._judge = self._make_collectors()
        self._before: Path | None = None  # the run file to continue
        if state is not None:
            self._try("the verdicts and the run file of its checkpoint", lambda: self._load(state))
        if folder is not None:
            self._try(f"a run file in {folder}", lambda: self._open(folder))
        self._drawn_step = self._last_step

    def assess(self) -> Assessment:
        """Return the verdicts so far on the run and on its layers, for each recipe.

        A *recipe* says how weights and optimizer states are stored.
        """
        return self._judge.assessment()

    def write(self, step: int, record: StepRecord, skipped: Mapping[SkipReason, int]) -> None:
        """Write one observed step to the run file and to every logger.

        Args:
            step: The step to log at.
            record: The figures of the step.
            skipped: The number of steps so far that moved no weight, by reason.
        """
        began = time.perf_counter()
        self._add_new_layers(record)
        self._latest |= record.layers
        self._written += 1
        # Pictures take half a second, so they are drawn at the 1st, 4th, 16th, … record only.
        weights = self._count_weights() if _is_even_power(self._written) else None
        columns = split_columns(record.layers)
        for each in columns:
            self._judge.add_columns(step, each)
        self._history.add(step, columns)
        self._append(step, record, weights, skipped)
        monitor = self._measure_overhead(step, record, sum(skipped.values()))
        self._chart(self._charts.add(step, record.model, record.layers, columns, monitor))
        self._last_step = step
        if self._settings.histograms:
            histograms = self._step_histograms(record)
            self._try_loggers(lambda logger: boards.log_histograms([logger], step, histograms))
        if weights is not None:
            self._show(step, weights)
        self._write_seconds = time.perf_counter() - began

    def write_unobserved(
        self, steps: int, skipped: Mapping[SkipReason, int], every_n_steps: int | None = None
    ) -> None:
        """Write to the run file that no step was observed, so that its report can say why.

        Args:
            steps: Number of steps of the run.
            skipped: Number of steps that were looked at and moved no weight, by reason.
            every_n_steps: Number of steps from one observed step to the next, 0 for no step; None
                if unknown.
        """
        if self._file is not None:
            counts = {str(reason): count for reason, count in skipped.items()}
            self._write(partial(self._file.add_unobserved, steps, counts, every_n_steps))

    def finish(self) -> None:
        """Log the numbers that were kept back, draw the last step, and close the run file.

        Numbers of early steps are kept back until it is known which layers get charts.
        """
        self._chart(self._charts.take_waiting())
        if self._drawn_step != self._last_step:
            self._show(self._last_step, self._count_weights() if self._latest else None)
        self.close()

    def close(self) -> None:
        """Close the run file, and the runs of formats and recipes in TensorBoard.

        A *recipe* says how weights and optimizer states are stored.
        """
        self._try_loggers(boards.close_runs)
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def state_dict(self) -> dict[str, Any]:
        """Return charted layers, sums for verdicts, last step and run file, for a checkpoint."""
        return {
            "charts": self._charts.state_dict(),
            "verdicts": self._judge.state_dict(),
            "last_step": self._last_step,
            "run_file": None if self.path is None else str(self.path.absolute()),
        }

    def _make_collectors(self) -> tuple[Charts, Judge]:
        header, settings = self._header, self._settings
        charts = Charts(
            [*header.formats],
            settings.layer_charts,
            settings.charts,
            recipes=[*header.recipes],
            is_low=is_low(header.layers, {}) or _is_rounded(header.now),
        )
        return charts, Judge(header.formats, header.layers, header.recipes, header.now)

    def _load(self, state: Mapping[str, Any]) -> None:
        """Restore a result of `state_dict`, either as a whole or, after an error, nothing of it."""
        charts, judge = self._make_collectors()
        charts.load_state_dict(state["charts"])
        judge.load_state_dict(state["verdicts"])
        # Version 0.1.0 saved no step.
        last_step = int(state.get("last_step", self._last_step))
        self._before = None if state["run_file"] is None else Path(state["run_file"])
        self._charts, self._judge, self._last_step = charts, judge, last_step

    def _add_new_layers(self, record: StepRecord) -> None:
        """Describe layers that are measured for the first time, such as layers just unfrozen.

        They are added to the verdicts and to the run file. The first step of a layer creates its
        optimizer states; their sizes are unknown before, and are added in the same way.
        """
        if record.layers.keys() <= self._known:
            return
        described = Header.from_json(self._describe_run()).layers
        layers = {name: described[name] for name in record.layers if name not in self._known}
        self._judge.add_layers(layers)
        self._header = replace(self._header, layers={**self._header.layers, **layers})
        if self._file is not None:
            self._write(partial(self._file.add_layers, layers))
        self._known.update(layers)

    def _count_weights(self) -> Histogram:
        """Return the histogram of log2(abs(weight)) over all layers observed so far."""
        return model_figures([*self._latest.values()]).histogram("weights")

    # --- the run file

    def _open(self, folder: Path) -> None:
        """Open a run file in a folder, which continues the run file that a restored state names."""
        # The verdicts so far count the steps up to the last one, so those lines are kept, and no
        # other. The Trainer's own count is not yet restored when training starts.
        first_step = self._last_step + 1
        if self._before is None:
            self._file = RunFile.create(folder, self._header)
        elif self._before.parent.resolve() == folder.resolve():
            self._file = self._resume(self._before, first_step)
        else:
            # If the earlier file is missing, the report says so.
            predecessor = self._before, first_step
            self._file = RunFile.create(folder, self._header, predecessor=predecessor)
        self.path = self._file.path

    def _resume(self, before: Path, first_step: int) -> RunFile:
        try:
            return RunFile.resume(before, first_step, self._header)
        except RunFileError as error:
            self._warn(f"begins a new run file in {before.parent}: {error}")
            return RunFile.create(before.parent, self._header)

    def _append(
        self,
        step: int,
        record: StepRecord,
        weights: Histogram | None,
        skipped: Mapping[SkipReason, int],
    ) -> None:
        if self._file is None:
            return
        counts = {str(reason): count for reason, count in skipped.items()}
        self._write(partial(self._file.append, step, record, weights=weights, skipped=counts))

    def _write(self, write: Callable[[], object]) -> None:
        """Call `write`, which writes to the run file, and close the file after an error."""
        assert self._file is not None
        if not self._try(f"the run file {self._file.path}", write):
            self.close()
        else:
            self.path = self._file.path  # a file that was deleted may have a new name

    # --- the loggers

    def _chart(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._row = row
            self._panels.add(row)
            self._try_loggers(partial(boards.log_row, row=row))

    def _show(self, step: int, weights: Histogram | None) -> None:
        """Judge the run, write the verdicts to the run file, and draw pictures for loggers."""
        self._drawn_step = step
        found: list[Assessment] = []
        if not self._try("verdicts", lambda: found.append(self.assess())):
            return
        (assessment,) = found
        if self._file is not None:
            self._write(partial(self._file.add_verdicts, step, assessment.runs))
        self._warn_about_frozen(assessment)
        if boards.can_show(self._loggers):
            self._draw(step, weights, assessment)

    def _warn_about_frozen(self, assessment: Assessment) -> None:
        """Warn about layers that stand still, once, when verdicts first show any."""
        if not self._has_warned and (notice := describe_frozen_now(assessment)):
            self._has_warned = True
            self._warn(f"sees {notice}")

    def _draw(self, step: int, weights: Histogram | None, assessment: Assessment) -> None:
        if (row := self._row) is not None:
            self._try_loggers(lambda logger: boards.log_layout([logger], row))
        lines = self._panels.list_lines()
        self._try_loggers(lambda logger: boards.log_panels([logger], step, lines))
        pictures: dict[str, Figure] = {}
        self._try("pictures", lambda: pictures.update(self._pictures(weights, assessment)))
        self._try_loggers(lambda logger: boards.log_pictures([logger], step, pictures))
        self._try_loggers(
            lambda logger: boards.log_verdict([logger], step, assessment, self._header)
        )

    def _pictures(self, weights: Histogram | None, assessment: Assessment) -> dict[str, Figure]:
        """Draw heat maps of layers by steps, and the histogram of weights with formats' ranges.

        Args:
            weights: Histogram of log2(abs(weight)); None to leave out its picture.
            assessment: Verdicts, for the layers that never move.

        Returns:
            The pictures, by key.
        """
        formats = self._header.formats
        frozen = {format: find_frozen(assessment, format) for format in formats}
        pictures = self._history.draw_heat_maps(frozen)
        if weights is not None:
            pictures["ranges"] = ranges(weights, [*formats.values()])
        return pictures

    def _step_histograms(self, record: StepRecord) -> dict[str, Histogram]:
        """Return histograms of log2(abs(update) / spacing of the format), by key.

        The keys are ``steps/{format}`` for the model, and ``steps/{format}/{layer}`` for layers
        with charts.
        """
        layers = [name for name in self._charts.charted or () if name in record.layers]
        each: list[tuple[str, Figures]] = [("", record.model)]
        each += [(f"/{name}", record.layers[name]) for name in layers]
        return {
            f"steps/{format}{suffix}": figures.histogram(f"steps/{format}")
            for suffix, figures in each
            for format in figures.formats
        }

    def _measure_overhead(self, step: int, record: StepRecord, skipped: int) -> dict[str, float]:
        """Return numbers about observing itself, by the end of the keys ``altgrad/monitor/…``.

        The numbers are the share of time for observing and output, the number of measured elements,
        and the number of steps that moved no weight.
        """
        total = record.own_seconds + record.training_seconds * max(step - self._last_step, 1)
        return {
            "own_share": (record.own_seconds + self._write_seconds) / total if total else 0.0,
            "elements": float(record.model.elements),
            "skipped_steps": float(skipped),
        }

    # --- errors

    def _try_loggers(self, log: Callable[[Any], object]) -> None:
        """Call `log` with each logger, and drop loggers that raise an error."""
        for logger in [*self._loggers]:
            if not self._try(boards.name_logger(logger), partial(log, logger)):
                self._loggers.remove(logger)

    def _try(self, destination: str, write: Callable[[], object]) -> bool:
        """Call `write`; after an error, name the destination in a notice and return False."""
        try:
            write()
        except Exception as error:
            if self._settings.strict:
                raise
            self._warn(f"goes on without {destination}, which failed: {error!r}")
            return False
        return True


def _list_described(layers: Mapping[str, LayerInfo]) -> set[str]:
    """Return the names of the layers whose descriptions have the sizes of optimizer states."""
    return {name for name, layer in layers.items() if layer.states is not None}


def explain_skipped(skipped: Mapping[SkipReason, int], *, have_moved: bool) -> str:
    """Return a phrase with the reasons why all steps were skipped; empty if none was skipped.

    Args:
        skipped: Number of skipped steps, by reason.
        have_moved: True if layers have moved all the same.
    """
    if not skipped:
        return ""
    return f"all were skipped, {dict(skipped)}{', and yet layers moved' if have_moved else ''}"


def _is_rounded(now: RecipeInfo | None) -> bool:
    """Return True if a run rounds weights or optimizer states to a format after each step.

    Its tensors are then float32, but their values are those of a lower format.

    Args:
        now: How the run itself is stored; None if unknown.
    """
    return now is not None and bool(now.weights or now.states)


def _is_even_power(number: int) -> bool:
    """Return True for 1, 4, 16, 64, …: the even powers of 2."""
    # Binary 1, 100, 10000, …: a single bit, and an odd number of digits.
    return number.bit_count() == 1 and number.bit_length() % 2 == 1
