//! Matrix products with AVX2 and FMA.
//!
//! Built like the kernels of [`super::avx512`], with registers of eight rows: a tile is 16 of a
//! panel's rows times up to two tokens. There is no exact product of unsigned and signed bytes
//! that adds four of them (`maddubs` saturates at 16 bits), so bytes are widened to 16 bits, the
//! even and the odd ones apart, and multiplied in pairs.

use std::arch::x86_64::*;

use crate::format::IQ4_LEVELS;
use crate::linear::{Activations, Bits, PANEL, PanelOut, QuantBlock, STEP, Shape};

mod floats;

pub(crate) use floats::floats;

/// One panel of quantized weights, for all tokens.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn quantized<S: Shape>(panel: &[u8], x: &Activations, out: &PanelOut) {
    assert_eq!(panel.len(), S::LAYOUT.panel_bytes(x.cols()), "a whole panel");
    let mut token = 0;
    while token < x.tokens() {
        // SAFETY: the features are those of this function, the panel was just checked, and no
        // tile reaches beyond the last token.
        unsafe {
            token += match x.tokens() - token {
                1 => tile::<S, 1>(panel, x, token, out),
                _ => tile::<S, 2>(panel, x, token, out),
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
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<S: Shape, const T: usize>(
    panel: &[u8],
    x: &Activations,
    token: usize,
    out: &PanelOut,
) -> usize {
    let inputs: [*const QuantBlock; T] = std::array::from_fn(|t| x.blocks(token + t).as_ptr());
    let layout = const { S::LAYOUT };
    let mut acc = [[_mm256_setzero_ps(); 4]; T];
    let mut at = panel.as_ptr();
    let mut block = 0;
    while block < x.cols() / STEP {
        let header = at;
        // SAFETY: a panel is a row of groups, each a header and then its steps, and there are as
        // many steps as blocks of inputs; all loads below stay inside of the step or the header.
        unsafe {
            at = at.add(layout.header_bytes());
            for _ in 0..layout.group() {
                for t in 0..T {
                    for pair in 0..2 {
                        step::<S>(header, at, pair, &*inputs[t].add(block), &mut acc[t]);
                    }
                }
                at = at.add(layout.step_bytes());
                block += 1;
            }
        }
    }
    for (t, acc) in acc.iter().enumerate() {
        // SAFETY: the token is one of the call's.
        unsafe { store(acc, token + t, out) };
    }
    T
}

/// Hands the sums of one token over.
///
/// # Safety
/// The CPU has AVX, and the token is one of the call's.
#[inline]
#[target_feature(enable = "avx")]
unsafe fn store(acc: &[__m256; 4], token: usize, out: &PanelOut) {
    let mut values = [0.0; PANEL];
    // SAFETY: `values` has room for four registers; the token is promised by the caller.
    unsafe {
        for (q, acc) in acc.iter().enumerate() {
            _mm256_storeu_ps(values.as_mut_ptr().add(8 * q), *acc);
        }
        out.store(token, &values);
    }
}

/// Adds 32 columns to the sums of the rows `16 * pair ..`.
///
/// # Safety
/// The features of [`quantized`]; the pointers lead to a whole header and step.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn step<S: Shape>(
    header: *const u8,
    at: *const u8,
    pair: usize,
    x: &QuantBlock,
    acc: &mut [__m256; 4],
) {
    // SAFETY: offsets are those of the layout, inside of what the caller vouches for.
    unsafe {
        let codes = at.add(const { S::LAYOUT.scale_bytes() } + 64 * pair);
        let mut sums = [_mm256_setzero_ps(); 2];
        for sub in 0..const { STEP / S::LAYOUT.sub_len } {
            let mut dots = [_mm256_setzero_si256(); 2];
            if const { S::LAYOUT.sub_len == STEP } {
                start::<S>(x.offset, &mut dots);
                dot::<S>(codes, 0, x, &mut dots);
                dot::<S>(codes, 1, x, &mut dots);
            } else {
                start::<S>(x.offsets[sub], &mut dots);
                dot::<S>(codes, sub, x, &mut dots);
            }
            for q in 0..2 {
                let scale = scales::<S>(header, at, sub, 2 * pair + q);
                let dot = _mm256_cvtepi32_ps(dots[q]);
                sums[q] = if sub == 0 {
                    _mm256_mul_ps(dot, scale)
                } else {
                    _mm256_fmadd_ps(dot, scale, sums[q])
                };
            }
        }
        if const { S::LAYOUT.mins } {
            for sub in 0..const { STEP / S::LAYOUT.sub_len } {
                let whole = const { S::LAYOUT.sub_len == STEP };
                let inputs = _mm256_set1_ps(if whole { x.sum } else { x.sums[sub] });
                for q in 0..2 {
                    let min = mins::<S>(header, at, sub, 2 * pair + q);
                    sums[q] = _mm256_fnmadd_ps(min, inputs, sums[q]);
                }
            }
        }
        let dx = _mm256_set1_ps(x.scale);
        for q in 0..2 {
            let acc = &mut acc[2 * pair + q];
            *acc = _mm256_fmadd_ps(sums[q], dx, *acc);
        }
    }
}

/// What codes with their zero at 128 would add too much.
#[inline]
#[target_feature(enable = "avx2")]
fn start<S: Shape>(offset: i32, dots: &mut [__m256i; 2]) {
    if const { !S::LAYOUT.mins } {
        *dots = [_mm256_set1_epi32(offset); 2];
    }
}

/// Adds the products of the first (`part` 0) or last 16 columns of a step, for 16 rows.
///
/// # Safety
/// The features of [`quantized`]; `codes` leads to the rows' codes of the step.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dot<S: Shape>(codes: *const u8, part: usize, x: &QuantBlock, dots: &mut [__m256i; 2]) {
    let even = _mm256_set1_epi16(0xff);
    for v in 0..4 {
        let inputs: &[i8; 4] =
            x.codes[16 * part + 4 * v..].first_chunk().expect("four of a part's inputs");
        let inputs = _mm256_set1_epi32(i32::from_le_bytes(inputs.map(|code| code as u8)));
        let even_inputs = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(inputs));
        let odd_inputs = _mm256_srai_epi16::<8>(inputs);
        for (q, dots) in dots.iter_mut().enumerate() {
            // SAFETY: a piece has 32 bytes for each eight rows.
            let codes = unsafe { unpack::<S>(codes.add(32 * q), part, v) };
            let even = _mm256_madd_epi16(_mm256_and_si256(codes, even), even_inputs);
            let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(codes), odd_inputs);
            *dots = _mm256_add_epi32(*dots, _mm256_add_epi32(even, odd));
        }
    }
}

