"""How tensors are laid over ranks: the mesh, collectives with gradients, and parallel layers."""
