//! The portable kernels: what the vector kernels must equal bit for bit.

use super::layout::STEP;
use super::{Activations, Bits, Layout, PANEL, PanelOut, QuantBlock, rounded};
use crate::float::{bf16_to_f32, f16_to_f32};
use crate::format::{Format, IQ4_LEVELS};

/// One panel of float weights, `[cols][32 rows]`.
pub(crate) fn floats(format: Format, panel: &[u8], x: &Activations, out: &PanelOut) {
    let cols = x.cols();
    for token in out.tokens.clone() {
        let mut acc = [0.0_f32; PANEL];
        let x = &x.values()[token * cols..][..cols];
        let step = PANEL * format.block_bytes();
        for (weights, &x) in panel.chunks_exact(step).zip(x) {
            let x = if format == Format::BF16 { rounded(x) } else { x };
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = float_at(format, weights, r).mul_add(x, *acc);
            }
        }
        // SAFETY: the token is one of the call's.
        unsafe { out.store(token, &acc) };
    }
}

fn float_at(format: Format, weights: &[u8], r: usize) -> f32 {
    match format {
        Format::F16 => f16_to_f32(half_at(weights, r)),
        Format::BF16 => bf16_to_f32(half_at(weights, r)),
        _ => f32::from_le_bytes(*weights[4 * r..].first_chunk().expect("a row's element")),
    }
}

fn half_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]])
}

/// One panel of quantized weights, as described in [`super::layout`].
pub(crate) fn quantized(layout: &Layout, panel: &[u8], x: &Activations, out: &PanelOut) {
    for token in out.tokens.clone() {
        let mut acc = [0.0_f32; PANEL];
        let mut rest = panel;
        for x in x.blocks(token).chunks(layout.group()) {
            let (header, steps) = rest.split_at(layout.header_bytes());
            let (steps, after) = steps.split_at(layout.step_bytes() * layout.group());
            rest = after;
            for (step, x) in steps.chunks_exact(layout.step_bytes()).zip(x) {
                for (r, acc) in acc.iter_mut().enumerate() {
                    *acc = add_step(layout, header, step, x, r, *acc);
                }
            }
        }
        // SAFETY: the token is one of the call's.
        unsafe { out.store(token, &acc) };
    }
}

/// Adds 32 columns of one row: the definition of the arithmetic.
fn add_step(
    layout: &Layout,
    header: &[u8],
    step: &[u8],
    x: &QuantBlock,
    r: usize,
    acc: f32,
) -> f32 {
    let (scales, codes) = step.split_at(layout.scale_bytes());
    let subs = STEP / layout.sub_len;
    let halves = if layout.nested { header } else { scales };
    let d = f16_to_f32(half_at(halves, r));
    let mut sum = 0.0_f32;
    for sub in 0..subs {
        let mut dot = 0;
        for i in sub * layout.sub_len..(sub + 1) * layout.sub_len {
            dot += level_at(layout, codes, r, i) * i32::from(x.codes[i]);
        }
        let scale = if layout.nested { d * f32::from(scales[sub * PANEL + r] as i8) } else { d };
        sum = if sub == 0 { dot as f32 * scale } else { (dot as f32).mul_add(scale, sum) };
    }
    if layout.mins {
        let dmin = f16_to_f32(half_at(halves, PANEL + r));
        for sub in 0..subs {
            let min = if layout.nested {
                dmin * f32::from(scales[(subs + sub) * PANEL + r])
            } else {
                dmin
            };
            let inputs = if subs == 1 { x.sum } else { x.sums[sub] };
            sum = (-min).mul_add(inputs, sum);
        }
    }
    sum.mul_add(x.scale, acc)
}

/// The integer weight of row `r` and column `i` of a step.
fn level_at(layout: &Layout, codes: &[u8], r: usize, i: usize) -> i32 {
    let at = |v: usize| codes[(v * PANEL + r) * 4 + i % 4];
    let g = i / 4;
    let nibble = || (at(g % 4) >> (g / 4 * 4)) & 15;
    match layout.bits {
        Bits::Eight => i32::from(at(g)) - layout.zero(),
        Bits::Four => i32::from(nibble()) - layout.zero(),
        Bits::Levels => IQ4_LEVELS[usize::from(nibble())].into(),
        Bits::Five => i32::from(nibble() << 1 | (at(4) >> g) & 1) - layout.zero(),
        Bits::Six => {
            let two = (at(4 + g / 4) >> (g % 4 * 2)) & 3;
            i32::from(nibble() << 2 | two) - layout.zero()
        }
    }
}
