"""Inputs that are named on the hub: downloaded first, or piece by piece while they are converted."""
