"""What shall be cut: gates, sampling, generator, budget."""
