"""Builds, checks and measures Krasis on a machine with an NVIDIA GPU; see ``cli`` and docs/GPU.md."""
