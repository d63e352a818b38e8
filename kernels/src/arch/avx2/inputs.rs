//! Inputs as eight-bit integers, a block of 32 at a time.

use std::arch::x86_64::*;

use crate::linear::{QuantBlock, STEP};

/// Quantizes the inputs of one token: the bits of the portable version.
///
/// # Safety
/// The CPU has AVX2.
#[target_feature(enable = "avx2")]
pub unsafe fn quantize_row(values: &[f32], blocks: &mut [QuantBlock]) {
    for (values, block) in values.as_chunks::<STEP>().0.iter().zip(blocks) {
        let mut v = [_mm256_setzero_ps(); 4];
        for (i, v) in v.iter_mut().enumerate() {
            // SAFETY: a block has 32 values, four registers.
            *v = unsafe { _mm256_loadu_ps(values.as_ptr().add(8 * i)) };
        }
        *block = quantize_block(v);
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn quantize_block(v: [__m256; 4]) -> QuantBlock {
    let (mut block, inverse) = QuantBlock::begin(largest(&v));
    let Some(inverse) = inverse else { return block };
    let inverse = _mm256_set1_ps(inverse);
    let mut sums = [0; 2];
    for h in 0..2 {
        let (a, b) = (words(v[2 * h], inverse), words(v[2 * h + 1], inverse));
        let ones = _mm_set1_epi16(1);
        sums[h] = sum(_mm_add_epi32(_mm_madd_epi16(a, ones), _mm_madd_epi16(b, ones)));
        // SAFETY: the codes have room for two registers of sixteen bytes.
        unsafe {
            let to = block.codes.as_mut_ptr().add(16 * h);
            _mm_storeu_si128(to.cast(), _mm_packs_epi16(a, b));
        }
    }
    block.set_sums(sums);
    block
}

/// Eight codes.
#[inline]
#[target_feature(enable = "avx2")]
fn words(v: __m256, inverse: __m256) -> __m128i {
    let v = _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse));
    _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v))
}

/// The bits of the largest magnitude: as integers, magnitudes are in the same order, with the NaNs
/// above infinity.
#[inline]
#[target_feature(enable = "avx2")]
fn largest(v: &[__m256; 4]) -> u32 {
    let magnitude = _mm256_set1_epi32(i32::MAX);
    let mut max = _mm256_setzero_si256();
    for v in v {
        max = _mm256_max_epi32(max, _mm256_and_si256(_mm256_castps_si256(*v), magnitude));
    }
    let v = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
    let v = _mm_max_epi32(v, _mm_shuffle_epi32::<0b01_00_11_10>(v));
    let v = _mm_max_epi32(v, _mm_shuffle_epi32::<0b10_11_00_01>(v));
    _mm_cvtsi128_si32(v) as u32
}

/// The sum of four lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn sum(v: __m128i) -> i32 {
    let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b01_00_11_10>(v));
    let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b10_11_00_01>(v));
    _mm_cvtsi128_si32(v)
}
