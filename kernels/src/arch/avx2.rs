//! Matrix products with AVX2 and FMA.
//!
//! Built like the kernels of [`super::avx512`], with registers of eight rows: a tile is all rows of a
//! panel times one or two tokens, or half of them times up to four, and its sums over a step stay in
//! registers. How codes and inputs are multiplied stands in [`codes`].

use std::arch::x86_64::*;

use crate::linear::{Activations, PANEL, PanelOut, QuantBlock, STEP, Shape};

mod codes;
mod floats;
mod inputs;

pub(crate) use floats::floats;
pub(crate) use inputs::quantize_row;

/// One panel of quantized weights.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn quantized<S: Shape>(panel: &[u8], x: &Activations, out: &PanelOut) {
    assert_eq!(panel.len(), S::LAYOUT.panel_bytes(x.cols()), "a whole panel");
    let (mut token, end) = (out.tokens.start, out.tokens.end);
    while token < end {
        // SAFETY: the features are those of this function, the panel was just checked, and no
        // tile reaches beyond the last token.
        unsafe {
            token += match end - token {
                1 => tile::<S, 1, 4>(panel, x, token, out),
                2 => tile::<S, 2, 4>(panel, x, token, out),
                3 | 5 | 6 => tile::<S, 3, 2>(panel, x, token, out),
                _ => tile::<S, 4, 2>(panel, x, token, out),
            }
        }
    }
}

/// Tokens `token..token + T`, with as many rows at once as `Q` registers hold; gives `T`.
///
/// # Safety
/// The features of [`quantized`]; `panel` has the length that the layout asks for and the tokens
/// are in `x`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<S: Shape, const T: usize, const Q: usize>(
    panel: &[u8],
    x: &Activations,
    token: usize,
    out: &PanelOut,
) -> usize {
    let inputs: [*const QuantBlock; T] = std::array::from_fn(|t| x.blocks(token + t).as_ptr());
    let layout = const { S::LAYOUT };
    let mut values = [[_mm256_setzero_ps(); 4]; T];
    for first in (0..4).step_by(Q) {
        let mut acc = [[_mm256_setzero_ps(); Q]; T];
        let mut at = panel.as_ptr();
        let mut block = 0;
        while block < x.cols() / STEP {
            let header = at;
            // SAFETY: a panel is a row of groups, each a header and then its steps, and there are
            // as many steps as blocks of inputs; all loads below stay inside of the step or the
            // header.
            unsafe {
                at = at.add(layout.header_bytes());
                for _ in 0..layout.group() {
                    if token == out.tokens.start && first == 0 {
                        prefetch(at, layout.step_bytes());
                    }
                    step::<S, T, Q>(header, at, first, &inputs.map(|x| x.add(block)), &mut acc);
                    at = at.add(layout.step_bytes());
                    block += 1;
                }
            }
        }
        for (values, acc) in values.iter_mut().zip(&acc) {
            values[first..first + Q].copy_from_slice(acc);
        }
    }
    for (t, values) in values.iter().enumerate() {
        // SAFETY: the token is one of the call's.
        unsafe { store(values, token + t, out) };
    }
    T
}

/// Asks for the memory that the steps (or columns) after this one read, as [`super::avx512`] does.
#[inline]
#[target_feature(enable = "avx2")]
fn prefetch(at: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(PREFETCH + line).cast());
    }
}

/// Hands the sums of one token over.
///
/// # Safety
/// The CPU has AVX, and the token is one of the call's.
#[inline]
#[target_feature(enable = "avx")]
unsafe fn store(acc: &[__m256; 4], token: usize, out: &PanelOut) {
    let mut values = [0.0; PANEL];
    // SAFETY: `values` has room for four registers; the token is promised by the caller.
    unsafe {
        for (q, acc) in acc.iter().enumerate() {
            _mm256_storeu_ps(values.as_mut_ptr().add(8 * q), *acc);
        }
        out.store(token, &values);
    }
}

