"""How well a model uses its window: a room for each measure."""
