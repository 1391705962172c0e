"""The header of a run file, from what is going to be watched."""

from __future__ import annotations

from altgrad.monitor.monitor import UpdateMonitor
from altgrad.report.records.schema import FormatInfo, Header, LayerInfo


def header_of(monitor: UpdateMonitor) -> Header:
    """Formats, scaling and layers of a monitor, for `RunFile`."""
    formats = {format.name: FormatInfo.of(format, monitor.scaling) for format in monitor.formats}
    layers = {
        name: LayerInfo(
            shape=tuple(parameter.shape),
            dtype=str(parameter.dtype).removeprefix("torch."),
            elements=monitor.elements_of(name),
            formats=monitor.layers[name].formats,
            every_n_steps=monitor.layers[name].every_n_steps,
        )
        for name, parameter in monitor.parameters.items()
    }
    return Header(formats=formats, layers=layers, scaling=monitor.scaling)
