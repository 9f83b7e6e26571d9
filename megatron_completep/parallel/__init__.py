"""How tensors are laid over ranks: the mesh, collectives with their gradients, and the layers that use them."""
