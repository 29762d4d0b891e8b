"""Element types by their safetensors names. NumPy has no bfloat16: BF16 travels as uint16 bit patterns."""

from __future__ import annotations

import numpy as np

# Bytes an element, of every type a checkpoint may hold (only some of them are ever converted).
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
}

# The types that occur in bundles, and what a view of them is in NumPy.
BUNDLE_DTYPES: dict[str, np.dtype[np.generic]] = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
}

NUMPY_DTYPES: dict[str, np.dtype[np.generic]] = {
    **BUNDLE_DTYPES,
    "BOOL": np.dtype(np.bool_),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
