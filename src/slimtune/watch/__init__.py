"""``slimtune watch``: a run while it goes on, in a terminal. Needs no torch."""
