"""Rows in, batches of tokens out."""
