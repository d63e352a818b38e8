//! Dots of bytes, by what the CPU has for them.

use std::arch::aarch64::*;
use std::arch::asm;
use std::array::from_fn;

use crate::linear::{Bits, Shape};

/// Integer dots of four rows with `T` tokens.
///
/// # Safety
/// Every method may only be called on a CPU that has the features of the implementation.
pub(super) trait Dot {
    /// The most tokens of a tile: 4 or 8.
    const TOKENS: usize;
    /// Whether eight-bit codes are taken without a sign, their zero at 128.
    const UNSIGNED: bool;

    /// What the dots begin with: the same for all rows of a token.
    unsafe fn start<const T: usize>(offsets: [i32; T]) -> [int32x4_t; T];

    /// Brings sixteen inputs of each token into the order that [`add`](Dot::add) takes.
    #[inline(always)]
    unsafe fn inputs<const T: usize>(x: [int8x16_t; T]) -> [int8x16_t; T] {
        x
    }

    /// Adds the products of sixteen columns: register `v` of the codes has the columns `4 * v ..`
    /// of the four rows.
    unsafe fn add<S: Shape, const T: usize>(
        codes: &[int8x16_t; 4],
        x: &[int8x16_t; T],
        dots: &mut [int32x4_t; T],
    );

    /// The dots with lane `r` for row `r`.
    #[inline(always)]
    unsafe fn finish<const T: usize>(dots: [int32x4_t; T]) -> [int32x4_t; T] {
        dots
    }
}

/// Products of bytes that are added in 16 bits as long as they fit.
pub(super) struct Base;

impl Dot for Base {
    const TOKENS: usize = 4;
    const UNSIGNED: bool = false;

    #[inline(always)]
    unsafe fn start<const T: usize>(offsets: [i32; T]) -> [int32x4_t; T] {
        // SAFETY: the trait's promise.
        offsets.map(|offset| unsafe { vdupq_n_s32(offset) })
    }

    #[inline(always)]
    unsafe fn add<S: Shape, const T: usize>(
        codes: &[int8x16_t; 4],
        x: &[int8x16_t; T],
        dots: &mut [int32x4_t; T],
    ) {
        // Inputs are at least -127, so that two products of any codes fit into 16 bits, and four of
        // those of six bits or fewer.
        let four = const { !matches!(S::LAYOUT.bits, Bits::Eight | Bits::Levels) };
        for (x, dots) in x.iter().zip(dots) {
            // SAFETY: the trait's promise.
            unsafe {
                let x = vreinterpretq_s32_s8(*x);
                let x = [
                    vreinterpretq_s8_s32(vdupq_laneq_s32::<0>(x)),
                    vreinterpretq_s8_s32(vdupq_laneq_s32::<1>(x)),
                    vreinterpretq_s8_s32(vdupq_laneq_s32::<2>(x)),
                    vreinterpretq_s8_s32(vdupq_laneq_s32::<3>(x)),
                ];
                // Two rows each.
                let low = smlal(smull(codes[0], x[0]), codes[1], x[1]);
                let high = smlal2(smull2(codes[0], x[0]), codes[1], x[1]);
                let pairs = if four {
                    let low = smlal(smlal(low, codes[2], x[2]), codes[3], x[3]);
                    let high = smlal2(smlal2(high, codes[2], x[2]), codes[3], x[3]);
                    [vpaddlq_s16(low), vpaddlq_s16(high)]
                } else {
                    let next_low = smlal(smull(codes[2], x[2]), codes[3], x[3]);
                    let next_high = smlal2(smull2(codes[2], x[2]), codes[3], x[3]);
                    [
                        vpadalq_s16(vpaddlq_s16(low), next_low),
                        vpadalq_s16(vpaddlq_s16(high), next_high),
                    ]
                };
                *dots = vaddq_s32(*dots, vpaddq_s32(pairs[0], pairs[1]));
            }
        }
    }
}

/// Dots of four bytes.
pub(super) struct Dotprod;

