"""Set-up, checks, benchmarks and makers of models: ``python -m scripts.NAME`` from the repository root."""
