"""How long tests wait for what must come."""

# Nothing on a quiet machine comes so late; on one with twenty programs a core it may. Waiting costs time only
# where a test fails, and ends before pytest's own limit for a test (pyproject.toml).
PATIENCE_S = 120.0
