"""Which steps, layers and elements are observed, and what is kept from step to step.

`monitor` is the door: `UpdateMonitor`. It asks `policy`, which goes by `schedule` and `overhead`,
which steps are due, and `layer_settings` and `elements` what to copy of each layer; `engine`
measures what lies in an `arena`, under the scales of `scale_state`. `watch` is what other ranks
have to know of it. `unjudged` leaves out what cannot be judged, `describe` prints a dry run,
`header` hands plain data to the run file, and `weight_octaves` counts where the weights lie.
"""
