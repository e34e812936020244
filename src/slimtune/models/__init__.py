"""How a model is loaded, gated and cut."""
