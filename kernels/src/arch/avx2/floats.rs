//! Products with float weights: one fused multiply-add per weight and token, column after column.

use std::arch::x86_64::*;

use super::{prefetch, store};
use crate::format::Format;
use crate::linear::{Activations, DIRECT_TOKENS, PANEL, PanelOut, TILE, Tile};

/// One panel of float weights, `[cols][32 rows]`.
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
    // Two halves of a tile of inputs, so that none reaches into the next.
    const { assert!(TILE == 12) };
    let (mut token, end) = (out.tokens.start, out.tokens.end);
    while token < end {
        // SAFETY: the features are those of this function, the panel was just checked, and the
        // tokens are there.
        unsafe {
            token += match end - token {
                1 => tile::<W, 1, 4>(panel, x, token, out),
                2 => tile::<W, 2, 4>(panel, x, token, out),
                3 => tile::<W, 3, 2>(panel, x, token, out),
                4 => tile::<W, 4, 2>(panel, x, token, out),
                5 => tile::<W, 5, 2>(panel, x, token, out),
                _ => tile::<W, 6, 2>(panel, x, token, out),
            }
        }
    }
}

/// Tokens `token..token + T`, with as many rows at once as `Q` registers hold; gives `T`.
///
/// # Safety
/// As [`floats`]; the panel has as many columns as `x`, and the tokens are in one tile of it.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<W: Weights, const T: usize, const Q: usize>(
    panel: &[u8],
    x: &Activations,
    token: usize,
    out: &PanelOut,
) -> usize {
    let tile = if W::ROUNDED { x.rounded(token) } else { x.plain(token) };
    let Tile { first, next_token, next_unit } = tile;
    let next_token = if T > DIRECT_TOKENS { 1 } else { next_token };
    let mut values = [[_mm256_setzero_ps(); 4]; T];
    for rows in (0..4).step_by(Q) {
        let mut inputs = first;
        let mut acc = [[_mm256_setzero_ps(); Q]; T];
        for weights in panel.chunks_exact(PANEL * W::BYTES) {
            // SAFETY: the chunk holds 32 weights, and every column of the tile is in the buffer.
            unsafe {
                if token == out.tokens.start && rows == 0 {
                    prefetch(weights.as_ptr(), weights.len());
                }
                let mut w = [_mm256_setzero_ps(); Q];
                for (q, w) in w.iter_mut().enumerate() {
                    *w = W::load(weights.as_ptr().add(8 * (rows + q) * W::BYTES));
                }
                for (t, acc) in acc.iter_mut().enumerate() {
                    let x = _mm256_set1_ps(*inputs.add(t * next_token));
                    for q in 0..Q {
                        acc[q] = _mm256_fmadd_ps(w[q], x, acc[q]);
                    }
                }
                inputs = inputs.wrapping_add(next_unit);
            }
        }
        for (values, acc) in values.iter_mut().zip(&acc) {
            values[rows..rows + Q].copy_from_slice(acc);
        }
    }
    for (t, values) in values.iter().enumerate() {
        // SAFETY: the token is one of the call's.
        unsafe { store(values, token + t, out) };
    }
    T
}

/// How eight weights become f32.
trait Weights {
    /// Bytes of a weight.
    const BYTES: usize;
    /// Whether it meets rounded inputs.
    const ROUNDED: bool = false;

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
    const ROUNDED: bool = true;

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load(from: *const u8) -> __m256 {
        // SAFETY: promised by the caller.
        let bits = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(from.cast()) });
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
    }
}
