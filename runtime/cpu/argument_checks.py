"""What the kernels' wrappers ask of arguments beyond shapes: see ``kernels``."""

from __future__ import annotations

from krasis.formats.errors import NativeError
from krasis.formats.layouts.cpu_tiles import BLOCK_K, TILE_BYTES, TILE_ROWS
from krasis.formats.layouts.native_pack import TILE_CODES
from krasis.formats.models.mlps import Activation
from krasis.runtime.cpu.acts import Acts
from krasis.runtime.cpu.native import ACTIVATION_CODES
from krasis.runtime.cpu.native_arrays import Array


def check_acts(acts: Acts | None, tokens: int, k: int, where: str) -> None:
    """Raises NativeError for acts that are not [tokens, k]."""
    if acts is not None and (acts.tokens != tokens or acts.k != k):
        raise NativeError("acts do not fit x", where=where, got=acts.q.shape, limit=(tokens, k))


def activation_code(activation: Activation, where: str) -> int:
    """The code of an activation. Raises NativeError for one that the kernels lack."""
    code = ACTIVATION_CODES.get(activation.kind)
    if code is None:
        raise NativeError("the CPU kernels lack this activation", where=where, got=activation.kind)
    return code


def check_blob(
    blob: Array,
    stride_bytes: int,
    tiles: str,
    hidden: int,
    intermediate: int,
    num_experts: int,
    gated: bool = True,
) -> None:
    """Raises NativeError for unknown tiles, or a blob that is shorter than its experts."""
    if tiles not in TILE_CODES:
        raise NativeError("unknown tiles", where="moe.tiles", got=tiles, limit=", ".join(TILE_CODES))
    need_bytes = (3 if gated else 2) * hidden * intermediate // (TILE_ROWS * BLOCK_K) * TILE_BYTES[tiles]
    if stride_bytes < need_bytes:
        raise NativeError("expert record is too short", where="moe", got=stride_bytes, limit=need_bytes)
    if num_experts * stride_bytes > blob.nbytes:
        raise NativeError(
            "blob is too short", where="moe.blob", got=blob.nbytes, limit=num_experts * stride_bytes
        )
