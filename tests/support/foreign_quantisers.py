"""Weights quantised by the libraries that people quantise with: what they write, and what they make of it.

``python -m tests.support.foreign_quantisers`` writes the vectors of tests/assets/quantised with the libraries
that are there (compressed-tensors, nvidia-modelopt, gptqmodel, autoawq; transformers).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

Tensors = dict[str, Any]
ASSETS = Path(__file__).parent.parent / "assets" / "quantised"


@dataclass(frozen=True, slots=True)
class Written:
    """tensors: by what stands behind the module's name. expected: float32, what the library makes of them
    itself. settings: of the checkpoint.
    """

    settings: dict[str, Any]
    tensors: Tensors
    expected: Any
    library: str


def compressed(
    form: str, *, bits: int, kind: str, dtype: str = "bfloat16", **arguments: Any
) -> Callable[[Any], Written]:
    """A writer of compressed-tensors."""

    def write(weight: Any) -> Written:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        args = QuantizationArgs(num_bits=bits, type=kind, **arguments)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        state = {"weight": weight, **_scales(weight, args, getattr(torch, dtype))}
        compressor = BaseCompressor.get_value_from_registry(form)
        packed = compressor.compress(dict(state), scheme)
        expected = _decompressed(packed, compressor, scheme)
        weights = json.loads(args.model_dump_json())
        group = {"targets": ["Linear"], "weights": weights, "format": form}
        settings = {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
        return Written(settings, packed, expected, "compressed-tensors")

    return write


def _decompressed(packed: Tensors, compressor: Any, scheme: Any) -> Any:
    """In float32: the library multiplies in 16 bits, which rounds."""
    if "weight_global_scale" in packed:
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
        from compressed_tensors.quantization.lifecycle.forward import dequantize

        n, k = packed["weight_packed"].shape
        return dequantize(
            x_q=unpack_fp4_from_uint8(packed["weight_packed"], n, 2 * k, dtype=torch.float32),
            scale=packed["weight_scale"].float(),
            args=scheme.weights,
            global_scale=packed["weight_global_scale"],
            dtype=torch.float32,
        )
    halves = (torch.bfloat16, torch.float16)
    wide = {name: one.float() if one.dtype in halves else one for name, one in packed.items()}
    return compressor.decompress(wide, scheme)["weight"].float()


def _scales(weight: Any, args: Any, dtype: Any) -> Tensors:
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    n, k = weight.shape
    state: Tensors = {}
    if args.strategy == "block":
        rows, columns = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
        blocks = padded.reshape(-(-n // rows), rows, -(-k // columns), columns).permute(0, 2, 1, 3).flatten(2)
    elif args.strategy in ("group", "tensor_group"):
        blocks = weight.reshape(n, k // args.group_size, args.group_size)
    else:
        blocks = weight.reshape(1 if args.strategy == "tensor" else n, 1, -1)
    least, most = blocks.amin(-1), blocks.amax(-1)
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax())
    if args.strategy == "tensor":
        least, most = least.reshape(1), most.reshape(1)
    scale, zero = calculate_qparams(least, most, args, state.get("weight_global_scale"))
    is_mx = args.type == "float" and args.strategy == "group"
    keep = is_mx or args.strategy == "tensor_group"
    state["weight_scale"] = scale if keep else scale.to(dtype)
    if not args.symmetric:
        state["weight_zero_point"] = zero
    return state


def fp8_blocks(weight: Any, scale_fmt: str | None = None) -> Written:
    """transformers' fine-grained FP8, as DeepSeek and Qwen release it."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    if scale_fmt is not None:
        settings["scale_fmt"] = scale_fmt
    config = SimpleNamespace(weight_block_size=[128, 128], scale_fmt=scale_fmt)
    quantizer = SimpleNamespace(quantization_config=config)
    tensors = Fp8Quantize(quantizer)._quantize_one("weight", weight)
    expected = Fp8Dequantize(quantizer)._dequantize_one(
        tensors["weight"], tensors["weight_scale_inv"].float(), torch.float32
    )
    return Written(settings, tensors, expected, "transformers")


