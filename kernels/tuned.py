"""Launch parameters found by tools/tune_kernels.py.

{architecture: {(operation, bucket of shapes, bytes of the dtype): parameters}}. The table is empty
until the tool has been run on a GPU; launch.py then answers with its own rules.
"""

TUNED: dict[str, dict[tuple[str, int, int], tuple[int, ...]]] = {}
