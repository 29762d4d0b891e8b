"""Page-aligned memory: what the kernel says of it."""

import re
from pathlib import Path

import numpy as np
import pytest

from krasis.formats.files.aligned import aligned_empty
from krasis.formats.limits import HUGE_PAGE_BYTES, PAGE_BYTES

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def mapping_of(address: int) -> dict[str, str]:
    """The fields of /proc/self/smaps for the mapping that holds an address."""
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        begin, end = (int(part, 16) for part in block.split(maxsplit=1)[0].split("-"))
        if begin <= address < end:
            return dict(re.findall(r"^(\w+): +(.*?) *$", block, re.MULTILINE))
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.parametrize(
    "num_bytes", [1, PAGE_BYTES, HUGE_PAGE_BYTES - 1, HUGE_PAGE_BYTES, 5 * HUGE_PAGE_BYTES + 3]
)
def test_begins_at_a_page_and_is_zero(num_bytes: int) -> None:
    memory = aligned_empty(num_bytes)
    boundary = HUGE_PAGE_BYTES if num_bytes >= HUGE_PAGE_BYTES else PAGE_BYTES
    assert memory.ctypes.data % boundary == 0
    assert memory.shape == (num_bytes,)
    assert memory.dtype == np.uint8
    assert not memory.any()
    memory[:] = 7


def test_large_memory_may_be_huge_pages_wherever_the_system_has_them() -> None:
    """Shared memory, Python's default for anonymous mappings, gets none on most systems."""
    memory = aligned_empty(8 * HUGE_PAGE_BYTES)
    has_them = SETTING.is_file() and "[never]" not in SETTING.read_text()
    assert mapping_of(memory.ctypes.data).get("THPeligible", "0") == str(int(has_them))
