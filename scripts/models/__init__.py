"""Makers of tiny and random models, and the files that these are made of."""
