"""How fast a model is here, and how much of what its smaller size allows that is."""
