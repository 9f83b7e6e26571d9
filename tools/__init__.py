"""Command-line programs; `python tools/NAME.py` here, `python -m megatron_completep.tools.NAME` anywhere."""
