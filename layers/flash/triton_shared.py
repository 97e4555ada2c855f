"""Shared memory at addresses of a program's own choice, which Triton does not offer: a few PTX instructions.

All take and give one number a thread, in tensors of as many numbers as a program has threads, or of a multiple: were there
fewer, several threads would hold the same one, and each would add it to a sum. Addresses are in bytes. Whoever reads what
another warp stored needs ``tl.debug_barrier`` between. INTERPRETED: Triton's interpreter knows neither PTX nor shared memory;
its programs run one after the other, and numbers then lie where ``spare`` points.
"""

import triton
import triton.language as tl


@triton.jit
def memory(spare, BYTES: tl.constexpr, INTERPRETED: tl.constexpr):
    """The address of so many bytes, with what Triton takes at most 48 KiB; to be asked for once in a kernel."""
    if INTERPRETED:
        return spare
    else:
        asm: tl.constexpr = f"{{ .shared .align 16 .b8 words[{BYTES}]; mov.u32 $0, words; }}"
        return tl.inline_asm_elementwise(asm, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def threads(WARPS: tl.constexpr, INTERPRETED: tl.constexpr):
    """The number of each thread."""
    n = tl.arange(0, 32 * WARPS)
    if INTERPRETED:
        return n
    else:
        return tl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r,r", [n], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def get(memory, at, here, KIND: tl.constexpr, INTERPRETED: tl.constexpr):
    """Numbers of KIND, int32 or float32. What a thread gets that is not ``here`` has no meaning. None: all are."""
    if INTERPRETED:
        bits = tl.load(memory + at // 4, mask=here)
    elif here is None:
        bits = tl.inline_asm_elementwise(
            "ld.shared.b32 $0, [$1];", "=r,r", [memory + at], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        bits = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p ld.shared.b32 $0, [$1]; }", "=r,r,r",
            [memory + at, here.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return bits.to(KIND, bitcast=True)


@triton.jit
def get_pair(memory, at, here, INTERPRETED: tl.constexpr):
    """Two numbers side by side, the first at a multiple of 8 bytes; see ``get``."""
    if INTERPRETED:
        return tl.load(memory + at // 4, mask=here), tl.load(memory + at // 4 + 1, mask=here)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p ld.shared.v2.f32 {$0, $1}, [$2]; }", "=f,=f,r,r",
            [memory + at, here.to(tl.int32)], dtype=(tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def put(memory, at, v, here, INTERPRETED: tl.constexpr):
    """Int32 or float32. What the threads of a warp store, all of them see in what they do next."""
    if INTERPRETED:
        tl.store(memory + at // 4, v.to(memory.dtype.element_ty, bitcast=True), mask=here)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.shared.b32 [$1], $2; bar.warp.sync 0xffffffff; mov.u32 $0, 0; }",
            "=r,r,r,r", [memory + at, v.to(tl.int32, bitcast=True), here.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def put_pair(memory, at, v, w, here, INTERPRETED: tl.constexpr):
    """See ``get_pair`` and ``put``."""
    if INTERPRETED:
        tl.store(memory + at // 4, v, mask=here)
        tl.store(memory + at // 4 + 1, w, mask=here)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $4, 0; @p st.shared.v2.f32 [$1], {$2, $3}; bar.warp.sync 0xffffffff;"
            " mov.u32 $0, 0; }",
            "=r,r,f,f,r", [memory + at, v, w, here.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def alike(v, INTERPRETED: tl.constexpr):
    """Of an int32 in each thread: how many threads before it in its warp have the same one, and how many in all.

    What a warp got from shared memory before, all of its threads have then.
    """
    if INTERPRETED:
        warps = tl.reshape(v, [v.shape[0] // 32, 32])
        lane = tl.arange(0, 32)
        same = (warps[:, :, None] == warps[:, None, :]).to(tl.int32)
        earlier = tl.sum(same * (lane[None, None, :] < lane[None, :, None]).to(tl.int32), axis=2)
        return tl.reshape(earlier, [v.shape[0]]), tl.reshape(tl.sum(same, axis=2), [v.shape[0]])
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 m, l; bar.warp.sync 0xffffffff; match.any.sync.b32 m, $2, 0xffffffff; popc.b32 $1, m;"
            " mov.u32 l, %lanemask_lt; and.b32 m, m, l; popc.b32 $0, m; }",
            "=r,=&r,r", [v], dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
