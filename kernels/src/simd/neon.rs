//! [`Lanes`] on NEON: four registers.

// Every method forwards the promises of the trait to the intrinsics: the CPU has NEON, and pointers
// cover sixteen elements.
#![allow(clippy::missing_safety_doc)]

use std::arch::aarch64::*;
use std::array::from_fn;

use super::{LANES, Lanes, ROUND_MAGIC};

/// Lanes `4 i .. 4 i + 4` in register `i`.
#[derive(Clone, Copy)]
pub(crate) struct NeonLanes([float32x4_t; 4]);

impl NeonLanes {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> Self {
        Self(from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Lanes for NeonLanes {
    const ROWS: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the trait's promise.
        Self([unsafe { vdupq_n_f32(x) }; 4])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the trait's promise.
        Self(from_fn(|i| unsafe { vld1q_f32(from.add(4 * i)) }))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the trait's promise.
        Self(from_fn(|i| unsafe { vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from.add(4 * i)))) }))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the trait's promise.
        Self(from_fn(|i| unsafe {
            vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.add(4 * i))))
        }))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        for (i, lanes) in self.0.into_iter().enumerate() {
            // SAFETY: the trait's promise.
            unsafe { vst1q_f32(to.add(4 * i), lanes) };
        }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        for (i, lanes) in self.0.into_iter().enumerate() {
            // SAFETY: the trait's promise.
            unsafe { vst1_u16(to.add(4 * i), vreinterpret_u16_f16(vcvt_f16_f32(lanes))) };
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        for (i, lanes) in self.0.into_iter().enumerate() {
            // SAFETY: the trait's promise.
            unsafe {
                let bits = vreinterpretq_u32_f32(lanes);
                let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
                let rounded = vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff));
                let quiet = vorrq_u32(bits, vdupq_n_u32(0x40_0000));
                let chosen = vbslq_u32(vceqq_f32(lanes, lanes), rounded, quiet);
                vst1_u16(to.add(4 * i), vshrn_n_u32::<16>(chosen));
            }
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the trait's promise.
        self.zip(other, |a, b| unsafe { vaddq_f32(a, b) })
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: the trait's promise.
        self.zip(other, |a, b| unsafe { vsubq_f32(a, b) })
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: the trait's promise.
        self.zip(other, |a, b| unsafe { vmulq_f32(a, b) })
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: the trait's promise.
        self.zip(other, |a, b| unsafe { vdivq_f32(a, b) })
    }

    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: the trait's promise.
        Self(from_fn(|i| unsafe { vfmaq_f32(c.0[i], self.0[i], b.0[i]) }))
    }

    #[inline(always)]
    unsafe fn fnma(self, b: Self, c: Self) -> Self {
        // SAFETY: the trait's promise.
        Self(from_fn(|i| unsafe { vfmsq_f32(c.0[i], self.0[i], b.0[i]) }))
    }

    // The instructions for maxima and minima keep NaNs and order zeros, which the trait does not.

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: the trait's promise.
        self.zip(other, |a, b| unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: the trait's promise.
        self.zip(other, |a, b| unsafe { vbslq_f32(vcltq_f32(a, b), a, b) })
    }

    #[inline(always)]
    unsafe fn select(self, other: Self, mask: u16) -> Self {
        const BITS: [u32; 4] = [1, 2, 4, 8];
        // SAFETY: the trait's promise; there are four bits.
        Self(from_fn(|i| unsafe {
            let mask = vdupq_n_u32(u32::from(mask >> (4 * i)));
            vbslq_f32(vtstq_u32(mask, vld1q_u32(BITS.as_ptr())), self.0[i], other.0[i])
        }))
    }

    #[inline(always)]
    unsafe fn pow2_halves(self) -> (Self, Self) {
        // SAFETY: the trait's promise.
        unsafe {
            let magic = vdupq_n_s32(ROUND_MAGIC.to_bits() as i32);
            let n = self.0.map(|x| vsubq_s32(vreinterpretq_s32_f32(x), magic));
            let power =
                |n| vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127))));
            let first = n.map(|n| vshrq_n_s32::<1>(n));
            let second: [_; 4] = from_fn(|i| vsubq_s32(n[i], first[i]));
            (Self(first.map(power)), Self(second.map(power)))
        }
    }

    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self; LANES]) {
        let from = *rows;
        for i in 0..4 {
            for j in 0..4 {
                // SAFETY: the trait's promise.
                let square = unsafe { transpose_4x4(from_fn(|row| from[4 * i + row].0[j])) };
                for (row, lanes) in square.into_iter().enumerate() {
                    rows[4 * j + row].0[i] = lanes;
                }
            }
        }
    }
}

/// # Safety
/// The CPU has NEON.
#[inline(always)]
unsafe fn transpose_4x4(rows: [float32x4_t; 4]) -> [float32x4_t; 4] {
    // SAFETY: promised by the caller.
    unsafe {
        let pairs = |a, b| {
            let even = vreinterpretq_f64_f32(vtrn1q_f32(a, b));
            let odd = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
            (even, odd)
        };
        let (even01, odd01) = pairs(rows[0], rows[1]);
        let (even23, odd23) = pairs(rows[2], rows[3]);
        [
            vreinterpretq_f32_f64(vtrn1q_f64(even01, even23)),
            vreinterpretq_f32_f64(vtrn1q_f64(odd01, odd23)),
            vreinterpretq_f32_f64(vtrn2q_f64(even01, even23)),
            vreinterpretq_f32_f64(vtrn2q_f64(odd01, odd23)),
        ]
    }
}
