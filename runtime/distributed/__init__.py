"""Several GPUs, several machines: which rank does what, and what they exchange."""
