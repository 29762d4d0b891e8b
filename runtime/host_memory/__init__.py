"""GPU experts in pinned host memory."""

from krasis.runtime.host_memory.api import Attempt, Choice, ExpertStore, Group, LoadReport, Piece
from krasis.runtime.host_memory.opening import open_store
from krasis.runtime.host_memory.survey import Trial, survey, survey_to_text

__all__ = [
    "Attempt",
    "Choice",
    "ExpertStore",
    "Group",
    "LoadReport",
    "Piece",
    "Trial",
    "open_store",
    "survey",
    "survey_to_text",
]
