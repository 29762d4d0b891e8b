"""Calls of tools: found in what a model writes, asked for, and written again as they were."""
