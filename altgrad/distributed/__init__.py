"""The same step on several ranks: each measures its shard, all come to the figures of the whole.

`peers` is the door: `Alone`, or the ranks of a run `together`, which agree before they observe.
`ranks` is what they say to each other, `step_message` packs a step into one SUM and one MAX, and
`host_group` carries both. `shards` says which elements of a DTensor lie on this rank, `layers`
knows that of a whole model, and `replicas` compares the copies of a layer.
"""
