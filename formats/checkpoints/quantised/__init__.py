"""Weights that a checkpoint holds quantised: how each format is recognised, and what its numbers are."""
