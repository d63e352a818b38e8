//! Matrix products with AVX-512 and VNNI.
//!
//! A tile is one panel, 32 rows in two registers, times a few tokens: their sums stay in registers
//! over all columns. Each vector of weights is loaded (and unpacked) once for the tile and met by
//! four inputs of each token, broadcast from memory.
//!
//! Codes are unpacked to where they are cheapest to get: in the upper bits of a byte. Four-bit
//! codes come out times 16 and six-bit ones times 4, which the scale takes back; both are powers
//! of two, so no bit of the result changes. All codes then have their zero at 128, or at 0.

use std::arch::x86_64::*;

use crate::format::IQ4_LEVELS;
use crate::linear::{Activations, Bits, PANEL, PanelOut, QuantBlock, STEP, Shape};

mod floats;
mod inputs;

pub(crate) use floats::floats;
pub(crate) use inputs::quantize_row;

/// One panel of quantized weights, for all tokens.
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL, DQ and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
pub unsafe fn quantized<S: Shape>(panel: &[u8], x: &Activations, out: &PanelOut) {
    assert_eq!(panel.len(), S::LAYOUT.panel_bytes(x.cols()), "a whole panel");
    let mut token = 0;
    while token < x.tokens() {
        // SAFETY: the features are those of this function, the panel was just checked, and no
        // tile reaches beyond the last token.
        unsafe {
            token += match x.tokens() - token {
                1 => tile::<S, 1>(panel, x, token, out),
                2 => tile::<S, 2>(panel, x, token, out),
                3 => tile::<S, 3>(panel, x, token, out),
                4 | 7 | 8 => tile::<S, 4>(panel, x, token, out),
                5 => tile::<S, 5>(panel, x, token, out),
                _ => tile::<S, 6>(panel, x, token, out),
            }
        }
    }
}

/// Tokens `token..token + T`; gives `T`.
///
/// # Safety
/// The features of [`quantized`]; `panel` has the length that the layout asks for and the tokens
/// are in `x`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn tile<S: Shape, const T: usize>(
    panel: &[u8],
    x: &Activations,
    token: usize,
    out: &PanelOut,
) -> usize {
    let inputs: [*const QuantBlock; T] = std::array::from_fn(|t| x.blocks(token + t).as_ptr());
    let layout = const { S::LAYOUT };
    let mut acc = [[_mm512_setzero_ps(); 2]; T];
    let mut at = panel.as_ptr();
    let mut block = 0;
    while block < x.cols() / STEP {
        let header = at;
        // SAFETY: a panel is a row of groups, each a header and then its steps, and there are as
        // many steps as blocks of inputs; all loads below stay inside of the step or the header.
        unsafe {
            at = at.add(layout.header_bytes());
            for _ in 0..layout.group() {
                let x = inputs.map(|x| x.add(block));
                step::<S, T>(header, at, &x, &mut acc);
                at = at.add(layout.step_bytes());
                block += 1;
            }
        }
    }
    store(&acc, token, out);
    T
}

/// Hands the sums of a tile over.
#[inline]
#[target_feature(enable = "avx512f")]
fn store<const T: usize>(acc: &[[__m512; 2]; T], token: usize, out: &PanelOut) {
    for (t, acc) in acc.iter().enumerate() {
        let mut values = [0.0; PANEL];
        // SAFETY: `values` has room for two registers, and the token is one of the call's.
        unsafe {
            _mm512_storeu_ps(values.as_mut_ptr(), acc[0]);
            _mm512_storeu_ps(values.as_mut_ptr().add(16), acc[1]);
            out.store(token + t, &values);
        }
    }
}

