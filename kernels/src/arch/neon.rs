//! Matrix products with NEON.
//!
//! A tile is one panel times up to eight tokens, a few registers of four rows at a time. Codes are
//! unpacked to the lower bits of a byte, where they are signed numbers that are too large by the
//! layout's zero, which the sums begin with; eight-bit ones are made signed instead. A register of
//! codes is four columns of four rows, so that dots of four bytes ([`Dot`]) add up in the lanes of
//! the rows.

use std::arch::aarch64::*;
use std::array::from_fn;

use crate::format::IQ4_LEVELS;
use crate::isa::Isa;
use crate::linear::{Activations, Bits, PANEL, PanelOut, QuantBlock, STEP, Shape};

mod dot;
mod floats;
mod halves;
mod inputs;
mod peaks;

use dot::{Base, Dot, Dotprod, I8mm};
pub(crate) use floats::floats;
pub(crate) use halves::{narrow, widen};
pub(crate) use inputs::quantize_row;
pub(crate) use peaks::{dot_rounds, fma_rounds};

/// One panel of quantized weights.
///
/// # Safety
/// The CPU has the instruction set, which is one of NEON.
pub unsafe fn quantized<S: Shape>(isa: Isa, panel: &[u8], x: &Activations, out: &PanelOut) {
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn dotprod<S: Shape>(panel: &[u8], x: &Activations, out: &PanelOut) {
        // SAFETY: the features are those of this function.
        unsafe { tiles::<S, Dotprod>(panel, x, out) }
    }
    #[target_feature(enable = "neon,dotprod,i8mm")]
    unsafe fn i8mm<S: Shape>(panel: &[u8], x: &Activations, out: &PanelOut) {
        // SAFETY: the features are those of this function.
        unsafe { tiles::<S, I8mm>(panel, x, out) }
    }
    // SAFETY: promised by the caller.
    unsafe {
        match isa {
            Isa::NeonI8mm => i8mm::<S>(panel, x, out),
            Isa::NeonDot => dotprod::<S>(panel, x, out),
            _ => tiles::<S, Base>(panel, x, out),
        }
    }
}

/// Tiles of tokens whose integer dots, of `R` registers of rows, fit into the registers.
///
/// # Safety
/// The CPU has what `D` asks for.
#[inline(always)]
unsafe fn tiles<S: Shape, D: Dot>(panel: &[u8], x: &Activations, out: &PanelOut) {
    assert_eq!(panel.len(), S::LAYOUT.panel_bytes(x.cols()), "a whole panel");
    let (mut token, end) = (out.tokens.start, out.tokens.end);
    while token < end {
        // SAFETY: the CPU is the caller's promise, the panel was just checked, and no tile reaches
        // beyond the last token.
        unsafe {
            token += match end - token {
                1 => tile::<S, D, 1, 8>(panel, x, token, out),
                2 | 3 => tile::<S, D, 2, 4>(panel, x, token, out),
                8.. if const { D::TOKENS == 8 } => tile::<S, D, 8, 2>(panel, x, token, out),
                _ => tile::<S, D, 4, 2>(panel, x, token, out),
            }
        }
    }
}

/// Tokens `token..token + T`; gives `T`.
///
/// # Safety
/// The CPU has what `D` asks for; `panel` has the length that the layout asks for and the tokens
/// are in `x`.
#[inline(always)]
unsafe fn tile<S: Shape, D: Dot, const T: usize, const R: usize>(
    panel: &[u8],
    x: &Activations,
    token: usize,
    out: &PanelOut,
) -> usize {
    let inputs: [*const QuantBlock; T] = from_fn(|t| x.blocks(token + t).as_ptr());
    let layout = const { S::LAYOUT };
    // SAFETY: the CPU is the caller's promise.
    let mut acc = [[unsafe { vdupq_n_f32(0.0) }; REGISTERS]; T];
    let mut at = panel.as_ptr();
    let mut block = 0;
    while block < x.cols() / STEP {
        let header = at;
        // SAFETY: a panel is a row of groups, each a header and then its steps, and there are as
        // many steps as blocks of inputs; all loads below stay inside of the step or the header.
        unsafe {
            at = at.add(layout.header_bytes());
            for _ in 0..layout.group() {
                let x = inputs.map(|x| &*x.add(block));
                for rows in 0..const { REGISTERS / R } {
                    step::<S, D, T, R>(header, at, R * rows, &x, &mut acc);
                }
                at = at.add(layout.step_bytes());
                block += 1;
            }
        }
    }
    for (t, acc) in acc.iter().enumerate() {
        let mut values = [0.0; PANEL];
        // SAFETY: `values` has room for all registers, and the token is one of the call's.
        unsafe {
            for (q, acc) in acc.iter().enumerate() {
                vst1q_f32(values.as_mut_ptr().add(4 * q), *acc);
            }
            out.store(token + t, &values);
        }
    }
    T
}

