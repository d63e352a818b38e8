//! Half-precision conversion, four values at a time.

use std::arch::aarch64::*;

use crate::float;

/// Widens `from` into `to`, which has the same length.
///
/// # Safety
/// The CPU has NEON.
#[target_feature(enable = "neon")]
pub unsafe fn widen(from: &[u16], to: &mut [f32]) {
    let (heads, tail) = from.as_chunks::<4>();
    let (out, out_tail) = to.as_chunks_mut::<4>();
    for (f, t) in heads.iter().zip(out) {
        // SAFETY: `f` holds four u16 and `t` four f32.
        unsafe {
            let half = vreinterpret_f16_u16(vld1_u16(f.as_ptr()));
            vst1q_f32(t.as_mut_ptr(), vcvt_f32_f16(half));
        }
    }
    tail.iter().zip(out_tail).for_each(|(&f, t)| *t = float::f16_to_f32(f));
}

/// Narrows `from` into `to`, which has the same length.
///
/// # Safety
/// The CPU has NEON.
#[target_feature(enable = "neon")]
pub unsafe fn narrow(from: &[f32], to: &mut [u16]) {
    let (heads, tail) = from.as_chunks::<4>();
    let (out, out_tail) = to.as_chunks_mut::<4>();
    for (f, t) in heads.iter().zip(out) {
        // SAFETY: `f` holds four f32 and `t` four u16.
        unsafe {
            let half = vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(f.as_ptr())));
            vst1_u16(t.as_mut_ptr(), half);
        }
    }
    tail.iter().zip(out_tail).for_each(|(&f, t)| *t = float::f32_to_f16(f));
}