/// Adds 32 columns to the sums of the rows `8 * first ..`.
///
/// # Safety
/// The features of [`quantized`]; the pointers lead to a whole header, step and blocks.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn step<S: Shape, const T: usize, const Q: usize>(
    header: *const u8,
    at: *const u8,
    first: usize,
    x: &[*const QuantBlock; T],
    acc: &mut [[__m256; Q]; T],
) {
    let whole = const { S::LAYOUT.sub_len == STEP };
    // SAFETY: offsets are those of the layout, inside of what the caller vouches for.
    unsafe {
        let codes = at.add(const { S::LAYOUT.scale_bytes() } + 32 * first);
        let mut sums = [[_mm256_setzero_ps(); Q]; T];
        for sub in 0..const { STEP / S::LAYOUT.sub_len } {
            let dots = if whole {
                codes::dots::<S, T, Q, 0, 8>(codes, x)
            } else if sub == 0 {
                codes::dots::<S, T, Q, 0, 4>(codes, x)
            } else {
                codes::dots::<S, T, Q, 4, 8>(codes, x)
            };
            for q in 0..Q {
                let scale = scales::<S>(header, at, sub, first + q);
                for t in 0..T {
                    let mut dot = _mm256_cvtepi32_ps(dots[t][q]);
                    if const { codes::zero(&S::LAYOUT) != 0 } {
                        // All of these are integers below 2^24: exact.
                        let zero = _mm256_set1_ps(const { codes::zero(&S::LAYOUT) as f32 });
                        let inputs = if whole { (*x[t]).sum } else { (*x[t]).sums[sub] };
                        dot = _mm256_fnmadd_ps(zero, _mm256_set1_ps(inputs), dot);
                    }
                    sums[t][q] = if sub == 0 {
                        _mm256_mul_ps(dot, scale)
                    } else {
                        _mm256_fmadd_ps(dot, scale, sums[t][q])
                    };
                }
            }
        }
        if const { S::LAYOUT.mins } {
            for sub in 0..const { STEP / S::LAYOUT.sub_len } {
                for q in 0..Q {
                    let min = mins::<S>(header, at, sub, first + q);
                    for t in 0..T {
                        let inputs = if whole { (*x[t]).sum } else { (*x[t]).sums[sub] };
                        let inputs = _mm256_set1_ps(inputs);
                        sums[t][q] = _mm256_fnmadd_ps(min, inputs, sums[t][q]);
                    }
                }
            }
        }
        for t in 0..T {
            let dx = _mm256_set1_ps((*x[t]).scale);
            for q in 0..Q {
                acc[t][q] = _mm256_fmadd_ps(sums[t][q], dx, acc[t][q]);
            }
        }
    }
}

/// The scales of the rows `8 * q ..` for a sub-block.
///
/// # Safety
/// The features of [`quantized`]; the pointers lead to a whole header and step.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn scales<S: Shape>(header: *const u8, at: *const u8, sub: usize, q: usize) -> __m256 {
    let layout = const { S::LAYOUT };
    // SAFETY: the layout begins with these scales.
    unsafe {
        if !layout.nested {
            return halves(at, q);
        }
        let scale = _mm_loadl_epi64(at.add(PANEL * sub + 8 * q).cast());
        let scale = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(scale));
        _mm256_mul_ps(halves(header, q), scale)
    }
}

/// The minimums of the rows `8 * q ..` for a sub-block.
///
/// # Safety
/// The features of [`quantized`]; the pointers lead to a whole header and step of a layout with
/// minimums.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn mins<S: Shape>(header: *const u8, at: *const u8, sub: usize, q: usize) -> __m256 {
    let layout = const { S::LAYOUT };
    // SAFETY: the layout has these minimums behind the scales.
    unsafe {
        if !layout.nested {
            return halves(at.add(2 * PANEL), q);
        }
        let subs = STEP / layout.sub_len;
        let min = _mm_loadl_epi64(at.add(PANEL * (subs + sub) + 8 * q).cast());
        let min = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(min));
        _mm256_mul_ps(halves(header.add(2 * PANEL), q), min)
    }
}

/// Binary16 numbers of the rows `8 * q ..`.
///
/// # Safety
/// The features of [`quantized`]; 32 of them are at `from`.
#[inline]
#[target_feature(enable = "avx,f16c")]
unsafe fn halves(from: *const u8, q: usize) -> __m256 {
    // SAFETY: promised by the caller.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.add(16 * q).cast()) })
}

/// Bytes ahead: what memory delivers in about its latency, and some more.
const PREFETCH: usize = 4096;
