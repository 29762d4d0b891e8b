"""One checked Python call per native compute function. NumPy only: torch is never imported here.

Every method checks shapes, dtypes and contiguity, and makes a ``Call`` of ``libkrasis_cpu``, which is run at
once or, where a ``Program`` was given, added to it. A status other than 0 becomes an error (NativeError for
arguments, ResourceError for memory). T: tokens of a call; T = 0 does nothing. A ``Kernels`` belongs to one
thread at a time, as its pool does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from krasis.formats.errors import NativeError
from krasis.formats.layouts import STRIP_ROWS
from krasis.formats.layouts.native_pack import TILE_CODES
from krasis.formats.models.mlps import Activation, Router
from krasis.formats.native import Pool, check
from krasis.runtime.cpu.acts import Acts
from krasis.runtime.cpu.argument_checks import activation_code, check_acts, check_blob
from krasis.runtime.cpu.heads import Heads, QkNorms, Rotation
from krasis.runtime.cpu.native import (
    KV_CODES,
    NORM_CODES,
    SCORE_CODES,
    STYLE_CODES,
    ActivationArgs,
    AddRowsArgs,
    AttentionArgs,
    MoeArgs,
    QkvArgs,
    RouteArgs,
    prototype,
)
from krasis.runtime.cpu.native_arrays import (
    F16,
    F32,
    I8,
    I32,
    U8,
    U16,
    Array,
    out_pointer,
    pointer,
    shape_2d,
)
from krasis.runtime.cpu.program import Call, NativeFunction, Program
from krasis.runtime.cpu.spans import LayerCache, Spans
from krasis.runtime.cpu.workspaces import attention_workspace_bytes, moe_workspace_bytes, workspace

__all__ = ["Acts", "Heads", "Kernels", "NativeFunction"]
__all__ += ["attention_workspace_bytes", "moe_workspace_bytes", "workspace"]

Wrap = Callable[[str, NativeFunction], NativeFunction]
_SILU = Activation()


class Kernels:
    """The native compute functions on one pool. program: takes the calls instead of their being run."""

    __slots__ = ("_functions", "_program", "_wrap", "pool")

    def __init__(self, pool: Pool, program: Program | None = None) -> None:
        self.pool = pool
        self._program = program
        self._functions: dict[str, NativeFunction] = {}
        self._wrap: Wrap | None = None

    def watch(self, wrap: Wrap) -> None:
        """Every native function is called through wrap(name, function) from now on: for profiles."""
        self._wrap = wrap
        self._functions.clear()

    def quantize(self, x: Array, acts: Acts) -> None:
        """acts = int8 form of x, float32 [T, k]."""
        address = pointer(x, acts.q.shape, F32, "quantize.x")
        self._make("krasis_quantize_acts", (address, acts.k, acts.ref), x, acts)

    def rms_norm(
        self, x: Array, weight: Array, eps: float, out: Array | None = None, acts: Acts | None = None
    ) -> None:
        """out and/or acts = x / rms(x) * weight; x, out float32 [T, k] (out may be x), weight float32 [k]."""
        tokens, k = shape_2d(x, "rms_norm.x")
        check_acts(acts, tokens, k, "rms_norm")
        arguments = (
            pointer(x, (tokens, k), F32, "rms_norm.x"),
            tokens,
            k,
            pointer(weight, (k,), F32, "rms_norm.weight"),
            eps,
            None if out is None else out_pointer(out, (tokens, k), F32, "rms_norm.out"),
            None if acts is None else acts.ref,
        )
        self._make("krasis_rms_norm", arguments, x, weight, out, acts)

    def gemm_int8_rows(
        self, acts: Acts, weight: Array, scales: Array, out: Array, accumulate: bool = False
    ) -> None:
        """out [T, n] (+)= acts x weight^T; out, scales [n] float32; weight int8 [n/32, k/4, 32, 4]."""
        _, n = shape_2d(out, "gemm_int8_rows.out")
        arguments = (
            acts.ref,
            pointer(weight, (n // STRIP_ROWS, acts.k // 4, STRIP_ROWS, 4), I8, "gemm_int8_rows.weight"),
            pointer(scales, (n,), F32, "gemm_int8_rows.scales"),
            n,
            out_pointer(out, (acts.tokens, n), F32, "gemm_int8_rows.out"),
            n,
            1 if accumulate else 0,
        )
        self._make("krasis_gemm_int8_rows", arguments, acts, weight, scales, out)

    def gemm_float(self, x: Array, weight: Array, out: Array) -> None:
        """out [T, n] = x [T, k] x weight [n, k]^T in float32; weight float32, float16, or BF16 as uint16."""
        tokens, k = shape_2d(x, "gemm_float.x")
        n = shape_2d(weight, "gemm_float.weight")[0]
        kind = weight.dtype
        code = 0 if kind == F32 else 1 if kind == U16 else 2
        arguments = (
            pointer(x, (tokens, k), F32, "gemm_float.x"),
            tokens,
            k,
            pointer(weight, (n, k), (F32, U16, F16)[code], "gemm_float.weight"),
            code,
            n,
            out_pointer(out, (tokens, n), F32, "gemm_float.out"),
        )
        self._make("krasis_gemm_float", arguments, x, weight, out)

    def route(
        self,
        logits: Array,
        router: Router,
        ids: Array,
        weights: Array,
        bias: Array | None = None,
        correction_bias: Array | None = None,
        expert_scale: Array | None = None,
    ) -> None:
        """ids int32, weights float32 [T, top_k]: the experts that router chooses by logits [T, experts].

        bias, correction_bias, expert_scale: float32 [experts], given exactly where the router has them.
        """
        tokens, count = shape_2d(logits, "route.logits")
        if router.by_token or router.score not in SCORE_CODES:
            raise NativeError("the CPU kernels cannot choose so", where="route.router", got=router)
        parts = {"bias": bias, "correction_bias": correction_bias, "expert_scale": expert_scale}
        args = RouteArgs(
            logits=pointer(logits, (tokens, count), F32, "route.logits"),
            tokens=tokens,
            num_experts=count,
            top_k=router.top_k,
            score=SCORE_CODES[router.score],
            renormalise=router.renormalise,
            groups=router.groups,
            top_groups=router.top_groups,
            group_score=0 if router.group_score == "best_two" else 1,
            logit_cap=router.logit_cap or 0.0,
            sum_floor=router.sum_floor,
            sum_epsilon=router.sum_epsilon,
            scale=router.scale,
            ids=out_pointer(ids, (tokens, router.top_k), I32, "route.ids"),
            weights=out_pointer(weights, (tokens, router.top_k), F32, "route.weights"),
        )
        for name, part in parts.items():
            if (part is not None) != getattr(router, name):
                raise NativeError("what the router has and what is given differ", where=f"route.{name}")
            setattr(args, name, _optional(part, (count,), f"route.{name}"))
        self._make("krasis_route", (ctypes.byref(args),), logits, ids, weights, *parts.values())

    def qk_norm_rope_store(
        self,
        qkv: Array,
        heads: Heads,
        spans: Spans,
        cache: LayerCache,
        rotation: Rotation | None,
        norms: QkNorms | None = None,
        bias: Array | None = None,
        clip: float | None = None,
        value_norm: bool = False,
    ) -> None:
        """qkv float32 [T, heads.qkv_size]: += bias; q and k normed (v by value_norm); all cut to +-clip; q, k
        rotated. q stays in qkv; k and v go to the layer's part of the memory of the spans' slots.
        """
        where, dim = "qk_norm_rope_store", heads.head_dim
        tokens, _ = shape_2d(qkv, f"{where}.qkv")
        spans.check_cache(cache, heads.num_kv_heads, dim, where)
        args = QkvArgs(
            qkv=out_pointer(qkv, (tokens, heads.qkv_size), F32, f"{where}.qkv"),
            tokens=tokens,
            bias=_optional(bias, (heads.qkv_size,), f"{where}.bias"),
            clip=clip or 0.0,
            shared_kv=heads.shared_kv,
            value_norm=value_norm,
        )
        if norms is not None:
            flat = norms.kind == "flat"
            shapes = [(n * dim if flat else dim,) for n in (heads.num_heads, heads.num_kv_heads)]
            args.norm, args.eps = NORM_CODES[norms.kind], norms.eps
            args.q_norm = pointer(norms.q, shapes[0], F32, f"{where}.q_norm")
            args.k_norm = pointer(norms.k, shapes[1], F32, f"{where}.k_norm")
        if rotation is not None:
            tables = shape_2d(rotation.cos, f"{where}.cos")
            args.cos = pointer(rotation.cos, tables, F32, f"{where}.cos")
            args.sin = pointer(rotation.sin, tables, F32, f"{where}.sin")
            args.max_positions, args.rotary_dims = tables[0], 2 * tables[1]
            args.rope_style = STYLE_CODES[rotation.style]
        _place(args, heads, spans, cache)
        self._make("krasis_qk_norm_rope_store", (ctypes.byref(args),), qkv, spans, rotation, norms, bias)

    def attention(
        self,
        q: Array,
        heads: Heads,
        spans: Spans,
        cache: LayerCache,
        scale: float,
        out: Array,
        scratch: Array,
        window: int | None = None,
        sinks: Array | None = None,
    ) -> None:
        """out float32 [T, output_size] = causal attention of each row over its slot's keys so far.

        q float32 [T, ldq >= attention_size], queries first (the fused qkv will do); scratch: ``workspace`` of
        ``attention_workspace_bytes`` or more; window: most keys that are seen; sinks: float32 [num_heads].
        """
        tokens, ldq = shape_2d(q, "attention.q")
        if ldq < heads.attention_size:
            raise NativeError("too few columns", where="attention.q", got=ldq, limit=heads.attention_size)
        spans.check_cache(cache, heads.num_kv_heads, heads.head_dim, "attention", heads.latent_values is None)
        args = AttentionArgs(
            q=pointer(q, (tokens, ldq), F32, "attention.q"),
            ldq=ldq,
            tokens=tokens,
            scale=scale,
            window=window or 0,
            sinks=_optional(sinks, (heads.num_heads,), "attention.sinks"),
            out=out_pointer(out, (tokens, heads.output_size), F32, "attention.out"),
            workspace=out_pointer(scratch, scratch.shape, U8, "attention.scratch"),
            workspace_bytes=scratch.nbytes,
            value_dim=heads.latent_values or 0,
        )
        _place(args, heads, spans, cache)
        self._make("krasis_attention", (ctypes.byref(args),), q, spans, out, scratch, sinks)

    def gated_activation(
        self, x: Array, activation: Activation, out: Array | None = None, acts: Acts | None = None
    ) -> None:
        """out float32 and/or acts [T, I] = activation of x float32 [T, 2 I], gates before ups ([T, I] without
        a gate); I % 16 == 0.
        """
        tokens, columns = shape_2d(x, "gated_activation.x")
        size = columns // 2 if activation.gated else columns
        check_acts(acts, tokens, size, "gated_activation")
        width = 2 * size if activation.gated else size
        args = ActivationArgs(
            x=pointer(x, (tokens, width), F32, "gated_activation.x"),
            tokens=tokens,
            intermediate=size,
            kind=activation_code(activation, "gated_activation"),
            limit=activation.limit,
            alpha=activation.alpha,
            out=None if out is None else out_pointer(out, (tokens, size), F32, "gated_activation.out"),
            acts=None if acts is None else acts.address,
        )
        self._make("krasis_gated_activation", (ctypes.byref(args),), x, out, acts)

    def add_rows(
        self,
        out: Array,
        x: Array | None = None,
        bias: Array | None = None,
        logits: Array | None = None,
        scale: float = 1.0,
    ) -> None:
        """out float32 [T, k] = scale (out + bias [k] + sigmoid(logits [T, 1]) x [T, k]), of what is given."""
        tokens, k = shape_2d(out, "add_rows.out")
        args = AddRowsArgs(
            out=out_pointer(out, (tokens, k), F32, "add_rows.out"),
            tokens=tokens,
            k=k,
            bias=_optional(bias, (k,), "add_rows.bias"),
            x=_optional(x, (tokens, k), "add_rows.x"),
            logits=_optional(logits, (tokens, 1), "add_rows.logits"),
            scale=0.0 if scale == 1.0 else scale,
        )
        self._make("krasis_add_rows", (ctypes.byref(args),), out, x, bias, logits)

    def moe(
        self,
        blob: Array,
        expert_stride_bytes: int,
        tiles: str,
        acts: Acts,
        ids: Array,
        weights: Array,
        out: Array,
        intermediate: int,
        num_experts: int,
        scratch: Array,
        activation: Activation = _SILU,
        biases: tuple[Array, Array, Array] | None = None,
    ) -> int:
        """out float32 [T, hidden] += the routed experts of one layer. Returns how many pairs ran; those that
        a program's run must run.

        blob: uint8, num_experts records of expert_stride_bytes; tiles ``q8``, ``i4`` or ``mxfp4``; acts
        [T, hidden]; ids int32 and weights float32 [T, top_k]; scratch: ``workspace`` of
        ``moe_workspace_bytes`` or more; biases: float32 of gate, up [experts, I] and down [experts, hidden].
        """
        hidden = acts.k
        tokens, top_k = shape_2d(ids, "moe.ids")
        sizes = (hidden, intermediate, num_experts)
        check_blob(blob, expert_stride_bytes, tiles, *sizes, activation.gated)
        if tokens != acts.tokens:
            raise NativeError("ids do not fit acts", where="moe.ids", got=tokens, limit=acts.tokens)
        program = self._program or Program()
        args = MoeArgs(
            blob=pointer(blob, blob.shape, U8, "moe.blob"),
            expert_stride_bytes=expert_stride_bytes,
            tiles=TILE_CODES[tiles],
            activation=activation_code(activation, "moe"),
            limit=activation.limit,
            alpha=activation.alpha,
            num_experts=num_experts,
            hidden=hidden,
            intermediate=intermediate,
            top_k=top_k,
            acts=acts.address,
            ids=pointer(ids, (tokens, top_k), I32, "moe.ids"),
            weights=pointer(weights, (tokens, top_k), F32, "moe.weights"),
            out=out_pointer(out, (tokens, hidden), F32, "moe.out"),
            workspace=out_pointer(scratch, scratch.shape, U8, "moe.scratch"),
            workspace_bytes=scratch.nbytes,
            executed=program.executed_address,
        )
        if biases is not None:
            inner, outer = (num_experts, intermediate), (num_experts, hidden)
            args.gate_bias = pointer(biases[0], inner, F32, "moe.gate_bias")
            args.up_bias = pointer(biases[1], inner, F32, "moe.up_bias")
            args.down_bias = pointer(biases[2], outer, F32, "moe.down_bias")
        keeps = (blob, acts, ids, weights, out, scratch, biases)
        self._make("krasis_moe", (ctypes.byref(args),), *keeps, num_pairs=ids.size)
        return ids.size if self._program is not None else program.num_executed

    def call(self, name: str, arguments: tuple[object, ...], *keeps: object) -> None:
        """As the methods here, for those that have a file of their own and have checked the arguments."""
        self._make(name, arguments, *keeps)

    def step(self, name: str, work: Callable[[], None]) -> None:
        """Does something between native calls, now or whenever the program runs."""
        if self._program is None:
            work()
            return

        def run() -> int:
            work()
            return 0

        self._program.add(Call(run, (), name))

    def _make(self, name: str, arguments: tuple[object, ...], *keeps: object, num_pairs: int = 0) -> None:
        """Runs a call of the named function with the pool and these arguments, or adds it to the program."""
        function = self._functions.get(name)
        if function is None:
            function = prototype(name)
            if self._wrap is not None:
                function = self._wrap(name, function)
            self._functions[name] = function
        resolved = (self.pool.handle, *arguments)
        if self._program is not None:
            self._program.add(Call(function, resolved, name, keeps, num_pairs))
        elif status := function(*resolved):
            check(status, name)


def _place(args: QkvArgs | AttentionArgs, heads: Heads, spans: Spans, cache: LayerCache) -> None:
    """What both attention calls say of heads, sequences and their memory."""
    args.num_heads, args.num_kv_heads, args.head_dim = heads.num_heads, heads.num_kv_heads, heads.head_dim
    args.spans, args.num_spans = spans.address, spans.max_spans
    args.keys_offset_bytes, args.values_offset_bytes = cache.keys_offset_bytes, cache.values_offset_bytes
    args.capacity, args.kv_dtype, args.ring = cache.capacity, KV_CODES[cache.dtype], cache.is_ring


def _optional(array: Array | None, shape: tuple[int, ...], name: str) -> int | None:
    return None if array is None else pointer(array, shape, F32, name)
