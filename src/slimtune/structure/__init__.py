"""What can be cut: families, axes, plans. Knows neither torch nor transformers."""
