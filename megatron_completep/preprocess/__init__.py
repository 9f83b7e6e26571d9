"""From raw text to token files.

`run.preprocess` is the entrance, `sources` finds the inputs, and `encode` is a worker's task.
"""
