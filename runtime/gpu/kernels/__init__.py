"""GPU kernels: one checked Python call per function, and the products made of them."""
