//! Products with float weights: one fused multiply-add per weight and token, column after column.

use std::arch::x86_64::*;

use super::store;
use crate::format::Format;
use crate::linear::{Activations, PANEL, PanelOut, TILE};

/// One panel of float weights, `[cols][32 rows]`, for all tokens.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn floats(format: Format, panel: &[u8], x: &Activations, out: &PanelOut) {
    // SAFETY: the features are those of this function.
    unsafe {
        match format {
            Format::F32 => tiles::<F32>(panel, x, out),
            Format::F16 => tiles::<F16>(panel, x, out),
            Format::BF16 => tiles::<BF16>(panel, x, out),
            _ => unreachable!("quantized weights have a layout"),
        }
    }
}

/// # Safety
/// As [`floats`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tiles<W: Weights>(panel: &[u8], x: &Activations, out: &PanelOut) {
    assert_eq!(panel.len(), x.cols() * PANEL * W::BYTES, "a whole panel");
    // Even tokens begin inside of a tile of inputs, and so the odd ones end in the same.
    const { assert!(TILE.is_multiple_of(2)) };
    for token in (0..x.tokens()).step_by(2) {
        // SAFETY: the features are those of this function, the panel was just checked, and the
        // tokens are there.
        unsafe {
            match x.tokens() - token {
                1 => tile::<W, 1>(panel, x, token, out),
                _ => tile::<W, 2>(panel, x, token, out),
            }
        }
    }
}

/// # Safety
/// As [`floats`]; the panel has as many columns as `x`, and the tokens are in one tile of it.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<W: Weights, const T: usize>(
    panel: &[u8],
    x: &Activations,
    token: usize,
    out: &PanelOut,
) {
    let (mut inputs, next_token, next_col) = x.tile(token);
    let mut acc = [[_mm256_setzero_ps(); 4]; T];
    for weights in panel.chunks_exact(PANEL * W::BYTES) {
        // SAFETY: the chunk holds 32 weights, and every column of the tile is in the buffer.
        unsafe {
            for q in 0..4 {
                let weights = W::load(weights.as_ptr().add(8 * q * W::BYTES));
                for (t, acc) in acc.iter_mut().enumerate() {
                    let x = _mm256_set1_ps(*inputs.add(t * next_token));
                    acc[q] = _mm256_fmadd_ps(weights, x, acc[q]);
                }
            }
            inputs = inputs.wrapping_add(next_col);
        }
    }
    for (t, acc) in acc.iter().enumerate() {
        // SAFETY: the token is one of the call's.
        unsafe { store(acc, token + t, out) };
    }
}

/// How eight weights become f32.
trait Weights {
    /// Bytes of a weight.
    const BYTES: usize;

    /// # Safety
    /// The CPU has AVX2 and F16C, and eight weights are at `from`.
    unsafe fn load(from: *const u8) -> __m256;
}

struct F32;
struct F16;
struct BF16;

impl Weights for F32 {
    const BYTES: usize = 4;

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load(from: *const u8) -> __m256 {
        // SAFETY: promised by the caller.
        unsafe { _mm256_loadu_ps(from.cast()) }
    }
}

impl Weights for F16 {
    const BYTES: usize = 2;

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load(from: *const u8) -> __m256 {
        // SAFETY: promised by the caller.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast()) })
    }
}

impl Weights for BF16 {
    const BYTES: usize = 2;

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load(from: *const u8) -> __m256 {
        // SAFETY: promised by the caller.
        let bits = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(from.cast()) });
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
    }
}
