"""The day with a GPU: what `make gpu-report` runs, one file a part.

A part is a program of its own: `python -m megatron_completep.benchmarks.gpu_day.PART`. It prints
one JSON object a figure on stdout, with what was expected of it beside what was measured.
"""
