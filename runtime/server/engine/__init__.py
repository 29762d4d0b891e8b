"""The engine in a process of its own, and what the server says to it."""
