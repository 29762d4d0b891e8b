"""The CPU: backends, weights and one checked Python call per kernel."""
