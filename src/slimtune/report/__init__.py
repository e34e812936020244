"""What a person reads after a run. Needs no torch."""
