"""AltGrad: if I kept my weights in this number format, would they still move?"""

from altgrad.figures import Figures, model_figures
from altgrad.measuring import DEFAULT_FORMATS, measure
from altgrad.monitor import UpdateMonitor
from altgrad.observation import OptimizerStep, StepObserver
from altgrad.quantization import FloatFormat, get_format, quantize, spacing
from altgrad.sampling import SamplingRule, StepSchedule
from altgrad.step_record import StepRecord
from altgrad.storage import WeightStorage

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_FORMATS",
    "Figures",
    "FloatFormat",
    "OptimizerStep",
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
]
