//! Matrix products with AVX-512 and VNNI.
//!
//! A tile is one panel, 32 rows in two registers, times a few tokens: their sums stay in registers
//! over all columns. Each vector of weights is loaded (and unpacked) once for the tile and met by
//! four inputs of each token, broadcast from memory.
//!
//! Codes are unpacked to where they are cheapest to get: in the upper bits of a byte. Four-bit
//! codes come out times 16, five-bit ones times 8 and six-bit ones times 4, which the scale takes
//! back; all are powers of two, so no bit of the result changes. All codes then have their zero at 128, or at 0.

use std::arch::x86_64::*;

use crate::format::IQ4_LEVELS;
use crate::linear::{Activations, Bits, PANEL, PanelOut, QuantBlock, STEP, Shape};

mod floats;
mod inputs;

pub(crate) use floats::{floats, pairs, pairs_agree};
pub(crate) use inputs::{pair_row, quantize_row};

/// One panel of quantized weights.
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL, DQ and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
pub unsafe fn quantized<S: Shape>(panel: &[u8], x: &Activations, out: &PanelOut) {
    assert_eq!(panel.len(), S::LAYOUT.panel_bytes(x.cols()), "a whole panel");
    // Eight tokens do not leave registers for all sums, but half of those are used only once a step;
    // with more scales than one for a step and row, six are faster.
    let wide = const { !S::LAYOUT.nested && !S::LAYOUT.mins };
    let (mut token, end) = (out.tokens.start, out.tokens.end);
    while token < end {
        // SAFETY: the features are those of this function, the panel was just checked, and no
        // tile reaches beyond the last token.
        unsafe {
            token += match end - token {
                1 => tile::<S, 1>(panel, x, token, out),
                2 => tile::<S, 2>(panel, x, token, out),
                3 => tile::<S, 3>(panel, x, token, out),
                4 | 7 => tile::<S, 4>(panel, x, token, out),
                5 => tile::<S, 5>(panel, x, token, out),
                8 if !wide => tile::<S, 4>(panel, x, token, out),
                6 => tile::<S, 6>(panel, x, token, out),
                _ if wide => tile::<S, 8>(panel, x, token, out),
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
                if token == out.tokens.start {
                    ask::<S, T>(at);
                }
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

/// Asks for what the steps after this one read, as [`prefetch`] does. Where a step takes less time than its
/// memory, its first line is enough, since the hardware follows, and to ask for each is slower; six bits
/// take the longest to unpack and want theirs earlier. Measured on Zen 4 (docs/benchmarks.md).
#[inline]
#[target_feature(enable = "avx512f")]
fn ask<S: Shape, const T: usize>(at: *const u8) {
    let bits = const { S::LAYOUT.bits };
    let bytes = match bits {
        Bits::Four | Bits::Levels | Bits::Eight if T <= 2 => 1,
        _ => const { S::LAYOUT.step_bytes() },
    };
    prefetch(at.wrapping_add(if bits == Bits::Six { PREFETCH } else { 0 }), bytes);
}

/// Asks for the memory that the steps (or columns) after this one read. The hardware stops at the
/// end of each page, and looks too few lines ahead for kernels that compute while they read. Into
/// the second cache: there is room for what comes early, and the first has other work. The first tile
/// of every call asks: since the call before, which had other tokens, other panels went through.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(at: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(PREFETCH + line).cast());
    }
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
    // SAFETY: offsets are those of the layout, inside of what the caller vouches for.
    unsafe {
        let codes = at.add(const { S::LAYOUT.scale_bytes() });
        let mut sums = [[_mm512_setzero_ps(); 2]; T];
        if const { S::LAYOUT.sub_len == STEP } {
            let mut dots = start::<S, T>(x, 0);
            dot::<S, T>(codes, 0, x, &mut dots);
            dot::<S, T>(codes, 1, x, &mut dots);
            scale::<T, false>(&dots, scales::<S>(header, at, 0), &mut sums);
        } else {
            let mut dots = start::<S, T>(x, 1);
            dot::<S, T>(codes, 0, x, &mut dots);
            scale::<T, false>(&dots, scales::<S>(header, at, 0), &mut sums);
            let mut dots = start::<S, T>(x, 2);
            dot::<S, T>(codes, 1, x, &mut dots);
            scale::<T, true>(&dots, scales::<S>(header, at, 1), &mut sums);
        }
        if const { S::LAYOUT.mins } {
            for sub in 0..const { STEP / S::LAYOUT.sub_len } {
                let mins = mins::<S>(header, at, sub);
                for t in 0..T {
                    let whole = const { S::LAYOUT.sub_len == STEP };
                    let inputs = if whole { (*x[t]).sum } else { (*x[t]).sums[sub] };
                    let inputs = _mm512_set1_ps(inputs);
                    sums[t][0] = _mm512_fnmadd_ps(mins[0], inputs, sums[t][0]);
                    sums[t][1] = _mm512_fnmadd_ps(mins[1], inputs, sums[t][1]);
                }
            }
        }
        for t in 0..T {
            let dx = _mm512_set1_ps((*x[t]).scale);
            acc[t][0] = _mm512_fmadd_ps(sums[t][0], dx, acc[t][0]);
            acc[t][1] = _mm512_fmadd_ps(sums[t][1], dx, acc[t][1]);
        }
    }
}

/// Makes sums of dots and their scales, or adds to them.
#[inline]
#[target_feature(enable = "avx512f")]
fn scale<const T: usize, const ADD: bool>(
    dots: &[[__m512i; 2]; T],
    scales: [__m512; 2],
    sums: &mut [[__m512; 2]; T],
) {
    for t in 0..T {
        for h in 0..2 {
            let dot = _mm512_cvtepi32_ps(dots[t][h]);
            sums[t][h] = if ADD {
                _mm512_fmadd_ps(dot, scales[h], sums[t][h])
            } else {
                _mm512_mul_ps(dot, scales[h])
            };
        }
    }
}

/// What the dots of a step (`sub` 0) or of its halves (1 and 2) begin with: what codes with their
/// zero at 128 would add too much.
///
/// # Safety
/// The features of [`quantized`]; the pointers lead to whole blocks.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn start<S: Shape, const T: usize>(
    x: &[*const QuantBlock; T],
    sub: usize,
) -> [[__m512i; 2]; T] {
    let mut dots = [[_mm512_setzero_si512(); 2]; T];
    if const { !S::LAYOUT.mins } {
        for t in 0..T {
            // SAFETY: promised by the caller.
            let offset =
                unsafe { if sub == 0 { (*x[t]).offset } else { (*x[t]).offsets[sub - 1] } };
            dots[t] = [_mm512_set1_epi32(offset); 2];
        }
    }
    dots
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
    for v in 0..4 {
        // SAFETY: a step has `pieces` pairs of registers of codes and a block 32 inputs.
        unsafe {
            let low = unpack::<S>(codes, part, v);
            let high = unpack::<S>(codes.add(64), part, v);
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
/// The features of [`quantized`]; `codes` leads to the codes of a step, or 64 bytes further for the
/// second 16 rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn unpack<S: Shape>(codes: *const u8, part: usize, v: usize) -> __m512i {
    let upper = _mm512_set1_epi8(0xf0_u8 as i8);
    // SAFETY: pieces are those of the layout.
    unsafe {
        match const { S::LAYOUT.bits } {
            Bits::Eight => load(codes, 4 * part + v),
            Bits::Four => _mm512_and_si512(raise(load(codes, v), part), upper),
            Bits::Levels => {
                let four = load(codes, v);
                let four = if part == 0 { four } else { _mm512_srli_epi16::<4>(four) };
                let four = _mm512_and_si512(four, _mm512_set1_epi8(15));
                _mm512_shuffle_epi8(levels(), four)
            }
            Bits::Five => {
                let four = raise(load(codes, v), part);
                let one = load(codes, 4);
                let one = match 4 * part + v {
                    0 => _mm512_slli_epi16::<3>(one),
                    1 => _mm512_slli_epi16::<2>(one),
                    2 => _mm512_slli_epi16::<1>(one),
                    3 => one,
                    4 => _mm512_srli_epi16::<1>(one),
                    5 => _mm512_srli_epi16::<2>(one),
                    6 => _mm512_srli_epi16::<3>(one),
                    _ => _mm512_srli_epi16::<4>(one),
                };
                let one = _mm512_and_si512(one, _mm512_set1_epi8(0x08));
                _mm512_ternarylogic_epi32::<SELECT>(upper, four, one)
            }
            Bits::Six => {
                let four = raise(load(codes, v), part);
                let two = load(codes, 4 + part);
                let two = match v {
                    0 => _mm512_slli_epi16::<2>(two),
                    1 => two,
                    2 => _mm512_srli_epi16::<2>(two),
                    _ => _mm512_srli_epi16::<4>(two),
                };
                let two = _mm512_and_si512(two, _mm512_set1_epi8(0x0c));
                _mm512_ternarylogic_epi32::<SELECT>(upper, four, two)
            }
        }
    }
}

/// # Safety
/// Piece `v` of the codes is there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(codes: *const u8, v: usize) -> __m512i {
    // SAFETY: promised by the caller.
    unsafe { _mm512_loadu_si512(codes.add(4 * PANEL * v).cast()) }
}

/// Brings the low (`part` 0) or high nibbles to the upper half of their bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn raise(codes: __m512i, part: usize) -> __m512i {
    if part == 0 { _mm512_slli_epi16::<4>(codes) } else { codes }
}

/// The IQ4 levels with their zero at 128.
#[inline]
#[target_feature(enable = "avx512f")]
fn levels() -> __m512i {
    const TABLE: [u8; 16] = super::levels_from_zero(&IQ4_LEVELS);
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
    let unraise = _mm512_set1_ps(layout.bits.unraise());
    let mut scales = [unraise; 2];
    for h in 0..2 {
        // SAFETY: the layout begins with these scales.
        unsafe {
            if layout.nested {
                let scale = _mm_loadu_si128(at.add(PANEL * sub + 16 * h).cast());
                let scale = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(scale));
                scales[h] = _mm512_mul_ps(_mm512_mul_ps(halves(header, h), scale), unraise);
            } else {
                scales[h] = _mm512_mul_ps(halves(at, h), unraise);
            }
        }
    }
    scales
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
    let mut mins = [_mm512_setzero_ps(); 2];
    for h in 0..2 {
        // SAFETY: the layout has these minimums behind the scales.
        unsafe {
            if layout.nested {
                let subs = STEP / layout.sub_len;
                let min = _mm_loadu_si128(at.add(PANEL * (subs + sub) + 16 * h).cast());
                let min = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(min));
                mins[h] = _mm512_mul_ps(halves(header.add(2 * PANEL), h), min);
            } else {
                mins[h] = halves(at.add(2 * PANEL), h);
            }
        }
    }
    mins
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

/// Bytes ahead: what memory delivers in about its latency, and some more.
const PREFETCH: usize = 4096;

/// Ternary logic: bits of the second operand where the first is set, else of the third.
const SELECT: i32 = 0xca;
