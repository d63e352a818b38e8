//! Products with float weights: one fused multiply-add per weight and token, column after column.

use std::arch::aarch64::*;

use crate::format::Format;
use crate::linear::{Activations, DIRECT_TOKENS, PANEL, PanelOut, TILE, Tile};

/// One panel of float weights, `[cols][32 rows]`.
///
/// # Safety
/// The CPU has NEON.
#[target_feature(enable = "neon")]
pub unsafe fn floats(format: Format, panel: &[u8], x: &Activations, out: &PanelOut) {
    // SAFETY: the feature is that of this function.
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
#[target_feature(enable = "neon")]
unsafe fn tiles<W: Weights>(panel: &[u8], x: &Activations, out: &PanelOut) {
    assert_eq!(panel.len(), x.cols() * PANEL * W::BYTES, "a whole panel");
    // Every fourth token begins inside of a tile of inputs, and the three after it end there.
    const { assert!(TILE.is_multiple_of(4) && DIRECT_TOKENS.is_multiple_of(4)) };
    let (mut token, end) = (out.tokens.start, out.tokens.end);
    while token < end {
        // SAFETY: the feature is that of this function, the panel was just checked, and no tile
        // reaches beyond the last token.
        unsafe {
            token += match end - token {
                1 => tile::<W, 1, 4>(panel, x, token, out),
                2 | 3 => tile::<W, 2, 4>(panel, x, token, out),
                _ => tile::<W, 4, 2>(panel, x, token, out),
            }
        }
    }
}

/// Tokens `token..token + T`, `8 * E` rows at a time so that all sums stay in registers; gives `T`.
///
/// # Safety
/// As [`floats`]; the panel has as many columns as `x`, and the tokens are in one tile of it.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn tile<W: Weights, const T: usize, const E: usize>(
    panel: &[u8],
    x: &Activations,
    token: usize,
    out: &PanelOut,
) -> usize {
    let tile = if W::ROUNDED { x.rounded(token) } else { x.plain(token) };
    let Tile { first, next_token, next_unit } = tile;
    let mut values = [[0.0; PANEL]; T];
    for rows in (0..PANEL).step_by(8 * E) {
        let mut inputs = first;
        let mut acc = [[[vdupq_n_f32(0.0); 2]; E]; T];
        for weights in panel.chunks_exact(PANEL * W::BYTES) {
            // SAFETY: the chunk holds 32 weights, and every column of the tile is in the buffer.
            unsafe {
                let weights = weights.as_ptr().add(rows * W::BYTES);
                for e in 0..E {
                    let [low, high] = W::load(weights.add(8 * e * W::BYTES));
                    for t in 0..T {
                        let x = *inputs.add(t * next_token);
                        acc[t][e] =
                            [vfmaq_n_f32(acc[t][e][0], low, x), vfmaq_n_f32(acc[t][e][1], high, x)];
                    }
                }
                inputs = inputs.wrapping_add(next_unit);
            }
        }
        for (acc, values) in acc.iter().zip(&mut values) {
            for (acc, values) in acc.as_flattened().iter().zip(values[rows..].as_chunks_mut().0) {
                let values: &mut [f32; 4] = values;
                // SAFETY: there is room for four.
                unsafe { vst1q_f32(values.as_mut_ptr(), *acc) };
            }
        }
    }
    for (t, values) in values.iter().enumerate() {
        // SAFETY: the token is one of the call's.
        unsafe { out.store(token + t, values) };
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
    /// The CPU has NEON, and eight weights are at `from`.
    unsafe fn load(from: *const u8) -> [float32x4_t; 2];
}

struct F32;
struct F16;
struct BF16;

impl Weights for F32 {
    const BYTES: usize = 4;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(from: *const u8) -> [float32x4_t; 2] {
        // SAFETY: promised by the caller.
        unsafe { [vld1q_f32(from.cast()), vld1q_f32(from.add(16).cast())] }
    }
}

impl Weights for F16 {
    const BYTES: usize = 2;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(from: *const u8) -> [float32x4_t; 2] {
        // SAFETY: promised by the caller.
        let halves = vreinterpretq_f16_u16(unsafe { vld1q_u16(from.cast()) });
        [vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)]
    }
}

impl Weights for BF16 {
    const BYTES: usize = 2;
    const ROUNDED: bool = true;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(from: *const u8) -> [float32x4_t; 2] {
        // SAFETY: promised by the caller.
        let halves = unsafe { vld1q_u16(from.cast()) };
        let low = vshll_n_u16::<16>(vget_low_u16(halves));
        let high = vshll_high_n_u16::<16>(halves);
        [vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high)]
    }
}
