"""Launch parameters found by tools/tune_kernels.py: {architecture: {operation: (block, num_warps)}}.

Empty until somebody has run the tool on a GPU; launch.py then answers with its own choices.
"""

TUNED: dict[str, dict[str, tuple[int, int]]] = {}
