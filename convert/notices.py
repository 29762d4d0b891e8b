"""What the choice of inputs means for quality, said plainly before the work."""

from __future__ import annotations

from collections.abc import Iterator

from krasis.convert.convertible import kernels_note
from krasis.convert.kept_codes import kept_codes
from krasis.convert.opening import OpenInputs
from krasis.convert.plan import ConversionPlan, rounds_mxfp4
from krasis.convert.source_types import dense_types, quantised_types


def _gpu_codes(plan: ConversionPlan) -> Iterator[str]:
    """What becomes of a source's symmetric codes of 4 bits on the GPU."""
    settings, group = plan.settings, kept_codes(plan.gpu_source).group
    if group is None or settings.layouts().get("gpu", "")[:11] != "marlin-u4b8":
        return
    packed = settings.gpu_group
    if isinstance(packed, int) and group % packed == 0:
        is_f16 = settings.gpu_scales == "f16"
        other = "" if is_f16 else " (--gpu-scales f16 for a source that has them in F16)"
        yield f"the GPU experts keep the source's 4-bit codes, with scales in {settings.gpu_scales}{other}"
    else:
        yield (
            f"the GPU experts are rounded a second time: the source has a scale for {group} weights, the "
            f"bundle for {packed or 'all of a row'}; without --gpu-group they keep their codes"
        )


def notices(plan: ConversionPlan, inputs: OpenInputs) -> Iterator[str]:
    """One sentence each."""
    yield from inputs.notes
    yield from _gpu_codes(plan)
    settings, cpu = plan.settings, plan.settings.cpu_layout
    if (note := kernels_note(plan.spec, settings.tiers)) is not None:
        yield note
    if rounds_mxfp4(plan.spec, settings):
        yield (
            "the GPU experts of a model that was released in MXFP4 are rounded a second time, to other 4 "
            "bits: --gpu-format mxfp4, the default without other settings of theirs, keeps them"
        )
    gguf_types = plan.cpu_source.expert_types() if plan.cpu_source.kind == "gguf" else ()
    rounded = ", ".join(quantised_types(gguf_types))
    anew = [one for one in quantised_types(gguf_types) if settings.gpu_layout.accepts(one) != "as is"]
    if inputs.hf is None and anew and "gpu" in settings.tiers:
        yield (
            f"without a BF16 checkpoint the GPU experts are made from the GGUF's {', '.join(anew)} weights: "
            f"their rounding comes on top of that to {settings.gpu_bits} bits. For best quality give both"
        )
    rounded_dense = ", ".join(quantised_types(dense_types(plan.dense_source)))
    if inputs.hf is None and rounded_dense:
        yield (
            f"without a BF16 checkpoint attention and output head are made from the GGUF's {rounded_dense} "
            "weights and rounded again, to 8 bits"
        )
    codes = kept_codes(plan.cpu_source)
    if inputs.gguf is None and "cpu" in settings.tiers and codes.mxfp4 and cpu.accepts("MXFP4") == "as is":
        yield "the checkpoint's MXFP4 experts are kept as they are, without loss"
    elif inputs.gguf is None and "cpu" in settings.tiers and codes.group and settings.cpu_format == "int4":
        yield "the checkpoint's 4-bit experts keep their codes and scales on the CPU (--cpu-format int4)"
    elif inputs.gguf is None and "cpu" in settings.tiers:
        what = "8-bit blocks (as good as a Q8_0 GGUF)" if cpu.bits == 8 else f"{cpu.bits} bits"
        yield f"without a GGUF the CPU experts are made from the checkpoint, rounded to {what}"
    if "cpu" in settings.tiers and gguf_types:
        kept = {"Q4_0"} if settings.cpu_format == "int4" else set()
        again = sorted(
            one for one in set(quantised_types(gguf_types)) - kept if cpu.accepts(one) == "decoded"
        )
        if again:
            to = "8-bit blocks" if cpu.bits == 8 else f"{cpu.bits} bits"
            yield f"the GGUF's {', '.join(again)} experts are dequantised and rounded again, to {to}"
        elif rounded:
            yield f"the GGUF's {rounded} experts are kept as they are, without loss"
    if "tokenizer.json" not in inputs.assets:
        yield (
            "there is no tokenizer among the inputs: the bundle will take token ids only, until "
            "krasis-convert --refresh-text gives it one"
        )