/// Adds 32 columns to the sums of the rows in the registers `first..first + R`.
///
/// # Safety
/// The CPU has what `D` asks for; the pointers lead to a whole header and step.
#[inline(always)]
unsafe fn step<S: Shape, D: Dot, const T: usize, const R: usize>(
    header: *const u8,
    at: *const u8,
    first: usize,
    x: &[&QuantBlock; T],
    acc: &mut [[float32x4_t; REGISTERS]; T],
) {
    // SAFETY: offsets are those of the layout, inside of what the caller vouches for.
    unsafe {
        let codes = at.add(const { S::LAYOUT.scale_bytes() } + 16 * first);
        let mut sums = [[vdupq_n_f32(0.0); T]; R];
        if const { S::LAYOUT.sub_len == STEP } {
            let mut dots = [D::start(x.map(|x| start::<S, D>(x.offset))); R];
            part::<S, D, T, R>(codes, 0, x, &mut dots);
            part::<S, D, T, R>(codes, 1, x, &mut dots);
            for r in 0..R {
                let scale = scales::<S>(header, at, 0, first + r);
                let dots = D::finish(dots[r]);
                sums[r] = dots.map(|dot| vmulq_f32(vcvtq_f32_s32(dot), scale));
            }
        } else {
            let mut dots = [D::start(x.map(|x| start::<S, D>(x.offsets[0]))); R];
            part::<S, D, T, R>(codes, 0, x, &mut dots);
            for r in 0..R {
                let scale = scales::<S>(header, at, 0, first + r);
                let dots = D::finish(dots[r]);
                sums[r] = dots.map(|dot| vmulq_f32(vcvtq_f32_s32(dot), scale));
            }
            let mut dots = [D::start(x.map(|x| start::<S, D>(x.offsets[1]))); R];
            part::<S, D, T, R>(codes, 1, x, &mut dots);
            for r in 0..R {
                let scale = scales::<S>(header, at, 1, first + r);
                let dots = D::finish(dots[r]);
                sums[r] = from_fn(|t| vfmaq_f32(sums[r][t], vcvtq_f32_s32(dots[t]), scale));
            }
        }
        if const { S::LAYOUT.mins } {
            for sub in 0..const { STEP / S::LAYOUT.sub_len } {
                let whole = const { S::LAYOUT.sub_len == STEP };
                for r in 0..R {
                    let min = mins::<S>(header, at, sub, first + r);
                    for t in 0..T {
                        let inputs = if whole { x[t].sum } else { x[t].sums[sub] };
                        sums[r][t] = vfmsq_n_f32(sums[r][t], min, inputs);
                    }
                }
            }
        }
        for t in 0..T {
            for r in 0..R {
                acc[t][first + r] = vfmaq_n_f32(acc[t][first + r], sums[r][t], x[t].scale);
            }
        }
    }
}

/// What codes that are too large by the layout's zero would add too much. `offset` is -128 times
/// the sum of the inputs; a zero of 8, 16 or 32 takes a part of it, without a rest.
#[inline(always)]
fn start<S: Shape, D: Dot>(offset: i32) -> i32 {
    match const { S::LAYOUT.bits } {
        _ if const { S::LAYOUT.mins } => 0,
        Bits::Levels => 0,
        Bits::Eight => {
            if const { D::UNSIGNED } {
                offset
            } else {
                0
            }
        }
        Bits::Four => offset >> 4,
        Bits::Five => offset >> 3,
        Bits::Six => offset >> 2,
    }
}

/// Adds the products of the first (`part` 0) or last 16 columns of a step.
///
/// # Safety
/// The CPU has what `D` asks for; `codes` leads to the first register of rows in the codes of a
/// step.
#[inline(always)]
unsafe fn part<S: Shape, D: Dot, const T: usize, const R: usize>(
    codes: *const u8,
    part: usize,
    x: &[&QuantBlock; T],
    dots: &mut [[int32x4_t; T]; R],
) {
    // SAFETY: a block has 32 inputs, a piece 16 bytes for each four rows.
    unsafe {
        let inputs = D::inputs(x.map(|x| vld1q_s8(x.codes.as_ptr().add(16 * part))));
        for (r, dots) in dots.iter_mut().enumerate() {
            let codes = from_fn(|v| unpack::<S, D>(codes.add(16 * r), part, v));
            D::add::<S, T>(&codes, &inputs, dots);
        }
    }
}

