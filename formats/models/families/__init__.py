"""One file a model family; ``registry`` finds them by their names."""
