//! Inputs as eight-bit integers, a block of 32 at a time.

use std::arch::aarch64::*;
use std::array::from_fn;

use crate::linear::{QuantBlock, STEP};

/// Quantizes the inputs of one token: the bits of the portable version.
///
/// # Safety
/// The CPU has NEON.
#[target_feature(enable = "neon")]
pub unsafe fn quantize_row(values: &[f32], blocks: &mut [QuantBlock]) {
    for (values, block) in values.as_chunks::<STEP>().0.iter().zip(blocks) {
        // SAFETY: a block has 32 values, eight registers.
        let v = from_fn(|i| unsafe { vld1q_f32(values.as_ptr().add(4 * i)) });
        *block = quantize_block(v);
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn quantize_block(v: [float32x4_t; 8]) -> QuantBlock {
    let mut largest = vdupq_n_u32(0);
    for v in v {
        largest = vmaxq_u32(largest, vreinterpretq_u32_f32(vabsq_f32(v)));
    }
    let (mut block, inverse) = QuantBlock::begin(vmaxvq_u32(largest));
    let Some(inverse) = inverse else { return block };
    let mut sums = [0; 2];
    for h in 0..2 {
        let mut words = [vdupq_n_s32(0); 4];
        for i in 0..4 {
            words[i] = vcvtnq_s32_f32(vmulq_n_f32(v[4 * h + i], inverse));
        }
        let low = vcombine_s16(vmovn_s32(words[0]), vmovn_s32(words[1]));
        let high = vcombine_s16(vmovn_s32(words[2]), vmovn_s32(words[3]));
        let codes = vcombine_s8(vmovn_s16(low), vmovn_s16(high));
        sums[h] = i32::from(vaddlvq_s8(codes));
        // SAFETY: the codes have room for two registers of sixteen bytes.
        unsafe { vst1q_s8(block.codes.as_mut_ptr().add(16 * h), codes) };
    }
    block.set_sums(sums);
    block
}
