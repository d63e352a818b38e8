//! Inputs as eight-bit integers, a block of 32 at a time.

use std::arch::x86_64::*;

use crate::linear::{QuantBlock, STEP};

/// Quantizes the inputs of one token: the bits of the portable version.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn quantize_row(values: &[f32], blocks: &mut [QuantBlock]) {
    for (values, block) in values.as_chunks::<STEP>().0.iter().zip(blocks) {
        // SAFETY: a block has 32 values, two registers.
        let v =
            unsafe { [_mm512_loadu_ps(values.as_ptr()), _mm512_loadu_ps(values.as_ptr().add(16))] };
        *block = quantize_block(v);
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn quantize_block(v: [__m512; 2]) -> QuantBlock {
    let low = _mm512_castps_si512(_mm512_abs_ps(v[0]));
    let high = _mm512_castps_si512(_mm512_abs_ps(v[1]));
    let largest = _mm512_reduce_max_epu32(_mm512_max_epu32(low, high));
    let (mut block, inverse) = QuantBlock::begin(largest);
    let Some(inverse) = inverse else { return block };
    let inverse = _mm512_set1_ps(inverse);
    let mut sums = [0; 2];
    for h in 0..2 {
        let codes = _mm512_cvtps_epi32(_mm512_mul_ps(v[h], inverse));
        sums[h] = _mm512_reduce_add_epi32(codes);
        // SAFETY: the codes have room for two registers of sixteen bytes.
        unsafe {
            let to = block.codes.as_mut_ptr().add(16 * h);
            _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(codes));
        }
    }
    block.set_sums(sums);
    block
}

/// Rounds inputs to bfloat16, two to a word with the first in the upper half; a last one without a partner
/// gets zero.
///
/// # Safety
/// The CPU has AVX-512 F and BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub unsafe fn pair_row(values: &[f32], pairs: &mut [u32]) {
    assert_eq!(pairs.len(), values.len().div_ceil(2), "a word for two inputs");
    let ends = pairs.chunks_mut(16).zip(values.chunks(32));
    for (pairs, values) in ends {
        let have = |n: usize| 0xffff_u16.checked_shr(16_u32.saturating_sub(n as u32)).unwrap_or(0);
        let (low, high) = (values.len().min(16), values.len().saturating_sub(16));
        // SAFETY: the masks keep to the values and the words that are there.
        unsafe {
            let a = _mm512_maskz_loadu_ps(have(low), values.as_ptr());
            let b = _mm512_maskz_loadu_ps(have(high), values.as_ptr().wrapping_add(16));
            let rounded = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a));
            let swapped = _mm512_rol_epi32::<16>(rounded);
            _mm512_mask_storeu_epi32(pairs.as_mut_ptr().cast(), have(pairs.len()), swapped);
        }
    }
}
