"""Number formats: their values, exact rounding to them, scales, and the effect of one update.

Read the files in this order:

- `float_format`: `FloatFormat`, the fields, limits and values of one floating-point format.
- `formats`: the named formats (``e4m3fn``, ``bf16``, …), `get_format`, and the type `Scaling`.
  `spellings` has the error for an unknown name, such as ``fp8``.
- `number_format`, `block_formats`: the interface of all formats, and the formats whose blocks
  share a scale (``mxfp4``, ``nvfp4``).
- `kernel`: rounding of one tensor to a grid (the numbers of a format), and the spacing of the
  grid, with exact arithmetic.
- `ops`: `quantize` and `spacing`, the public functions around the kernel. `arguments` checks the
  arguments of public functions.
- `scaling`: amax scales of one tensor, from its largest finite magnitude (amax).
- `format_set`, `scale_groups`, `grids`: scales of and rounding to several formats at once, for
  `UpdateMonitor`.
- `diagnostics`: the effect of one update on a grid, element by element.
- `advanced_diagnostics`: DIAG-01 to DIAG-04 (stiffness, grid alignment, ULP distance, correlation
  of gradient and stiffness), whose names and result keys are the same in every version.
"""

from typing import TYPE_CHECKING

from altgrad import _lazy

if TYPE_CHECKING:
    from altgrad.quantization.advanced_diagnostics import (
        compute_stiffness_field,
        compute_ulp_distance,
        gradient_stiffness_correlation,
        grid_alignment_error,
        grid_alignment_statistics,
        ulp_statistics,
    )
    from altgrad.quantization.arguments import INPUT_DTYPES
    from altgrad.quantization.block_formats import (
        BLOCK_FORMATS,
        BlockFormat,
        get_formats,
    )
    from altgrad.quantization.diagnostics import effective_update, stall_mask, visible_mask
    from altgrad.quantization.float_format import FloatFormat
    from altgrad.quantization.formats import (
        BF16,
        E0M7,
        E1M6,
        E2M1,
        E2M3,
        E2M5,
        E3M2,
        E3M4,
        E4M3,
        E4M3_IEEE,
        E4M3B11FNUZ,
        E4M3FNUZ,
        E5M2,
        E5M2FNUZ,
        E6M1,
        E7M0,
        FORMATS,
        FP16,
        FP8Format,
        Scaling,
        get_format,
    )
    from altgrad.quantization.kernel import Rounding
    from altgrad.quantization.number_format import NumberFormat
    from altgrad.quantization.ops import quantize, spacing
    from altgrad.quantization.scaling import compute_scale

__all__ = [
    "BF16",
    "BLOCK_FORMATS",
    "E0M7",
    "E1M6",
    "E2M1",
    "E2M3",
    "E2M5",
    "E3M2",
    "E3M4",
    "E4M3",
    "E4M3B11FNUZ",
    "E4M3FNUZ",
    "E4M3_IEEE",
    "E5M2",
    "E5M2FNUZ",
    "E6M1",
    "E7M0",
    "FORMATS",
    "FP16",
    "INPUT_DTYPES",
    "BlockFormat",
    "FP8Format",
    "FloatFormat",
    "NumberFormat",
    "Rounding",
    "Scaling",
    "compute_scale",
    "compute_stiffness_field",
    "compute_ulp_distance",
    "effective_update",
    "get_format",
    "get_formats",
    "gradient_stiffness_correlation",
    "grid_alignment_error",
    "grid_alignment_statistics",
    "quantize",
    "spacing",
    "stall_mask",
    "ulp_statistics",
    "visible_mask",
]

if not TYPE_CHECKING:  # a `__getattr__` would make every name Any for mypy
    __getattr__, __dir__ = _lazy.attach(
        __name__,
        {
            "advanced_diagnostics": (
                "compute_stiffness_field compute_ulp_distance gradient_stiffness_correlation "
                "grid_alignment_error grid_alignment_statistics ulp_statistics"
            ),
            "arguments": "INPUT_DTYPES",
            "block_formats": "BLOCK_FORMATS BlockFormat get_formats",
            "diagnostics": "effective_update stall_mask visible_mask",
            "float_format": "FloatFormat",
            "formats": (
                "BF16 E0M7 E1M6 E2M1 E2M3 E2M5 E3M2 E3M4 E4M3 E4M3B11FNUZ E4M3FNUZ E4M3_IEEE "
                "E5M2 E5M2FNUZ E6M1 E7M0 FORMATS FP16 FP8Format Scaling get_format"
            ),
            "kernel": "Rounding",
            "number_format": "NumberFormat",
            "ops": "quantize spacing",
            "scaling": "compute_scale",
        },
        submodules=(
            "advanced_diagnostics arguments block_formats diagnostics float_format format_set "
            "formats grids kernel number_format ops scale_groups scaling spellings"
        ),
    )