def fp4_blocks(weight: Any) -> Written:
    """gpt-oss' MXFP4, of random codes: transformers alone reads it without a GPU."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    n, k = weight.shape
    generator = torch.Generator().manual_seed(n)
    blocks = torch.randint(0, 256, (2, n, k // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 130, (2, n, k // 32), generator=generator, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2).contiguous()
    return Written(
        {"quant_method": "mxfp4"},
        {"weight_blocks": blocks, "weight_scales": scales},
        expected,
        "transformers",
    )


def fp8_experts_of_fp4(weight: Any) -> Written:
    """DeepSeek's experts, of random codes: transformers alone reads them."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    n, k = weight.shape
    generator = torch.Generator().manual_seed(n)
    codes = torch.randint(-128, 128, (n, k // 2), generator=generator, dtype=torch.int8)
    exponents = torch.randint(110, 130, (n, k // 32), generator=generator, dtype=torch.uint8)
    scales = exponents.view(torch.float8_e8m0fnu)
    expected = Fp8Dequantize(SimpleNamespace())._dequantize_one(codes, scales.float(), torch.float32)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    return Written(settings, {"weight": codes, "scale": scales}, expected, "transformers")


def modelopt_nvfp4(weight: Any) -> Written:
    """NVIDIA ModelOpt's NVFP4."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    packed, scale, scale_2 = NVFP4QTensor.quantize(weight, 16)
    expected = packed.dequantize(dtype=torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
    tensors = {"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": scale_2}
    return Written(_modelopt("NVFP4"), tensors, expected, "nvidia-modelopt")


def modelopt_fp8(weight: Any) -> Written:
    """NVIDIA ModelOpt's FP8 by tensor."""
    from modelopt.torch.quantization.qtensor import FP8QTensor

    packed, scale = FP8QTensor.quantize(weight)
    expected = packed.dequantize(dtype=torch.float32, scale=scale)
    tensors = {
        "weight": packed._quantized_data,
        "weight_scale": scale.float(),
        "input_scale": torch.tensor(0.5),
    }
    return Written(_modelopt("FP8"), tensors, expected, "nvidia-modelopt")


def modelopt_mxfp8(weight: Any) -> Written:
    """NVIDIA ModelOpt's MXFP8."""
    from modelopt.torch.quantization.qtensor import MXFP8QTensor

    packed, scale = MXFP8QTensor.quantize(weight)
    expected = packed.dequantize(dtype=torch.float32, scale=scale)
    return Written(
        _modelopt("MXFP8"),
        {"weight": packed._quantized_data, "weight_scale": scale},
        expected,
        "nvidia-modelopt",
    )


def _modelopt(algorithm: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}


def gptq(
    bits: int = 4, *, symmetric: bool = True, act_order: bool = False, v2: bool = False, group: int = 64
) -> Callable[[Any], Written]:
    """GPTQModel's packing of plainly rounded weights."""

    def write(weight: Any) -> Written:
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

        n, k = weight.shape
        order = torch.arange(k) // group
        if act_order:
            order = order[torch.randperm(k, generator=torch.Generator().manual_seed(3))]
        scales, zeros = _rounded(weight, order, k // group, bits, symmetric=symmetric)
        linear = torch.nn.Linear(k, n, bias=False)
        linear.weight.data = weight
        packed = TorchLinear(
            bits=bits,
            group_size=group,
            sym=symmetric,
            desc_act=act_order,
            in_features=k,
            out_features=n,
            bias=False,
            pack_dtype=torch.int32,
        )
        packed.pack_original(linear, scales.T.contiguous(), zeros.T.contiguous(), order.to(torch.int32))
        codes, points, kept = packed.qweight.clone(), packed.qzeros.clone(), packed.scales.clone()
        packed.scales.data = packed.scales.float()  # it multiplies in their type
        packed.post_init()
        expected = packed.dequantize_weight().T.contiguous()
        packed.qzeros.data = points.clone()
        if not v2:
            convert_gptq_v2_to_v1_format_module(packed, packed)
            points = packed.qzeros
        settings = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "sym": symmetric,
            "desc_act": act_order,
            "checkpoint_format": "gptq_v2" if v2 else "gptq",
        }
        tensors = {"qweight": codes, "qzeros": points, "scales": kept, "g_idx": order.to(torch.int32)}
        return Written(settings, tensors, expected, "gptqmodel")

    return write


def awq(weight: Any) -> Written:
    """AutoAWQ's GEMM form."""
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    group = 64
    n, k = weight.shape
    order = torch.arange(k) // group
    scales, zeros = _rounded(weight, order, k // group, 4, symmetric=False)
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = weight.clone()
    packed = WQLinear_GEMM.from_linear(linear, 4, group, scales=scales.half(), zeros=zeros)
    expected = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales.float(), 4, group)
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    tensors = {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales}
    return Written(settings, tensors, expected.T.contiguous().float(), "autoawq")


def _rounded(weight: Any, order: Any, num_groups: int, bits: int, *, symmetric: bool) -> tuple[Any, Any]:
    """(scales, zero points), each [groups, n]."""
    scales, zeros = [], []
    for group in range(num_groups):
        part = weight[:, order == group]
        most, least = part.amax(1).clamp(min=0), part.amin(1).clamp(max=0)
        if symmetric:
            scale = torch.maximum(most, -least) / (2 ** (bits - 1) - 1)
            zero = torch.full_like(scale, 2 ** (bits - 1))
        else:
            scale = (most - least) / (2**bits - 1)
            zero = torch.round(-least / scale).clamp(0, 2**bits - 1)
        scales.append(scale.half().float())
        zeros.append(zero)
    return torch.stack(scales), torch.stack(zeros)


WRITERS: dict[str, Callable[[Any], Written]] = {
    "fp8-blocks": fp8_blocks,
    "fp8-blocks-ue8m0": lambda weight: fp8_blocks(weight, "ue8m0"),
    "fp8-experts-of-fp4": fp8_experts_of_fp4,
    "mxfp4-blocks": fp4_blocks,
    "modelopt-fp8": modelopt_fp8,
    "modelopt-mxfp8": modelopt_mxfp8,
    "modelopt-nvfp4": modelopt_nvfp4,
    "ct-fp8-tensor": compressed("float-quantized", bits=8, kind="float", strategy="tensor"),
    "ct-fp8-channel": compressed("float-quantized", bits=8, kind="float", strategy="channel"),
    "ct-fp8-block": compressed(
        "float-quantized", bits=8, kind="float", strategy="block", block_structure=[128, 128]
    ),
    "ct-mxfp8": compressed(
        "mxfp8-quantized", bits=8, kind="float", strategy="group", group_size=32, scale_dtype="torch.uint8"
    ),
    "ct-int8-channel": compressed("int-quantized", bits=8, kind="int", strategy="channel"),
    "ct-int8-channel-asym": compressed(
        "int-quantized", bits=8, kind="int", strategy="channel", symmetric=False
    ),
    "ct-int4-g32": compressed("pack-quantized", bits=4, kind="int", strategy="group", group_size=32),
    "ct-int4-g128-asym": compressed(
        "pack-quantized", bits=4, kind="int", strategy="group", group_size=128, symmetric=False
    ),
    "ct-int4-channel": compressed("pack-quantized", bits=4, kind="int", strategy="channel"),
    "ct-int8-g64": compressed("pack-quantized", bits=8, kind="int", strategy="group", group_size=64),
    "ct-nvfp4": compressed(
        "nvfp4-pack-quantized", bits=4, kind="float", strategy="tensor_group", group_size=16
    ),
    "ct-mxfp4": compressed(
        "mxfp4-pack-quantized",
        bits=4,
        kind="float",
        strategy="group",
        group_size=32,
        scale_dtype="torch.uint8",
    ),
    "gptq": gptq(),
    "gptq-act-order": gptq(act_order=True),
    "gptq-asym-v1": gptq(symmetric=False),
    "gptq-asym-v2": gptq(symmetric=False, v2=True),
    "gptq-8bit": gptq(8),
    "gptq-2bit": gptq(2, symmetric=False),
    "awq": awq,
}


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:  # its sources alone are on the path
        module = {"autoawq": "awq"}.get(library, library)
        return str(importlib.import_module(module).__version__)


def main() -> None:
    """Writes one file for each of the formats named, or for all."""
    from safetensors.torch import save_file

    for name in sys.argv[1:] or WRITERS:
        n, k = (256, 128) if name.startswith("fp8-blocks") else (136, 160) if "block" in name else (32, 256)
        weight = 0.05 * torch.randn(n, k, generator=torch.Generator().manual_seed(len(name)))
        written = WRITERS[name](weight)
        version = f"{written.library} {_version(written.library)}"
        tensors = {f"m.{part}": one.contiguous() for part, one in written.tensors.items()}
        fits = written.expected.shape == weight.shape
        error = (written.expected - weight).square().mean() / weight.square().mean() if fits else 0.0
        tensors["expected"] = written.expected.float().contiguous()
        metadata = {"settings": json.dumps(written.settings), "library": version}
        save_file(tensors, ASSETS / f"{name}.safetensors", metadata)
        print(f"{name}: {version}, relative squared error {error:.2e}")


if __name__ == "__main__":
    main()
