"""Which pyramid level holds the best anchor of each box. Pure tensors."""