/// The codes of eight rows and the columns `16 * part + 4 * v ..` as bytes, raised as in
/// [`super::avx512`].
///
/// # Safety
/// The features of [`quantized`]; `codes` leads to the rows' codes of a step.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn unpack<S: Shape>(codes: *const u8, part: usize, v: usize) -> __m256i {
    let upper = _mm256_set1_epi8(0xf0_u8 as i8);
    // SAFETY: pieces are those of the layout.
    unsafe {
        match const { S::LAYOUT.bits } {
            Bits::Eight => load(codes, 4 * part + v),
            Bits::Four => _mm256_and_si256(raise(load(codes, v), part), upper),
            Bits::Levels => {
                let four = load(codes, v);
                let four = if part == 0 { four } else { _mm256_srli_epi16::<4>(four) };
                let four = _mm256_and_si256(four, _mm256_set1_epi8(15));
                _mm256_shuffle_epi8(levels(), four)
            }
            Bits::Five => {
                let four = _mm256_and_si256(raise(load(codes, v), part), upper);
                let one = load(codes, 4);
                let one = match 4 * part + v {
                    0 => _mm256_slli_epi16::<3>(one),
                    1 => _mm256_slli_epi16::<2>(one),
                    2 => _mm256_slli_epi16::<1>(one),
                    3 => one,
                    4 => _mm256_srli_epi16::<1>(one),
                    5 => _mm256_srli_epi16::<2>(one),
                    6 => _mm256_srli_epi16::<3>(one),
                    _ => _mm256_srli_epi16::<4>(one),
                };
                _mm256_or_si256(four, _mm256_and_si256(one, _mm256_set1_epi8(0x08)))
            }
            Bits::Six => {
                let four = _mm256_and_si256(raise(load(codes, v), part), upper);
                let two = load(codes, 4 + part);
                let two = match v {
                    0 => _mm256_slli_epi16::<2>(two),
                    1 => two,
                    2 => _mm256_srli_epi16::<2>(two),
                    _ => _mm256_srli_epi16::<4>(two),
                };
                _mm256_or_si256(four, _mm256_and_si256(two, _mm256_set1_epi8(0x0c)))
            }
        }
    }
}