impl Dot for Dotprod {
    const TOKENS: usize = 8;
    const UNSIGNED: bool = false;

    #[inline(always)]
    unsafe fn start<const T: usize>(offsets: [i32; T]) -> [int32x4_t; T] {
        // SAFETY: the trait's promise.
        offsets.map(|offset| unsafe { vdupq_n_s32(offset) })
    }

    #[inline(always)]
    unsafe fn add<S: Shape, const T: usize>(
        codes: &[int8x16_t; 4],
        x: &[int8x16_t; T],
        dots: &mut [int32x4_t; T],
    ) {
        for (x, dots) in x.iter().zip(dots) {
            // SAFETY: the trait's promise.
            unsafe {
                *dots = sdot::<0>(*dots, codes[0], *x);
                *dots = sdot::<1>(*dots, codes[1], *x);
                *dots = sdot::<2>(*dots, codes[2], *x);
                *dots = sdot::<3>(*dots, codes[3], *x);
            }
        }
    }
}

/// Products of two rows with two tokens over eight columns, which take half as many instructions.
///
/// Dots `2 p` and `2 p + 1` belong to the first and the last two rows, each with the tokens of
/// these numbers: `[r0 t0, r0 t1, r1 t0, r1 t1]`. One token or two have dots of four bytes: bringing
/// the codes of so few into pairs of rows takes what is saved.
pub(super) struct I8mm;

impl Dot for I8mm {
    const TOKENS: usize = 8;
    const UNSIGNED: bool = true;

    #[inline(always)]
    unsafe fn start<const T: usize>(offsets: [i32; T]) -> [int32x4_t; T] {
        // SAFETY: the trait's promise.
        let start = offsets.map(|offset| unsafe { vdupq_n_s32(offset) });
        if T < PAIRED {
            return start;
        }
        // SAFETY: the trait's promise.
        from_fn(|t| unsafe { vzip1q_s32(start[t & !1], start[t | 1]) })
    }

    #[inline(always)]
    unsafe fn inputs<const T: usize>(x: [int8x16_t; T]) -> [int8x16_t; T] {
        if T < PAIRED {
            return x;
        }
        // SAFETY: the trait's promise.
        from_fn(|t| unsafe {
            let first = vreinterpretq_s64_s8(x[t & !1]);
            let second = vreinterpretq_s64_s8(x[t | 1]);
            vreinterpretq_s8_s64(match t % 2 {
                0 => vzip1q_s64(first, second),
                _ => vzip2q_s64(first, second),
            })
        })
    }

