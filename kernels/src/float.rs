//! Half-precision floats: IEEE binary16 and bfloat16, to and from f32.
//!
//! Narrowing rounds to nearest, ties to even, as IEEE 754 and the hardware do. A NaN stays a
//! (quiet) NaN. The slice versions give the same bits as the single ones for every input.

use crate::isa::Isa;

/// binary16 bits to f32, exact.
#[inline]
pub const fn f16_to_f32(bits: u16) -> f32 {
    let sign = (bits as u32 & 0x8000) << 16;
    let exponent = (bits >> 10) & 0x1f;
    let mantissa = bits as u32 & 0x3ff;
    let magnitude = match (exponent, mantissa) {
        (0, 0) => 0,
        (0, _) => {
            let shift = mantissa.leading_zeros() - 21;
            ((113 - shift) << 23) | ((mantissa << shift) & 0x3ff) << 13
        }
        (0x1f, 0) => 0x7f80_0000,
        (0x1f, _) => 0x7fc0_0000 | mantissa << 13,
        _ => ((exponent as u32 + 112) << 23) | mantissa << 13,
    };
    f32::from_bits(sign | magnitude)
}

/// f32 to binary16 bits, nearest even; overflow becomes infinity.
#[inline]
pub const fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = ((bits >> 16) & 0x8000) as u16;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00 | ((magnitude >> 13) & 0x3ff) as u16;
    }
    if magnitude >= 0x4780_0000 {
        return sign | 0x7c00;
    }
    if magnitude < 0x3880_0000 {
        return sign | subnormal_f16(magnitude);
    }
    let rebased = magnitude - (112 << 23);
    sign | round_half_even(rebased, 13) as u16
}

/// A magnitude below 2^-14 as a multiple of 2^-24.
const fn subnormal_f16(magnitude: u32) -> u16 {
    let exponent = magnitude >> 23;
    if exponent < 102 {
        return 0;
    }
    let mantissa = (magnitude & 0x7f_ffff) | 0x80_0000;
    round_half_even(mantissa, 126 - exponent) as u16
}

const fn round_half_even(value: u32, shift: u32) -> u32 {
    let half = 1u32 << (shift - 1);
    (value + half - 1 + ((value >> shift) & 1)) >> shift
}

/// bfloat16 bits to f32, exact.
#[inline]
pub const fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// f32 to bfloat16 bits, nearest even.
#[inline]
pub const fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// Widens a slice of binary16 bits.
///
/// # Panics
/// If the lengths differ.
pub fn f16_to_f32_slice(isa: Isa, from: &[u16], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "one output for each input");
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx2 {
        isa.assert_available();
        // SAFETY: F16C is part of Avx2, which this CPU was just asserted to have.
        return unsafe { crate::arch::f16c::widen(from, to) };
    }
    #[cfg(target_arch = "aarch64")]
    if isa >= Isa::Neon {
        isa.assert_available();
        // SAFETY: the CPU was just asserted to have NEON.
        return unsafe { crate::arch::neon::widen(from, to) };
    }
    let _ = isa;
    from.iter().zip(to).for_each(|(&f, t)| *t = f16_to_f32(f));
}

/// Narrows a slice to binary16 bits.
///
/// # Panics
/// If the lengths differ.
pub fn f32_to_f16_slice(isa: Isa, from: &[f32], to: &mut [u16]) {
    assert_eq!(from.len(), to.len(), "one output for each input");
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx2 {
        isa.assert_available();
        // SAFETY: F16C is part of Avx2, which this CPU was just asserted to have.
        return unsafe { crate::arch::f16c::narrow(from, to) };
    }
    #[cfg(target_arch = "aarch64")]
    if isa >= Isa::Neon {
        isa.assert_available();
        // SAFETY: the CPU was just asserted to have NEON.
        return unsafe { crate::arch::neon::narrow(from, to) };
    }
    let _ = isa;
    from.iter().zip(to).for_each(|(&f, t)| *t = f32_to_f16(f));
}

/// Widens a slice of bfloat16 bits.
///
/// # Panics
/// If the lengths differ.
pub fn bf16_to_f32_slice(from: &[u16], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "one output for each input");
    from.iter().zip(to).for_each(|(&f, t)| *t = bf16_to_f32(f));
}

/// Narrows a slice to bfloat16 bits.
///
/// # Panics
/// If the lengths differ.
pub fn f32_to_bf16_slice(from: &[f32], to: &mut [u16]) {
    assert_eq!(from.len(), to.len(), "one output for each input");
    from.iter().zip(to).for_each(|(&f, t)| *t = f32_to_bf16(f));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Miri looks at some.
    const STEP: usize = if cfg!(miri) { 257 } else { 1 };

    #[test]
    fn every_f16_survives_the_round_trip() {
        for bits in (0..=u16::MAX).step_by(STEP) {
            let wide = f16_to_f32(bits);
            let expect = if wide.is_nan() { bits | 0x200 } else { bits };
            assert_eq!(f32_to_f16(wide), expect, "{bits:#x}");
        }
    }

    #[test]
    fn every_bf16_survives_the_round_trip() {
        for bits in (0..=u16::MAX).step_by(STEP) {
            let wide = bf16_to_f32(bits);
            let expect = if wide.is_nan() { bits | 0x40 } else { bits };
            assert_eq!(f32_to_bf16(wide), expect, "{bits:#x}");
        }
    }

    #[test]
    fn narrowing_rounds_to_nearest_even() {
        // Between neighbours a and b the midpoint goes to the even one, the rest to the nearest.
        for low in (0..0x7bff_u16).step_by(7 * STEP) {
            let (a, b) = (f16_to_f32(low), f16_to_f32(low + 1));
            let middle = (a + b) / 2.0;
            let even = if low % 2 == 0 { low } else { low + 1 };
            assert_eq!(f32_to_f16(middle), even, "{low:#x}");
            assert_eq!(f32_to_f16(middle.next_down()), low);
            assert_eq!(f32_to_f16(-middle.next_up()), (low + 1) | 0x8000);
        }
        let table = [(65519.9, 0x7bff), (65520.0, 0x7c00), (1e9, 0x7c00), (2.9e-8, 0), (3.0e-8, 1)];
        for (value, bits) in table {
            assert_eq!(f32_to_f16(value), bits, "{value}");
        }
        let table = [
            (1.0, 0x3f80),
            (1.0 + 1.0 / 256.0, 0x3f80),
            (1.0 + 3.0 / 256.0, 0x3f82),
            (3.4e38, 0x7f80),
        ];
        for (value, bits) in table {
            assert_eq!(f32_to_bf16(value), bits, "{value}");
        }
    }

    #[test]
    fn slices_agree_with_single_values_on_every_isa() {
        let halves: Vec<u16> = (0..=u16::MAX).step_by(STEP).collect();
        let odd = (0..100_003u32).step_by(STEP).map(|i| f32::from_bits(i * 42_899));
        let odd: Vec<f32> = odd.collect();
        for isa in Isa::available() {
            let mut wide = vec![0.0; halves.len()];
            f16_to_f32_slice(isa, &halves, &mut wide);
            for (&h, w) in halves.iter().zip(&wide) {
                assert_eq!(f16_to_f32(h).to_bits(), w.to_bits(), "{isa} {h:#x}");
            }
            let mut narrow = vec![0; odd.len()];
            f32_to_f16_slice(isa, &odd, &mut narrow);
            for (&o, n) in odd.iter().zip(&narrow) {
                assert_eq!(f32_to_f16(o), *n, "{isa} {:#x}", o.to_bits());
            }
        }
    }
}
