"""GPU experts in pinned host memory."""

from krasis.runtime.host_memory.api import (
    Attempt,
    Choice,
    ExpertRange,
    ExpertStore,
    LoadReport,
    PinnedExperts,
)
from krasis.runtime.host_memory.opening import open_store
from krasis.runtime.host_memory.survey import Trial, survey, survey_to_text

__all__ = [
    "Attempt",
    "Choice",
    "ExpertRange",
    "ExpertStore",
    "LoadReport",
    "PinnedExperts",
    "Trial",
    "open_store",
    "survey",
    "survey_to_text",
]
