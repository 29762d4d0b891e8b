"""What a bundle of random weights is made of, and how it is written; see ``make_random_bundle.py``."""
