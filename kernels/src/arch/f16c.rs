//! Half-precision conversion with F16C, eight values at a time.

use std::arch::x86_64::*;

use crate::float;

/// Widens `from` into `to`, which has the same length.
///
/// # Safety
/// The CPU has AVX2 and F16C.
#[target_feature(enable = "avx2,f16c")]
pub unsafe fn widen(from: &[u16], to: &mut [f32]) {
    let (heads, tail) = from.as_chunks::<8>();
    let (out, out_tail) = to.as_chunks_mut::<8>();
    for (f, t) in heads.iter().zip(out) {
        // SAFETY: `f` holds eight u16 (16 bytes) and `t` eight f32 (32 bytes).
        unsafe {
            let half = _mm_loadu_si128(f.as_ptr().cast());
            _mm256_storeu_ps(t.as_mut_ptr(), _mm256_cvtph_ps(half));
        }
    }
    tail.iter().zip(out_tail).for_each(|(&f, t)| *t = float::f16_to_f32(f));
}

/// Narrows `from` into `to`, which has the same length.
///
/// # Safety
/// The CPU has AVX2 and F16C.
#[target_feature(enable = "avx2,f16c")]
pub unsafe fn narrow(from: &[f32], to: &mut [u16]) {
    let (heads, tail) = from.as_chunks::<8>();
    let (out, out_tail) = to.as_chunks_mut::<8>();
    for (f, t) in heads.iter().zip(out) {
        // SAFETY: `f` holds eight f32 (32 bytes) and `t` eight u16 (16 bytes).
        unsafe {
            let wide = _mm256_loadu_ps(f.as_ptr());
            let half = _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(wide);
            _mm_storeu_si128(t.as_mut_ptr().cast(), half);
        }
    }
    tail.iter().zip(out_tail).for_each(|(&f, t)| *t = float::f32_to_f16(f));
}
