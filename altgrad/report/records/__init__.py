"""Writer and reader of the run file, which has a JSON line for each layer in each measured step.

A run file, ``altgrad.jsonl``, keeps what AltGrad measured in one training run. docs/run-file.md
describes its format. `altgrad.report` exports the public names.

Read the modules in this order: `fields` (type and bounds of each value, made of `kinds` and
`floats`), `schema` (the header), `lines`, `locks`, `file_names` and `writing` (from the figures of
a step to the disk), `run`, `raw_lines` and `reading` (from the disk to a `Run`).
"""
