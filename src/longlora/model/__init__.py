"""What a model is: where it comes from, its positions, what trains in it, its loss, and how it is saved."""
