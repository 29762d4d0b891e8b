"""The commands: options, terminal, output and reports."""
