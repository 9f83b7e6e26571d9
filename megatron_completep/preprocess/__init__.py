"""From raw text to token files. `run.preprocess` is the entrance; `sources` says what is read, `encode` what a worker does with it."""
