"""The same step on several ranks: each measures its shard, all come to the figures of the whole.

`ranks` is the door: what the processes of a run say to each other. `step_message` packs a step into
one SUM and one MAX, `host_group` carries it; `shards` says which elements of a DTensor lie in this
process, `layers` knows that of all layers of a monitor.
"""
