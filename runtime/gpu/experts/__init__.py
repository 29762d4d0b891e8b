"""Experts on a GPU: how they are streamed, kept in VRAM, or left to the CPU."""
