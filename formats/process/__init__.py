"""What this process is: its streams, signals, limits, version, and its workers."""
