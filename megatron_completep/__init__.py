"""Train CompleteP transformers at Megatron scale; start reading at `pretrain.py`."""

__version__ = "0.1.0"
