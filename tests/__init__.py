"""Tests; folders mirror the rooms of megatron_completep,
and `support` holds what several of them share.
"""
