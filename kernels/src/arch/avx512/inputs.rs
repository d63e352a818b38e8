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
