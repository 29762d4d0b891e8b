"""Numbers of tensor types that other programs write into GGUF files and that no reader here knows, by name.

From ggml's and ik_llama.cpp's public headers (ggml/include/ggml.h, ik_llama.cpp of August 2026).
"""

from __future__ import annotations

_IK = """36 I2_S, 97 Q8_0_X4, 98 Q8_1_X4, 99 Q8_2_X4, 133 Q6_0, 134 IQ1_BN, 135 IQ2_BN, 136 Q8_K64, 137 IQ2_K,
138 IQ3_K, 139 IQ4_K, 140 IQ5_K, 141 IQ6_K, 142 IQ2_TN, 143 IQ1_TN, 144 IQ4_KS, 145 IQ2_KS, 146 IQ4_KSS,
147 Q8_K16, 148 Q8_K32, 149 Q8_KR8, 150 Q8_K128, 151 Q8_KV, 152 IQ5_KS, 153 IQ2_KT, 154 IQ3_KT, 155 IQ4_KT,
156 IQ3_KS, 157 IQ2_KL, 158 IQ1_KT, 202 Q4_0_R8, 206 Q5_0_R4, 208 Q8_0_R8, 210 Q2_K_R4, 211 Q3_K_R4,
212 Q4_K_R4, 213 Q5_K_R4, 214 Q6_K_R4, 216 IQ2_XXS_R4, 217 IQ2_XS_R4, 218 IQ3_XXS_R4, 219 IQ1_S_R4,
220 IQ4_NL_R4, 221 IQ3_S_R4, 222 IQ2_S_R4, 223 IQ4_XS_R8, 229 IQ1_M_R4, 230 BF16_R16, 233 Q6_0_R4,
335 IQ2_BN_R4, 337 IQ2_K_R4, 338 IQ3_K_R4, 339 IQ4_K_R4, 340 IQ5_K_R4, 344 IQ4_KS_R4, 352 IQ5_KS_R4,
353 MXFP4_R8, 397 Q8_K_R16, 398 Q8_KV_R8, 399 Q8_K_R8"""
_NEWER = "42 Q2_0"
_REMOVED = "4 Q4_2, 5 Q4_3, 31 Q4_0_4_4, 32 Q4_0_4_8, 33 Q4_0_8_8, 37 IQ4_NL_4_8, 38 IQ4_NL_8_8"


def _table(text: str) -> dict[int, str]:
    return {int(number): name for number, name in (item.split() for item in text.split(","))}


IK_TYPES = _table(_IK)
REMOVED_TYPES = _table(_REMOVED)
NEWER_TYPES = _table(_NEWER)
_NEWEST_OF_GGML = 96  # above the numbers that ggml has given so far, below all of ik_llama.cpp's own
INSTEAD = "another quantisation of the model (Q8_0 is kept without loss), or its BF16 checkpoint"


def explain_type(number: int) -> tuple[str, str]:
    """(what a type number that is not known here is, what to do about it)."""
    name = IK_TYPES.get(number)
    if name is not None:
        packed = name.rpartition("_R")[2].isdecimal()
        also = ", repacked for one kind of CPU" if packed else ""
        return f"tensor type {name} is ik_llama.cpp's own{also}, not one of llama.cpp's", f"take {INSTEAD}"
    name = REMOVED_TYPES.get(number)
    if name is not None:
        return f"tensor type {name} was removed from llama.cpp", f"take {INSTEAD}"
    name = NEWER_TYPES.get(number)
    if name is not None:
        return f"tensor type {name} is llama.cpp's, but nothing here decodes it yet", f"take {INSTEAD}"
    if number <= _NEWEST_OF_GGML:
        hint = f"it may be newer than the installed gguf package (pip install -U gguf); or take {INSTEAD}"
        return f"tensor type {number} is not known to this program", hint
    return (
        f"tensor type {number} is none of llama.cpp's",
        f"the file is of another program or damaged: take {INSTEAD}",
    )