/// The codes of four rows and the columns `16 * part + 4 * v ..` as bytes.
///
/// # Safety
/// The CPU has NEON; `codes` leads to the rows' codes of a step.
#[inline(always)]
unsafe fn unpack<S: Shape, D: Dot>(codes: *const u8, part: usize, v: usize) -> int8x16_t {
    // SAFETY: pieces are those of the layout.
    unsafe {
        let load = |piece: usize| vld1q_u8(codes.add(4 * PANEL * piece));
        let nibbles = || match part {
            0 => vandq_u8(load(v), vdupq_n_u8(15)),
            _ => vshrq_n_u8::<4>(load(v)),
        };
        vreinterpretq_s8_u8(match const { S::LAYOUT.bits } {
            Bits::Eight if const { D::UNSIGNED } => load(4 * part + v),
            Bits::Eight => veorq_u8(load(4 * part + v), vdupq_n_u8(0x80)),
            Bits::Four => nibbles(),
            Bits::Levels => {
                let levels = vld1q_s8(IQ4_LEVELS.as_ptr());
                vqtbl1q_u8(vreinterpretq_u8_s8(levels), nibbles())
            }
            // Inserts the upper bits above the lowest ones, which need not be alone in their byte.
            Bits::Five => {
                let one = load(4);
                let one = match 4 * part + v {
                    0 => one,
                    1 => vshrq_n_u8::<1>(one),
                    2 => vshrq_n_u8::<2>(one),
                    3 => vshrq_n_u8::<3>(one),
                    4 => vshrq_n_u8::<4>(one),
                    5 => vshrq_n_u8::<5>(one),
                    6 => vshrq_n_u8::<6>(one),
                    _ => vshrq_n_u8::<7>(one),
                };
                vsliq_n_u8::<1>(one, nibbles())
            }
            Bits::Six => {
                let two = load(4 + part);
                let two = match v {
                    0 => two,
                    1 => vshrq_n_u8::<2>(two),
                    2 => vshrq_n_u8::<4>(two),
                    _ => vshrq_n_u8::<6>(two),
                };
                vsliq_n_u8::<2>(two, nibbles())
            }
        })
    }
}

/// The scales of the rows `4 * q ..` for a sub-block.
///
/// # Safety
/// The CPU has NEON; the pointers lead to a whole header and step.
#[inline(always)]
unsafe fn scales<S: Shape>(header: *const u8, at: *const u8, sub: usize, q: usize) -> float32x4_t {
    let layout = const { S::LAYOUT };
    // SAFETY: the layout begins with these scales.
    unsafe {
        if !layout.nested {
            return halves(at, q);
        }
        let scale = vreinterpret_s8_u32(bytes(at.add(PANEL * sub), q));
        let scale = vmovl_s16(vget_low_s16(vmovl_s8(scale)));
        vmulq_f32(halves(header, q), vcvtq_f32_s32(scale))
    }
}

/// The minimums of the rows `4 * q ..` for a sub-block.
///
/// # Safety
/// The CPU has NEON; the pointers lead to a whole header and step of a layout with minimums.
#[inline(always)]
unsafe fn mins<S: Shape>(header: *const u8, at: *const u8, sub: usize, q: usize) -> float32x4_t {
    let layout = const { S::LAYOUT };
    // SAFETY: the layout has these minimums behind the scales.
    unsafe {
        if !layout.nested {
            return halves(at.add(2 * PANEL), q);
        }
        let subs = STEP / layout.sub_len;
        let min = vreinterpret_u8_u32(bytes(at.add(PANEL * (subs + sub)), q));
        let min = vmovl_u16(vget_low_u16(vmovl_u8(min)));
        vmulq_f32(halves(header.add(2 * PANEL), q), vcvtq_f32_u32(min))
    }
}

/// The bytes of the rows `4 * q ..`, twice.
///
/// # Safety
/// The CPU has NEON; 32 bytes are at `from`.
#[inline(always)]
unsafe fn bytes(from: *const u8, q: usize) -> uint32x2_t {
    // SAFETY: promised by the caller.
    unsafe { vdup_n_u32(from.add(4 * q).cast::<u32>().read_unaligned()) }
}

/// Binary16 numbers of the rows `4 * q ..`.
///
/// # Safety
/// The CPU has NEON; 32 of them are at `from`.
#[inline(always)]
unsafe fn halves(from: *const u8, q: usize) -> float32x4_t {
    // SAFETY: promised by the caller.
    unsafe { vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from.add(8 * q).cast()))) }
}

/// Registers of the rows of a panel.
const REGISTERS: usize = PANEL / 4;
