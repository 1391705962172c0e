"""AltGrad: if I kept my weights in this number format, would they still move?"""

from altgrad.measuring import DEFAULT_FORMATS, measure
from altgrad.observation import OptimizerStep, StepObserver
from altgrad.quantization import FloatFormat, get_format, quantize, spacing

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_FORMATS",
    "FloatFormat",
    "OptimizerStep",
    "StepObserver",
    "__version__",
    "get_format",
    "measure",
    "quantize",
    "spacing",
]
