"""The ctypes structures of the CPU library against the words of csrc/krasis.h."""

from __future__ import annotations

import ctypes
import re

import pytest
from c_headers import header_text

from krasis.formats import native as formats_native
from krasis.formats.layouts import native_pack
from krasis.runtime.cpu import mamba_kernels, native
from krasis.runtime.host import environment
from scripts import profile_threads

TYPES = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "char": ctypes.c_char,
}
STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "cpu_info": environment._CpuInfo,
    "numa_cpu": native.NumaCpu,
    "pack_stats": native_pack._Stats,
    "acts": native.ActsStruct,
    "moe_args": native.MoeArgs,
    "qkv_args": native.QkvArgs,
    "attention_args": native.AttentionArgs,
    "latent_args": native.LatentArgs,
    "index_args": native.IndexArgs,
    "choose_args": native.ChooseArgs,
    "span": native.SpanStruct,
    "route_args": native.RouteArgs,
    "activation_args": native.ActivationArgs,
    "add_rows_args": native.AddRowsArgs,
    "gated_delta_args": native.GatedDeltaArgs,
    "short_conv_args": native.ShortConvArgs,
    "mamba2_args": mamba_kernels.Mamba2Args,
    "pool_times": profile_threads.PoolTimes,
}


def text() -> str:
    return header_text("krasis.h")


def structs() -> dict[str, str]:
    """Body of every structure, by its name without krasis_."""
    return dict(re.findall(r"typedef struct krasis_(\w+) \{(.*?)\} krasis_\w+;", text(), flags=re.S))


def fields(body: str) -> list[tuple[str, str]]:
    """(name, type) of the members in order; every pointer is a c_void_p."""
    found = []
    for declaration in filter(None, (part.strip() for part in body.split(";"))):
        kind, names = re.fullmatch(r"(?:const )?(\w+)\s*(.*)", declaration, flags=re.S).groups()
        for name in names.split(","):
            bare = re.search(r"(\w+)\s*(?:\[(\d+)\])?\s*$", name)
            one = ctypes.c_void_p if "*" in name else TYPES.get(kind, ctypes.c_void_p)
            found.append((bare[1], shape_of(one * int(bare[2]) if bare[2] else one)))
    return found


def shape_of(kind: type) -> str:
    return f"{kind._type_.__name__}[{kind._length_}]" if issubclass(kind, ctypes.Array) else kind.__name__


def test_every_structure_of_the_header_is_compared() -> None:
    assert set(structs()) == set(STRUCTURES)


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_are_those_of_the_header(name: str) -> None:
    found = [(field, shape_of(kind)) for field, kind in STRUCTURES[name]._fields_]
    assert found == fields(structs()[name])


def test_every_prototype_takes_as_many_arguments_as_the_header_says() -> None:
    functions = dict(re.findall(r"KRASIS_API [\w ]+?[ *]+(krasis_\w+)\((.*?)\);", text(), flags=re.S))
    for name, (_, arguments) in native._PROTOTYPES.items():
        assert len(arguments) == len(functions[name].split(",")), name


def enum(name: str) -> list[int]:
    """The values of an enum of the header, in order."""
    body = re.search(rf"typedef enum krasis_{name} \{{(.*?)\}}", text(), flags=re.S)[1]
    return [int(value) for value in re.findall(r"=\s*(\d+)", body)]


def test_words_of_records_are_the_enums_of_the_header() -> None:
    assert list(native.SCORE_CODES.values()) == enum("score")
    assert list(native.ACTIVATION_CODES.values()) == enum("activation")
    assert list(native.STYLE_CODES.values()) == enum("rope_style")
    assert [0, *native.NORM_CODES.values()] == enum("qk_norm")


def test_the_version_is_the_headers() -> None:
    assert re.search(r"#define KRASIS_ABI_VERSION (\d+)", text())[1] == str(formats_native.ABI_VERSION)
