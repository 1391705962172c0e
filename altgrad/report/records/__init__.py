"""The run file: one JSON line for each layer in each observed step; written, read, and held.

docs/run-file.md describes the file. Read the modules in this order: `schema` (the header),
`lines` and `writing` (from a record to the disk), `run` and `reading` (from the disk to a `Run`).
`altgrad.report` exports the public names.
"""
