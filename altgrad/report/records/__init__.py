"""The run file: every figure of every observed step, a line of JSON each; written and read.

docs/run-file.md describes it. `schema` says what a header holds, `lines` and `writing` write,
`reading` reads into the `Run` of `run`. `altgrad.report` exports the public names.
"""
