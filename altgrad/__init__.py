"""AltGrad: if I kept my weights in this number format, would they still move?

AltGrad observes the steps of a PyTorch optimizer, rounds their updates to number formats, and
reports how much of each update a format keeps. Most runs need the function `watch` alone, or
`altgrad_lightning.PrecisionMonitor` in a Trainer. The packages build on each other:

1. `altgrad.quantization` defines number formats and rounds to them.
2. `altgrad.observation` copies weights and gradients around an optimizer step.
3. `altgrad.measurement` computes the metrics of a step.
4. `altgrad.monitor` observes and measures a training run; `altgrad.distributed` combines the sums
   of several ranks.
5. `altgrad.report` writes and reads run files, and judges them; `altgrad.output` passes figures to
   run files and loggers.
6. `altgrad.integrations` watches a whole training, in any loop and in those of other libraries.

`altgrad.recipes` has recipes: how weights and optimizer states are stored. A recipe stores all of
them, or `altgrad.twins` tries it on a sample of a run's weights. A name is imported on first use,
so `import altgrad` alone loads no other package, not even torch.
"""

from typing import TYPE_CHECKING

from altgrad import _lazy
from altgrad._version import __version__

if TYPE_CHECKING:
    from altgrad import (
        measurement as measurement,
        observation as observation,
        quantization as quantization,
        recipes as recipes,
        report as report,
    )
    from altgrad.distributed.host_group import LostRankError
    from altgrad.integrations.run_watch import RunWatch, watch
    from altgrad.measurement.figures import Figures, model_figures
    from altgrad.measurement.histogram import Histogram
    from altgrad.measurement.measure import DEFAULT_FORMATS, measure
    from altgrad.measurement.step_record import StepRecord
    from altgrad.monitor.monitor import UpdateMonitor
    from altgrad.monitor.schedule import StepSchedule
    from altgrad.observation.observer import StepObserver
    from altgrad.observation.rules import SamplingRule
    from altgrad.observation.step import OptimizerStep
    from altgrad.quantization.float_format import FloatFormat
    from altgrad.quantization.formats import get_format
    from altgrad.quantization.ops import quantize, spacing
    from altgrad.recipes.recipe import Recipe
    from altgrad.recipes.storage import WeightStorage

__all__ = [
    "DEFAULT_FORMATS",
    "Figures",
    "FloatFormat",
    "Histogram",
    "LostRankError",
    "OptimizerStep",
    "Recipe",
    "RunWatch",
    "SamplingRule",
    "StepObserver",
    "StepRecord",
    "StepSchedule",
    "UpdateMonitor",
    "WeightStorage",
    "__version__",
    "get_format",
    "measure",
    "model_figures",
    "quantize",
    "spacing",
    "watch",
]

if not TYPE_CHECKING:  # a `__getattr__` would make every name Any for mypy
    __getattr__, __dir__ = _lazy.attach(
        __name__,
        {
            "distributed.host_group": "LostRankError",
            "integrations.run_watch": "RunWatch watch",
            "measurement.figures": "Figures model_figures",
            "measurement.histogram": "Histogram",
            "measurement.measure": "DEFAULT_FORMATS measure",
            "measurement.step_record": "StepRecord",
            "monitor.monitor": "UpdateMonitor",
            "monitor.schedule": "StepSchedule",
            "observation.observer": "StepObserver",
            "observation.rules": "SamplingRule",
            "observation.step": "OptimizerStep",
            "quantization.float_format": "FloatFormat",
            "quantization.formats": "get_format",
            "quantization.ops": "quantize spacing",
            "recipes.recipe": "Recipe",
            "recipes.storage": "WeightStorage",
        },
        submodules="measurement observation quantization recipes report",
    )
