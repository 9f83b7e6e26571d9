"""Command-line programs.

`python tools/NAME.py` runs one in a checkout, `python -m megatron_completep.tools.NAME` anywhere.
"""
