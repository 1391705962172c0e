"""The run file, with a JSON line for each layer in each observed step: format, writer and reader.

docs/run-file.md describes the file. Read the modules in this order: `fields` (type and bounds of
each value, made of `kinds` and `floats`), `schema` (the header), `lines`, `locks` and `writing`
(from a record to the disk), `run`, `raw_lines` and `reading` (from the disk to a `Run`).
`altgrad.report` exports the public names.
"""
