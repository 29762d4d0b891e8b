"""Models by their names on the hub: what a name means, which files there are, which are needed."""
