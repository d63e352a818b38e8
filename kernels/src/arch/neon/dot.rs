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
                let mut low = vmull_s8(vget_low_s8(codes[0]), vget_low_s8(x[0]));
                let mut high = vmull_high_s8(codes[0], x[0]);
                low = vmlal_s8(low, vget_low_s8(codes[1]), vget_low_s8(x[1]));
                high = vmlal_high_s8(high, codes[1], x[1]);
                let pairs = if four {
                    low = vmlal_s8(low, vget_low_s8(codes[2]), vget_low_s8(x[2]));
                    high = vmlal_high_s8(high, codes[2], x[2]);
                    low = vmlal_s8(low, vget_low_s8(codes[3]), vget_low_s8(x[3]));
                    high = vmlal_high_s8(high, codes[3], x[3]);
                    [vpaddlq_s16(low), vpaddlq_s16(high)]
                } else {
                    let mut second_low = vmull_s8(vget_low_s8(codes[2]), vget_low_s8(x[2]));
                    let mut second_high = vmull_high_s8(codes[2], x[2]);
                    second_low = vmlal_s8(second_low, vget_low_s8(codes[3]), vget_low_s8(x[3]));
                    second_high = vmlal_high_s8(second_high, codes[3], x[3]);
                    [
                        vpadalq_s16(vpaddlq_s16(low), second_low),
                        vpadalq_s16(vpaddlq_s16(high), second_high),
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
/// these numbers: `[r0 t0, r0 t1, r1 t0, r1 t1]`. A single token has dots of four bytes.
pub(super) struct I8mm;

impl Dot for I8mm {
    const TOKENS: usize = 8;
    const UNSIGNED: bool = true;

    #[inline(always)]
    unsafe fn start<const T: usize>(offsets: [i32; T]) -> [int32x4_t; T] {
        // SAFETY: the trait's promise.
        let start = offsets.map(|offset| unsafe { vdupq_n_s32(offset) });
        if T == 1 {
            return start;
        }
        // SAFETY: the trait's promise.
        from_fn(|t| unsafe { vzip1q_s32(start[t & !1], start[t | 1]) })
    }

    #[inline(always)]
    unsafe fn inputs<const T: usize>(x: [int8x16_t; T]) -> [int8x16_t; T] {
        if T == 1 {
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
            if T == 1 {
                if unsigned {
                    dots[0] = usdot::<0>(dots[0], codes[0], x[0]);
                    dots[0] = usdot::<1>(dots[0], codes[1], x[0]);
                    dots[0] = usdot::<2>(dots[0], codes[2], x[0]);
                    dots[0] = usdot::<3>(dots[0], codes[3], x[0]);
                } else {
                    Dotprod::add::<S, T>(codes, x, dots);
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
        if T == 1 {
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

// These instructions have no stable intrinsics yet.

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

/// Adds the 2x2 products of the halves of `a` with the halves of `b`.
///
/// # Safety
/// The CPU has `i8mm`.
#[inline(always)]
pub(super) unsafe fn smmla(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: as above.
    unsafe {
        asm!(
            "smmla {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// [`smmla`] with the bytes of `a` unsigned.
///
/// # Safety
/// The CPU has `i8mm`.
#[inline(always)]
unsafe fn usmmla(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: as above.
    unsafe {
        asm!(
            "usmmla {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}
