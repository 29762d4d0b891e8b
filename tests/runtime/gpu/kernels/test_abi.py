"""The ctypes structures and prototypes against the words of csrc/krasis_cuda.h."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
from c_headers import header_text

from krasis.formats.errors import NativeError
from krasis.runtime.device import library as device_library
from krasis.runtime.device.library import ABI_VERSION, check_status, double_library
from krasis.runtime.gpu.kernels import native
from krasis.runtime.planning.workspace import DELTA_CHUNK_BYTES, DELTA_CHUNK_TOKENS

TYPES = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "krasis_cuda_route_args": native.RouteArgs,
}
# Bound where they are used: they are not in the double.
ELSEWHERE = {"abi_version", "last_error", "host_register", "host_unregister", "host_device_address"}


def text() -> str:
    return header_text("krasis_cuda.h", without=frozenset({"krasis.h"}))


def fields(body: str) -> list[tuple[str, object]]:
    """(name, ctypes type) of the members of a C struct, in order."""
    sizes = {name: int(size) for name, size in re.findall(r"#define (KRASIS_CUDA_\w+) (\d+)", text())}
    found: list[tuple[str, object]] = []
    for declaration in filter(None, (part.strip() for part in body.split(";"))):
        kind, names = re.fullmatch(r"(?:const )?(\w+)\s*(.*)", declaration, flags=re.S).groups()
        for name in names.split(","):
            bare = re.search(r"(\w+)\s*(?:\[(\w+)\])?\s*$", name)
            one = ctypes.c_void_p if "*" in name else TYPES[kind]
            found.append((bare[1], one * sizes[bare[2]] if bare[2] else one))
    return found


STRUCTS = dict(
    re.findall(r"typedef struct krasis_cuda_(\w+)_args \{(.*?)\} krasis_cuda_\w+;", text(), flags=re.S)
)
FUNCTIONS = {
    name: (result, [part.strip() for part in arguments.split(",") if part.strip() != "void"])
    for result, name, arguments in re.findall(
        r"KRASIS_API ([\w ]+?[ *]+)krasis_cuda_(\w+)\((.*?)\);", text(), flags=re.S
    )
}


def shape_of(kind: type) -> str:
    return f"{kind._type_.__name__}[{kind._length_}]" if issubclass(kind, ctypes.Array) else kind.__name__


@pytest.mark.parametrize("name", STRUCTS)
def test_structures_are_those_of_the_header(name: str) -> None:
    struct = getattr(native, "".join(word.capitalize() for word in name.split("_")) + "Args")
    expected = [(field, shape_of(kind)) for field, kind in fields(STRUCTS[name])]
    assert [(field, shape_of(kind)) for field, kind in struct._fields_] == expected


def test_every_function_of_the_header_has_a_prototype() -> None:
    assert len(FUNCTIONS) > 20
    assert set(FUNCTIONS) - ELSEWHERE == set(native.PROTOTYPES)


@pytest.mark.parametrize("name", native.PROTOTYPES)
def test_prototypes_are_those_of_the_header(name: str) -> None:
    result, arguments = FUNCTIONS[name]
    expected = [ctypes.c_void_p if "*" in part else TYPES[part.split()[0]] for part in arguments]
    assert native.PROTOTYPES[name] == (TYPES[result.strip()], tuple(expected))


def test_the_abi_version_is_that_of_the_header() -> None:
    assert re.search(r"#define KRASIS_CUDA_ABI_VERSION (\d+)", text())[1] == str(ABI_VERSION)


def test_the_planner_knows_the_size_of_a_chunk() -> None:
    sizes = dict(re.findall(r"#define KRASIS_CUDA_DELTA_(\w+) (\d+)", text()))
    assert sizes == {"CHUNK": str(DELTA_CHUNK_TOKENS), "CHUNK_BYTES": str(DELTA_CHUNK_BYTES)}


def test_a_missing_function_is_an_error_when_asked_for(double_is_built: None) -> None:
    library = ctypes.CDLL(None)
    with pytest.raises(NativeError, match="krasis_cuda_moe_gemm"):
        native.cuda_prototype(library, "moe_gemm")
    with pytest.raises(NativeError, match="krasis_cuda_nothing"):
        native.cuda_prototype(double_library(), "nothing")


def test_status_codes_become_errors(double_is_built: None) -> None:
    check_status(double_library(), 0, "krasis_cuda_x")
    with pytest.raises(NativeError, match="multiple of the layout's tile"):
        check_status(double_library(), 2, "krasis_cuda_x")


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KRASIS_CUDA_LIB", str(tmp_path / "none.so"))
    with pytest.raises(NativeError, match=r"none\.so"):
        device_library.cuda_library.__wrapped__()
    (tmp_path / "none.so").write_bytes(b"not a library")
    with pytest.raises(NativeError, match="cannot be loaded"):
        device_library.cuda_library.__wrapped__()
