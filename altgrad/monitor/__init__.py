"""Which steps, layers and elements are observed, and what is kept from step to step.

`monitor` is the door: `UpdateMonitor`. It asks `schedule` and `overhead` which steps are due,
`layer_settings` and `elements` what to copy of each layer, has `step_measuring` measure what lies
in an `arena`, under the scales of `scale_state`, and agrees with other ranks through `agreement`.
`describe` prints a dry run, `header` hands plain data to the run file, and `weight_octaves` counts
where the weights lie.
"""
