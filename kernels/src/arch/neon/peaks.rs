//! What the arithmetic units do at best: rounds of instructions that wait for nothing but
//! themselves. Each gives the operations of a round; a multiply-add is two.

use std::arch::aarch64::*;
use std::hint::black_box;

use super::dot::{sdot, smmla};
use crate::isa::Isa;

/// Fused multiply-adds of f32.
///
/// # Safety
/// The CPU has NEON.
#[target_feature(enable = "neon")]
pub unsafe fn fma_rounds(rounds: u64) -> u64 {
    let (a, b) = (vdupq_n_f32(black_box(0.5)), vdupq_n_f32(black_box(0.25)));
    let mut acc = [vdupq_n_f32(1.0); CHAINS];
    for _ in 0..rounds {
        for chain in &mut acc {
            *chain = vfmaq_f32(b, *chain, a);
        }
    }
    black_box(acc);
    (CHAINS * 4 * 2) as u64
}

/// Dots of bytes, with the instruction that products of many tokens use.
///
/// # Safety
/// The CPU has the instruction set, [`Isa::NeonDot`] or [`Isa::NeonI8mm`].
pub unsafe fn dot_rounds(isa: Isa, rounds: u64) -> u64 {
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn dotprod(rounds: u64) {
        let (a, b) = (vdupq_n_s8(black_box(3)), vdupq_n_s8(black_box(-5)));
        let mut acc = [vdupq_n_s32(0); CHAINS];
        for _ in 0..rounds {
            // SAFETY: the features are those of this function.
            acc = acc.map(|chain| unsafe { sdot::<0>(chain, a, b) });
        }
        black_box(acc);
    }
    #[target_feature(enable = "neon,i8mm")]
    unsafe fn i8mm(rounds: u64) {
        let (a, b) = (vdupq_n_s8(black_box(3)), vdupq_n_s8(black_box(-5)));
        let mut acc = [vdupq_n_s32(0); CHAINS];
        for _ in 0..rounds {
            // SAFETY: the features are those of this function.
            acc = acc.map(|chain| unsafe { smmla(chain, a, b) });
        }
        black_box(acc);
    }
    // SAFETY: promised by the caller.
    unsafe {
        if isa == Isa::NeonI8mm {
            i8mm(rounds);
            return (CHAINS * 32 * 2) as u64;
        }
        dotprod(rounds);
    }
    (CHAINS * 16 * 2) as u64
}

/// Enough independent chains to hide the latency of the instructions.
const CHAINS: usize = 16;