/// # Safety
/// Piece `v` of the codes is there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(codes: *const u8, v: usize) -> __m256i {
    // SAFETY: promised by the caller.
    unsafe { _mm256_loadu_si256(codes.add(4 * PANEL * v).cast()) }
}

/// Brings the low (`part` 0) or high nibbles to the upper half of their bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn raise(codes: __m256i, part: usize) -> __m256i {
    if part == 0 { _mm256_slli_epi16::<4>(codes) } else { codes }
}

/// The IQ4 levels with their zero at 128.
#[inline]
#[target_feature(enable = "avx2")]
fn levels() -> __m256i {
    const TABLE: [u8; 16] = super::levels_from_zero(&IQ4_LEVELS);
    // SAFETY: the table has sixteen bytes.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(TABLE.as_ptr().cast()) })
}

/// The scales of the rows `8 * q ..` for the unpacked codes of a sub-block.
///
/// # Safety
/// The features of [`quantized`]; the pointers lead to a whole header and step.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn scales<S: Shape>(header: *const u8, at: *const u8, sub: usize, q: usize) -> __m256 {
    let layout = const { S::LAYOUT };
    let unraise = _mm256_set1_ps(layout.bits.unraise());
    // SAFETY: the layout begins with these scales.
    unsafe {
        if !layout.nested {
            return _mm256_mul_ps(halves(at, q), unraise);
        }
        let scale = _mm_loadl_epi64(at.add(PANEL * sub + 8 * q).cast());
        let scale = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(scale));
        _mm256_mul_ps(_mm256_mul_ps(halves(header, q), scale), unraise)
    }
}

/// The minimums of the rows `8 * q ..` for a sub-block.
///
/// # Safety
/// The features of [`quantized`]; the pointers lead to a whole header and step of a layout with
/// minimums.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn mins<S: Shape>(header: *const u8, at: *const u8, sub: usize, q: usize) -> __m256 {
    let layout = const { S::LAYOUT };
    // SAFETY: the layout has these minimums behind the scales.
    unsafe {
        if !layout.nested {
            return halves(at.add(2 * PANEL), q);
        }
        let subs = STEP / layout.sub_len;
        let min = _mm_loadl_epi64(at.add(PANEL * (subs + sub) + 8 * q).cast());
        let min = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(min));
        _mm256_mul_ps(halves(header.add(2 * PANEL), q), min)
    }
}

/// Binary16 numbers of the rows `8 * q ..`.
///
/// # Safety
/// The features of [`quantized`]; 32 of them are at `from`.
#[inline]
#[target_feature(enable = "avx,f16c")]
unsafe fn halves(from: *const u8, q: usize) -> __m256 {
    // SAFETY: promised by the caller.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.add(16 * q).cast()) })
}
