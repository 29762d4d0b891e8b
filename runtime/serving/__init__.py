"""The core of a server: many requests, one backend. Nothing in it knows HTTP; ``api`` is what others use."""
