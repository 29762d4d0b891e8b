"""The machine that the runtime runs on: memory, pages, NUMA nodes, file systems, visible GPUs."""
