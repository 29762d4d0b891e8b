"""Which GGUF of a repository is meant."""

from __future__ import annotations

import pytest

from krasis.formats.errors import FormatError, UsageError
from krasis.formats.hub.gguf_files import choose_gguf, quantisation

FILES = (
    "README.md",
    "model-Q4_K_M.gguf",
    "model-Q4_K_S.gguf",
    "UD-Q4_K_XL/model-UD-Q4_K_XL-00001-of-00002.gguf",
    "UD-Q4_K_XL/model-UD-Q4_K_XL-00002-of-00002.gguf",
    "Q8_0/model-Q8_0-00001-of-00001.gguf",
    "model.IQ4_XS.gguf",
    "model-bf16.gguf",
    "model-MXFP4_MOE.gguf",
    "mmproj-model-f16.gguf",
    "model-imatrix.gguf",
)


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("Q4_K_M", FILES[1:2]),
        ("q4_k_s", FILES[2:3]),
        ("UD-Q4_K_XL", FILES[3:5]),
        ("Q4_K_XL", FILES[3:5]),
        ("Q8_0", FILES[5:6]),
        ("IQ4_XS", FILES[6:7]),
        ("BF16", FILES[7:8]),
        ("mxfp4_moe", FILES[8:9]),
        ("model-Q4_K_S.gguf", FILES[2:3]),
        ("Q8_0/model-Q8_0-00001-of-00001.gguf", FILES[5:6]),
    ],
)
def test_by_quantisation_or_file(variant, names):
    assert choose_gguf(FILES, variant, "org/m") == names


@pytest.mark.parametrize("variant", ["Q4_K", "Q8", "F16", None])
def test_none_or_several(variant):
    with pytest.raises(UsageError, match=r"Q4_K_M, .*Q8_0"):
        choose_gguf(FILES, variant, "org/m")


def test_the_only_one_and_none():
    assert choose_gguf(("a.gguf", "mmproj-a.gguf"), None, "org/m") == ("a.gguf",)
    with pytest.raises(FormatError, match="no GGUF"):
        choose_gguf(("a.safetensors",), None, "org/m")
    with pytest.raises(FormatError, match="1 of 2 parts"):
        choose_gguf(("a-00002-of-00002.gguf",), None, "org/m")


def test_names_without_a_quantisation():
    assert quantisation("some/model.gguf") == "some/model.gguf"
