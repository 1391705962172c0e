"""Writer and reader of the run file, which has a line for each observed step.

A run file, ``altgrad.jsonl``, keeps what AltGrad measured in one training run. docs/run-file.md
describes its format. `altgrad.report` exports the public names.

Read the modules in this order: `fields` (type and bounds of each value, made of `kinds` and
`floats`), `schema` (the header), `packing` and `columns` (the numbers of a step, and what they
are), `lines`, `locks`, `file_names` and `writing` (from the figures of a step to the disk),
`raw_lines`, `rows`, `steps`, `run` and `reading` (from the disk to a `Run`).
"""
