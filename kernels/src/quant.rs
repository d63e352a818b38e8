//! Quantization while loading, for models that come as floats.
//!
//! The same bits as `gguf.quants.quantize`: all arithmetic in f32, Q8_0 rounds halves away from
//! zero, Q4_0 truncates after adding 8.5.

use crate::float::f32_to_f16;
use crate::format::{Format, LengthError, check_lengths};

/// Quantizes to Q8_0 blocks: 32 values become a binary16 scale and 32 signed bytes.
pub fn quantize_q8_0(values: &[f32], out: &mut [u8]) -> Result<(), LengthError> {
    check_lengths(Format::Q8_0, out.len(), values.len())?;
    let (blocks, _) = values.as_chunks::<32>();
    for (block, out) in blocks.iter().zip(out.chunks_exact_mut(34)) {
        let d = block.iter().fold(0.0_f32, |max, v| max.max(v.abs())) / 127.0;
        let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
        out[..2].copy_from_slice(&f32_to_f16(d).to_le_bytes());
        for (v, o) in block.iter().zip(&mut out[2..]) {
            *o = (v * inverse).round() as i8 as u8;
        }
    }
    Ok(())
}

/// Quantizes to Q4_0 blocks: 32 values become a binary16 scale and 32 nibbles.
pub fn quantize_q4_0(values: &[f32], out: &mut [u8]) -> Result<(), LengthError> {
    check_lengths(Format::Q4_0, out.len(), values.len())?;
    let (blocks, _) = values.as_chunks::<32>();
    for (block, out) in blocks.iter().zip(out.chunks_exact_mut(18)) {
        // The first of the largest magnitudes keeps its sign: it becomes the code 0, level -8.
        let extreme =
            block.iter().fold(block[0], |max, &v| if v.abs() > max.abs() { v } else { max });
        let d = extreme / -8.0;
        let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
        out[..2].copy_from_slice(&f32_to_f16(d).to_le_bytes());
        let code = |v: f32| ((v * inverse + 8.5) as u8).min(15);
        for i in 0..16 {
            out[2 + i] = code(block[i]) | code(block[i + 16]) << 4;
        }
    }
    Ok(())
}
