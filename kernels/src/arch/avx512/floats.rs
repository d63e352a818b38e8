//! Products with float weights: one fused multiply-add per weight and token, column after column.

use std::arch::x86_64::*;

use super::{prefetch, store};
use crate::format::Format;
use crate::linear::{Activations, DIRECT_TOKENS, PANEL, PanelOut, TILE};

/// One panel of float weights, `[cols][32 rows]`, for all tokens.
///
/// # Safety
/// The CPU has AVX-512 F.
#[target_feature(enable = "avx512f")]
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
#[target_feature(enable = "avx512f")]
unsafe fn tiles<W: Weights>(panel: &[u8], x: &Activations, out: &PanelOut) {
    assert_eq!(panel.len(), x.cols() * PANEL * W::BYTES, "a whole panel");
    let tile_tokens = if x.tokens() <= DIRECT_TOKENS { DIRECT_TOKENS } else { TILE };
    for token in (0..x.tokens()).step_by(tile_tokens) {
        // SAFETY: the features are those of this function, the panel was just checked, and a tile
        // has at least as many tokens as are left, up to its width.
        unsafe {
            match x.tokens() - token {
                1 => tile::<W, 1>(panel, x, token, out),
                2 => tile::<W, 2>(panel, x, token, out),
                3 => tile::<W, 3>(panel, x, token, out),
                4 => tile::<W, 4>(panel, x, token, out),
                5 => tile::<W, 5>(panel, x, token, out),
                6 => tile::<W, 6>(panel, x, token, out),
                7 => tile::<W, 7>(panel, x, token, out),
                8 => tile::<W, 8>(panel, x, token, out),
                9 => tile::<W, 9>(panel, x, token, out),
                10 => tile::<W, 10>(panel, x, token, out),
                11 => tile::<W, 11>(panel, x, token, out),
                _ => tile::<W, 12>(panel, x, token, out),
            }
        }
    }
}

/// # Safety
/// As [`floats`]; the panel has as many columns as `x`, and the tokens are in one tile of it.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn tile<W: Weights, const T: usize>(
    panel: &[u8],
    x: &Activations,
    token: usize,
    out: &PanelOut,
) {
    let (mut inputs, next_token, next_col) = x.tile(token);
    let next_token = if T > DIRECT_TOKENS { 1 } else { next_token };
    let mut acc = [[_mm512_setzero_ps(); 2]; T];
    for weights in panel.chunks_exact(PANEL * W::BYTES) {
        // SAFETY: the chunk holds 32 weights, and every column of the tile is in the buffer.
        unsafe {
            if token == 0 {
                prefetch(weights.as_ptr(), weights.len());
            }
            let low = W::load(weights.as_ptr());
            let high = W::load(weights.as_ptr().add(16 * W::BYTES));
            for (t, acc) in acc.iter_mut().enumerate() {
                let x = _mm512_set1_ps(*inputs.add(t * next_token));
                acc[0] = _mm512_fmadd_ps(low, x, acc[0]);
                acc[1] = _mm512_fmadd_ps(high, x, acc[1]);
            }
            inputs = inputs.wrapping_add(next_col);
        }
    }
    store(&acc, token, out);
}

/// How sixteen weights become f32.
trait Weights {
    /// Bytes of a weight.
    const BYTES: usize;

    /// # Safety
    /// The CPU has AVX-512 F, and sixteen weights are at `from`.
    unsafe fn load(from: *const u8) -> __m512;
}

struct F32;
struct F16;
struct BF16;

impl Weights for F32 {
    const BYTES: usize = 4;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const u8) -> __m512 {
        // SAFETY: promised by the caller.
        unsafe { _mm512_loadu_ps(from.cast()) }
    }
}

impl Weights for F16 {
    const BYTES: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const u8) -> __m512 {
        // SAFETY: promised by the caller.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast()) })
    }
}

impl Weights for BF16 {
    const BYTES: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const u8) -> __m512 {
        // SAFETY: promised by the caller.
        let bits = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(from.cast()) });
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
    }
}