/// Adds 32 columns to the sums.
///
/// # Safety
/// The features of [`quantized`]; the pointers lead to a whole header, step and blocks.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn step<S: Shape, const T: usize>(
    header: *const u8,
    at: *const u8,
    x: &[*const QuantBlock; T],
    acc: &mut [[__m512; 2]; T],
) {
    let layout = const { S::LAYOUT };
    // SAFETY: offsets are those of the layout, inside of what the caller vouches for.
    unsafe {
        let codes = at.add(layout.scale_bytes());
        if layout.sub_len == STEP {
            let mut dots = start::<S, T>(x, |x| &raw const (*x).offset);
            dot::<S, T>(codes, 0, x, &mut dots);
            dot::<S, T>(codes, 1, x, &mut dots);
            let scale = scales::<S>(header, at, 0);
            for t in 0..T {
                let dx = _mm512_set1_ps((*x[t]).scale);
                for h in 0..2 {
                    let mut sum = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[t][h]), scale[h]);
                    if layout.mins {
                        let inputs = _mm512_set1_ps((*x[t]).sum);
                        sum = _mm512_fnmadd_ps(mins::<S>(header, at, 0)[h], inputs, sum);
                    }
                    acc[t][h] = _mm512_fmadd_ps(sum, dx, acc[t][h]);
                }
            }
        } else {
            let mut first = start::<S, T>(x, |x| &raw const (*x).offsets[0]);
            dot::<S, T>(codes, 0, x, &mut first);
            let scale = scales::<S>(header, at, 0);
            let mut sums = [[_mm512_setzero_ps(); 2]; T];
            for t in 0..T {
                for h in 0..2 {
                    sums[t][h] = _mm512_mul_ps(_mm512_cvtepi32_ps(first[t][h]), scale[h]);
                }
            }
            let mut second = start::<S, T>(x, |x| &raw const (*x).offsets[1]);
            dot::<S, T>(codes, 1, x, &mut second);
            let scale = scales::<S>(header, at, 1);
            for t in 0..T {
                let dx = _mm512_set1_ps((*x[t]).scale);
                for h in 0..2 {
                    let dot = _mm512_cvtepi32_ps(second[t][h]);
                    let mut sum = _mm512_fmadd_ps(dot, scale[h], sums[t][h]);
                    if layout.mins {
                        for sub in 0..2 {
                            let inputs = _mm512_set1_ps((*x[t]).sums[sub]);
                            sum = _mm512_fnmadd_ps(mins::<S>(header, at, sub)[h], inputs, sum);
                        }
                    }
                    acc[t][h] = _mm512_fmadd_ps(sum, dx, acc[t][h]);
                }
            }
        }
    }
}

/// What the dots begin with: what codes with their zero at 128 would add too much.
///
/// # Safety
/// The features of [`quantized`]; `offset` leads to an integer of the block.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn start<S: Shape, const T: usize>(
    x: &[*const QuantBlock; T],
    offset: impl Fn(*const QuantBlock) -> *const i32,
) -> [[__m512i; 2]; T] {
    x.map(|x| {
        if const { S::LAYOUT.mins } {
            return [_mm512_setzero_si512(); 2];
        }
        // SAFETY: promised by the caller.
        [_mm512_set1_epi32(unsafe { *offset(x) }); 2]
    })
}

/// Adds the products of the first (`part` 0) or last 16 columns of a step.
///
/// # Safety
/// The features of [`quantized`]; the pointers lead to the codes of a step and to whole blocks.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn dot<S: Shape, const T: usize>(
    codes: *const u8,
    part: usize,
    x: &[*const QuantBlock; T],
    dots: &mut [[__m512i; 2]; T],
) {
    let half = const { S::LAYOUT.bits.vectors() * 64 };
    for v in 0..4 {
        // SAFETY: a half has `vectors` registers of codes and a block 32 inputs.
        unsafe {
            let low = unpack::<S>(codes, part, v);
            let high = unpack::<S>(codes.add(half), part, v);
            for t in 0..T {
                let x = (&raw const (*x[t]).codes).cast::<i32>().add(4 * part + v);
                let x = _mm512_set1_epi32(x.read());
                dots[t][0] = _mm512_dpbusd_epi32(dots[t][0], low, x);
                dots[t][1] = _mm512_dpbusd_epi32(dots[t][1], high, x);
            }
        }
    }
}