    #[inline(always)]
    unsafe fn add<S: Shape, const T: usize>(
        codes: &[int8x16_t; 4],
        x: &[int8x16_t; T],
        dots: &mut [int32x4_t; T],
    ) {
        let unsigned = const { matches!(S::LAYOUT.bits, Bits::Eight) };
        // SAFETY: the trait's promise.
        unsafe {
            if T < PAIRED {
                if !unsigned {
                    return Dotprod::add::<S, T>(codes, x, dots);
                }
                for (x, dots) in x.iter().zip(dots) {
                    *dots = usdot::<0>(*dots, codes[0], *x);
                    *dots = usdot::<1>(*dots, codes[1], *x);
                    *dots = usdot::<2>(*dots, codes[2], *x);
                    *dots = usdot::<3>(*dots, codes[3], *x);
                }
                return;
            }
            let words = codes.map(|codes| vreinterpretq_s32_s8(codes));
            for half in 0..2 {
                let (even, odd) = (words[2 * half], words[2 * half + 1]);
                let rows = [vzip1q_s32(even, odd), vzip2q_s32(even, odd)];
                let rows = rows.map(|rows| vreinterpretq_s8_s32(rows));
                for t in 0..T {
                    let x = x[(t & !1) + half];
                    dots[t] = if unsigned {
                        usmmla(dots[t], rows[t % 2], x)
                    } else {
                        smmla(dots[t], rows[t % 2], x)
                    };
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn finish<const T: usize>(dots: [int32x4_t; T]) -> [int32x4_t; T] {
        if T < PAIRED {
            return dots;
        }
        // SAFETY: the trait's promise.
        from_fn(|t| unsafe {
            match t % 2 {
                0 => vuzp1q_s32(dots[t & !1], dots[t | 1]),
                _ => vuzp2q_s32(dots[t & !1], dots[t | 1]),
            }
        })
    }
}

/// From so many tokens on, [`I8mm`] takes two at a time.
const PAIRED: usize = 4;

/// Functions for single instructions, which compute on registers only. Those on dots of bytes have
/// no stable intrinsics yet; the others have, but the compiler takes them apart where it knows that
/// codes have no sign.
///
/// # Safety
/// The CPU has the features that the instruction asks for.
macro_rules! instructions {
    ($($(#[$doc:meta])* $name:ident($(mut $sum:ident: $in:ty)?) -> $out:ty: $text:literal;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub(super) unsafe fn $name($(mut $sum: $in,)? a: int8x16_t, b: int8x16_t) -> $out {
            instructions!(@ $($sum)?, $out, a, b, $text)
        }
    )*};
    (@ $sum:ident, $out:ty, $a:ident, $b:ident, $text:literal) => {{
        // SAFETY: nothing but registers; the CPU is the caller's promise.
        unsafe {
            asm!($text, sum = inout(vreg) $sum, a = in(vreg) $a, b = in(vreg) $b,
                options(pure, nomem, nostack, preserves_flags));
        }
        $sum
    }};
    (@ , $out:ty, $a:ident, $b:ident, $text:literal) => {{
        let sum: $out;
        // SAFETY: as above.
        unsafe {
            asm!($text, sum = out(vreg) sum, a = in(vreg) $a, b = in(vreg) $b,
                options(pure, nomem, nostack, preserves_flags));
        }
        sum
    }};
}

instructions! {
    /// Products of the first eight bytes.
    smull() -> int16x8_t: "smull {sum:v}.8h, {a:v}.8b, {b:v}.8b";
    /// Products of the last eight bytes.
    smull2() -> int16x8_t: "smull2 {sum:v}.8h, {a:v}.16b, {b:v}.16b";
    /// Adds the products of the first eight bytes.
    smlal(mut sum: int16x8_t) -> int16x8_t: "smlal {sum:v}.8h, {a:v}.8b, {b:v}.8b";
    /// Adds the products of the last eight bytes.
    smlal2(mut sum: int16x8_t) -> int16x8_t: "smlal2 {sum:v}.8h, {a:v}.16b, {b:v}.16b";
    /// Adds the 2x2 products of the halves of `a` with the halves of `b`.
    smmla(mut sum: int32x4_t) -> int32x4_t: "smmla {sum:v}.4s, {a:v}.16b, {b:v}.16b";
    /// `smmla` with the bytes of `a` unsigned.
    usmmla(mut sum: int32x4_t) -> int32x4_t: "usmmla {sum:v}.4s, {a:v}.16b, {b:v}.16b";
}

/// Adds to each lane the dot of its four bytes of `a` with the four bytes of `b` in `LANE`.
///
/// # Safety
/// The CPU has `dotprod`.
#[inline(always)]
pub(super) unsafe fn sdot<const LANE: usize>(
    mut sum: int32x4_t,
    a: int8x16_t,
    b: int8x16_t,
) -> int32x4_t {
    // SAFETY: computes on registers only; the CPU is the caller's promise.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {a:v}.16b, {b:v}.4b[{lane}]",
            sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b, lane = const LANE,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// [`sdot`] with the bytes of `a` unsigned.
///
/// # Safety
/// The CPU has `i8mm`.
#[inline(always)]
unsafe fn usdot<const LANE: usize>(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: as above.
    unsafe {
        asm!(
            "usdot {sum:v}.4s, {a:v}.16b, {b:v}.4b[{lane}]",
            sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b, lane = const LANE,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}
