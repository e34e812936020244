"""What is written for others to load."""