/// The codes of 16 rows and the columns `16 * part + 4 * v ..` as bytes.
///
/// # Safety
/// The features of [`quantized`]; `half` leads to the codes of 16 rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn unpack<S: Shape>(half: *const u8, part: usize, v: usize) -> __m512i {
    // SAFETY: register numbers are below the `vectors` of the layout.
    let load = |v: usize| unsafe { _mm512_loadu_si512(half.add(64 * v).cast()) };
    let upper = _mm512_set1_epi8(0xf0_u8 as i8);
    let nibble = |v: usize| {
        let codes = if part == 0 { _mm512_slli_epi16::<4>(load(v)) } else { load(v) };
        _mm512_and_si512(codes, upper)
    };
    match const { S::LAYOUT.bits } {
        Bits::Eight => load(4 * part + v),
        Bits::Four => nibble(v),
        Bits::Levels => {
            let codes = if part == 0 { load(v) } else { _mm512_srli_epi16::<4>(load(v)) };
            let codes = _mm512_and_si512(codes, _mm512_set1_epi8(15));
            _mm512_shuffle_epi8(levels(), codes)
        }
        Bits::Six => {
            let two = load(4 + part);
            let two = match v {
                0 => _mm512_slli_epi16::<2>(two),
                1 => two,
                2 => _mm512_srli_epi16::<2>(two),
                _ => _mm512_srli_epi16::<4>(two),
            };
            let two = _mm512_and_si512(two, _mm512_set1_epi8(0x0c));
            _mm512_or_si512(nibble(v), two)
        }
    }
}

/// The IQ4 levels with their zero at 128.
#[inline]
#[target_feature(enable = "avx512f")]
fn levels() -> __m512i {
    const TABLE: [u8; 16] = {
        let mut table = [0; 16];
        let mut i = 0;
        while i < 16 {
            table[i] = (IQ4_LEVELS[i] as i16 + 128) as u8;
            i += 1;
        }
        table
    };
    // SAFETY: the table has sixteen bytes.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(TABLE.as_ptr().cast()) })
}

/// The scales of 32 rows for the unpacked codes of a sub-block.
///
/// # Safety
/// The features of [`quantized`]; the pointers lead to a whole header and step.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,f16c,fma")]
unsafe fn scales<S: Shape>(header: *const u8, at: *const u8, sub: usize) -> [__m512; 2] {
    let layout = const { S::LAYOUT };
    let unshift = _mm512_set1_ps(match layout.bits {
        Bits::Four => 1.0 / 16.0,
        Bits::Six => 1.0 / 4.0,
        Bits::Levels | Bits::Eight => 1.0,
    });
    std::array::from_fn(|h| {
        // SAFETY: the layout begins with these scales.
        unsafe {
            if !layout.nested {
                return _mm512_mul_ps(halves(at, h), unshift);
            }
            let scale = _mm_loadu_si128(at.add(PANEL * sub + 16 * h).cast());
            let scale = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(scale));
            _mm512_mul_ps(_mm512_mul_ps(halves(header, h), scale), unshift)
        }
    })
}

/// The minimums of 32 rows for a sub-block.
///
/// # Safety
/// The features of [`quantized`]; the pointers lead to a whole header and step of a layout with
/// minimums.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,f16c,fma")]
unsafe fn mins<S: Shape>(header: *const u8, at: *const u8, sub: usize) -> [__m512; 2] {
    let layout = const { S::LAYOUT };
    std::array::from_fn(|h| {
        // SAFETY: the layout has these minimums behind the scales.
        unsafe {
            if !layout.nested {
                return halves(at.add(2 * PANEL), h);
            }
            let subs = STEP / layout.sub_len;
            let min = _mm_loadu_si128(at.add(PANEL * (subs + sub) + 16 * h).cast());
            let min = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(min));
            _mm512_mul_ps(halves(header.add(2 * PANEL), h), min)
        }
    })
}

/// Binary16 numbers of the rows `16 * h ..`.
///
/// # Safety
/// The features of [`quantized`]; 32 of them are at `from`.
#[inline]
#[target_feature(enable = "avx512f,f16c")]
unsafe fn halves(from: *const u8, h: usize) -> __m512 {
    // SAFETY: promised by the caller.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.add(32 * h).cast()) })
}
