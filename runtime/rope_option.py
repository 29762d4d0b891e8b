"""``--rope-scaling``: a rotary scaling for a bundle that was made without one, or with another."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

from krasis.formats.architecture_record import Architecture, RopeScaling, check_architecture
from krasis.formats.errors import KrasisError, UsageError
from krasis.formats.models import rope
from krasis.formats.models.mixers import Attention, CompressedAttention, LatentAttention
from krasis.formats.models.spec import Layer, ModelSpec

OPTION = "--rope-scaling"
_HINT = "write none, linear,FACTOR or yarn,FACTOR,ORIGINAL, such as yarn,4,32768"
_NAMED = ("attention_factor", "beta_fast", "beta_slow")


def parse_rope_scaling(text: str) -> RopeScaling:
    """``none``, ``linear,FACTOR`` or ``yarn,FACTOR[,ORIGINAL][,NAME=X]``, NAME one of YaRN's
    attention_factor, beta_fast and beta_slow.

    Without ORIGINAL, original_max_positions is 0: the model's own. Raises UsageError for anything else.
    """
    kind, *rest = [part.strip() for part in text.split(",")]
    plain = [part for part in rest if "=" not in part]
    named = [part.partition("=") for part in rest if "=" in part]
    most = {"none": 0, "linear": 1, "yarn": 2}.get(kind)
    if most is None or len(plain) > most or (most and not plain) or (named and kind != "yarn"):
        raise UsageError(f"{OPTION} cannot be read", got=text, hint=_HINT)
    if kind == "none":
        return RopeScaling()
    names = [name.strip() for name, _, _ in named]
    if len(set(names)) != len(names) or not set(names) <= set(_NAMED):
        raise UsageError(f"{OPTION} cannot be read", got=text, limit=", ".join(_NAMED), hint=_HINT)
    settings = {name: _number(value, name) for name, (_, _, value) in zip(names, named, strict=True)}
    factor = _number(plain[0], "factor")
    if factor < 1.0:
        raise UsageError(f"the factor of {OPTION} is out of range", got=plain[0], limit="1 or more")
    original = _number(plain[1], "original length") if len(plain) > 1 else 0.0
    if not original.is_integer() or (len(plain) > 1 and not 1 <= original < 2**31):
        raise UsageError(f"the original length of {OPTION} is no number of tokens", got=plain[1], hint=_HINT)
    return RopeScaling(
        kind,
        factor,
        int(original),
        attention_factor=settings.get("attention_factor"),
        beta_fast=settings.get("beta_fast", 32.0),
        beta_slow=settings.get("beta_slow", 1.0),
    )


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"the {what} of {OPTION} is no number", got=text, hint=_HINT)
    return value


def rescaled(architecture: Architecture, scaling: RopeScaling, where: str = "") -> Architecture:
    """The model with that scaling instead of its own. Raises UsageError for an original length or a setting
    that the model cannot have.
    """
    scaling, positions = _fitted(architecture.rope_scaling, architecture.max_positions, scaling, where)
    changed = replace(architecture, rope_scaling=scaling, max_positions=positions)
    try:
        check_architecture(changed, where)
    except KrasisError as error:
        raise _out_of_range(error) from error
    return changed


def rescaled_model(spec: ModelSpec, scaling: RopeScaling, where: str = "") -> ModelSpec:
    """The same for any model: every layer that rotates is scaled so."""
    scaling, positions = _fitted(spec.rope_scaling, spec.max_positions, scaling, where)
    try:
        new = rope.RopeScaling.from_json(asdict(scaling), where)
    except KrasisError as error:
        raise _out_of_range(error) from error
    layers: dict[Layer, Layer] = {}
    for layer in dict.fromkeys(spec.layers):
        mixer = layer.mixer
        if isinstance(mixer, Attention | LatentAttention | CompressedAttention) and mixer.rope is not None:
            scaled = replace(mixer, rope=replace(mixer.rope, scaling=new))
            index = mixer.selection
            if index is not None and index.rope is not None:  # it turns by the same angles
                index = replace(index, rope=replace(index.rope, scaling=new))
                scaled = replace(scaled, selection=index)
            layers[layer] = replace(layer, mixer=scaled)
        else:
            layers[layer] = layer
    return replace(spec, layers=tuple(layers[layer] for layer in spec.layers), max_positions=positions)


def _fitted(
    own: RopeScaling | rope.RopeScaling, positions: int, scaling: RopeScaling, where: str
) -> tuple[RopeScaling, int]:
    """The scaling with its original length, and the positions that the model has without its own."""
    if own.kind == "yarn" and positions >= int(own.original_max_positions * own.factor):
        positions = own.original_max_positions  # the others were its own scaling's
    if scaling.kind == "yarn" and not scaling.original_max_positions:
        scaling = replace(scaling, original_max_positions=positions)
    if scaling.kind == "yarn" and scaling.original_max_positions > positions:
        raise UsageError(
            f"the original length of {OPTION} is more than the model was made for",
            where=where,
            got=scaling.original_max_positions,
            limit=positions,
            hint="give the length of its training",
        )
    return scaling, positions


def _out_of_range(error: KrasisError) -> UsageError:
    return UsageError(
        f"{OPTION} is out of range: {error.what}", where=error.where, got=error.got, limit=error.limit
    )
