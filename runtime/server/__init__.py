"""krasis-serve: the HTTP part. It speaks to the engine only through ``runtime.serving.api``."""
