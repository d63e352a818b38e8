//! Exact integer products of a step's codes and inputs.
//!
//! The one instruction that multiplies bytes (`maddubs`, unsigned by signed) adds two products and
//! saturates at 16 bits. Codes of up to six bits, taken as unsigned numbers, never come near: two,
//! four or eight such sums can even be added in 16 bits before they are widened. Codes of eight
//! bits and levels are split into magnitude and sign, and the sign goes to the input: a sum is then
//! at most 2 * 128 * 127, just below the limit, and is widened at once.

use std::arch::asm;
use std::arch::x86_64::*;

use crate::format::IQ4_LEVELS;
use crate::linear::{Bits, Layout, PANEL, QuantBlock, Shape};

/// Evaluates an expression for each of a step's eight groups of four columns, as a constant: loops
/// would not always be unrolled.
macro_rules! each_group {
    ($group:ident => $body:expr) => {
        each_group!($group => $body, 0 1 2 3 4 5 6 7)
    };
    ($group:ident => $body:expr, $($number:literal)*) => {
        $({
            const $group: usize = $number;
            $body
        })*
    };
}

/// The dots of `8 * Q` rows with T tokens over the columns `4 * FROM..4 * TO` of a step, with codes as
/// they are stored: where their zero is not 0, [`zero`] times the sum of the inputs is too much.
///
/// # Safety
/// The CPU has AVX2; `codes` leads to the rows' codes of a step, and `x` to whole blocks.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn dots<
    S: Shape,
    const T: usize,
    const Q: usize,
    const FROM: usize,
    const TO: usize,
>(
    codes: *const u8,
    x: &[*const QuantBlock; T],
) -> [[__m256i; Q]; T] {
    let mut dots = [[_mm256_setzero_si256(); Q]; T];
    let mut sums = [[_mm256_setzero_si256(); Q]; T];
    each_group!(G => if const { within(FROM, G, TO) } {
        // SAFETY: passed on.
        unsafe {
            match const { S::LAYOUT.bits } {
                Bits::Levels | Bits::Eight => signed_group::<S, T, Q, G>(codes, x, &mut dots),
                _ => group::<S, T, Q, G>(codes, x, &mut sums, &mut dots),
            }
        }
    });
    dots
}

/// Adds the products of one group to sums of 16 bits, and these to `dots` when they are full.
///
/// # Safety
/// As [`dots`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn group<S: Shape, const T: usize, const Q: usize, const G: usize>(
    codes: *const u8,
    x: &[*const QuantBlock; T],
    sums: &mut [[__m256i; Q]; T],
    dots: &mut [[__m256i; Q]; T],
) {
    let room = const { groups_in_16_bits(S::LAYOUT.bits, S::LAYOUT.sub_len / 4) };
    let mut weights = [_mm256_setzero_si256(); Q];
    for q in 0..Q {
        // SAFETY: a piece has 32 bytes for each eight rows.
        weights[q] = unsafe { code::<S, G>(codes.add(32 * q)) };
    }
    for t in 0..T {
        // SAFETY: promised by the caller.
        let x = unsafe { inputs::<G>(x[t]) };
        for q in 0..Q {
            if G.is_multiple_of(room) {
                sums[t][q] = _mm256_maddubs_epi16(weights[q], x);
            } else {
                multiply_add(weights[q], x, &mut sums[t][q]);
            }
        }
    }
    if (G + 1).is_multiple_of(room) {
        let ones = _mm256_set1_epi16(1);
        for t in 0..T {
            for q in 0..Q {
                dots[t][q] = _mm256_add_epi32(dots[t][q], _mm256_madd_epi16(sums[t][q], ones));
            }
        }
    }
}

/// Adds the products of one group of signed weights.
///
/// # Safety
/// As [`dots`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn signed_group<S: Shape, const T: usize, const Q: usize, const G: usize>(
    codes: *const u8,
    x: &[*const QuantBlock; T],
    dots: &mut [[__m256i; Q]; T],
) {
    let mut weights = [[_mm256_setzero_si256(); 2]; Q];
    for q in 0..Q {
        // SAFETY: a piece has 32 bytes for each eight rows.
        let signed = unsafe { signed_code::<S, G>(codes.add(32 * q)) };
        weights[q] = [signed, _mm256_abs_epi8(signed)];
    }
    for t in 0..T {
        // SAFETY: promised by the caller.
        let x = unsafe { inputs::<G>(x[t]) };
        for q in 0..Q {
            multiply_add_signed(weights[q], x, &mut dots[t][q]);
        }
    }
}

/// The inputs of group G, for each row.
///
/// # Safety
/// The CPU has AVX2, and `x` leads to a whole block.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn inputs<const G: usize>(x: *const QuantBlock) -> __m256i {
    // SAFETY: promised by the caller; a block has eight groups.
    _mm256_set1_epi32(unsafe { (&raw const (*x).codes).cast::<i32>().add(G).read() })
}

/// Adds the products of unsigned and signed bytes, two to a lane of 16 bits.
///
/// As assembly, because LLVM would pair the additions of several groups, and 16 registers do not
/// hold what that takes.
#[inline]
#[target_feature(enable = "avx2")]
fn multiply_add(weights: __m256i, x: __m256i, sum: &mut __m256i) {
    // SAFETY: two AVX2 instructions that read and write registers only.
    unsafe {
        asm!(
            "vpmaddubsw {products}, {weights}, {x}",
            "vpaddw {sum}, {sum}, {products}",
            products = out(ymm_reg) _,
            weights = in(ymm_reg) weights,
            x = in(ymm_reg) x,
            sum = inout(ymm_reg) *sum,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
}

/// Adds the products of signed bytes, four to a lane of 32 bits. The weights come with their
/// magnitudes, and no input is -128.
#[inline]
#[target_feature(enable = "avx2")]
fn multiply_add_signed(weights: [__m256i; 2], x: __m256i, sum: &mut __m256i) {
    // SAFETY: AVX2 instructions that read and write registers only.
    unsafe {
        asm!(
            "vpsignb {products}, {x}, {weights}",
            "vpmaddubsw {products}, {magnitudes}, {products}",
            "vpmaddwd {products}, {products}, {ones}",
            "vpaddd {sum}, {sum}, {products}",
            products = out(ymm_reg) _,
            weights = in(ymm_reg) weights[0],
            magnitudes = in(ymm_reg) weights[1],
            ones = in(ymm_reg) _mm256_set1_epi16(1),
            x = in(ymm_reg) x,
            sum = inout(ymm_reg) *sum,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
}

const fn within(from: usize, group: usize, to: usize) -> bool {
    from <= group && group < to
}

/// The code that means zero, as [`dots`] takes it.
pub(super) const fn zero(layout: &Layout) -> i32 {
    match layout.bits {
        Bits::Levels | Bits::Eight => 0,
        _ => layout.zero(),
    }
}

/// Groups of four columns whose sums fit into 16 bits together, as many of `max` as a power of two.
const fn groups_in_16_bits(bits: Bits, max: usize) -> usize {
    let code = match bits {
        Bits::Four => 15,
        Bits::Five => 31,
        Bits::Six => 63,
        Bits::Levels | Bits::Eight => 127,
    };
    let mut groups = max;
    while groups * 2 * code * 127 > i16::MAX as usize {
        groups /= 2;
    }
    groups
}

/// Codes of at most six bits of eight rows and four columns, as bytes.
///
/// # Safety
/// As [`dots`], for eight rows.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn code<S: Shape, const G: usize>(codes: *const u8) -> __m256i {
    // SAFETY: pieces are those of the layout.
    unsafe {
        let four = nibbles::<G>(codes);
        match const { S::LAYOUT.bits } {
            Bits::Five => {
                let one = match G {
                    0 => load(codes, 4),
                    1 => _mm256_srli_epi16::<1>(load(codes, 4)),
                    2 => _mm256_srli_epi16::<2>(load(codes, 4)),
                    3 => _mm256_srli_epi16::<3>(load(codes, 4)),
                    4 => _mm256_srli_epi16::<4>(load(codes, 4)),
                    5 => _mm256_srli_epi16::<5>(load(codes, 4)),
                    6 => _mm256_srli_epi16::<6>(load(codes, 4)),
                    _ => _mm256_srli_epi16::<7>(load(codes, 4)),
                };
                let one = _mm256_and_si256(one, _mm256_set1_epi8(1));
                _mm256_or_si256(_mm256_add_epi8(four, four), one)
            }
            Bits::Six => {
                let two = load(codes, 4 + G / 4);
                let two = match G % 4 {
                    0 => two,
                    1 => _mm256_srli_epi16::<2>(two),
                    2 => _mm256_srli_epi16::<4>(two),
                    _ => _mm256_srli_epi16::<6>(two),
                };
                let two = _mm256_and_si256(two, _mm256_set1_epi8(3));
                _mm256_or_si256(_mm256_slli_epi16::<2>(four), two)
            }
            _ => four,
        }
    }
}

/// Weights of eight rows and four columns, as signed bytes.
///
/// # Safety
/// As [`dots`], for eight rows.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn signed_code<S: Shape, const G: usize>(codes: *const u8) -> __m256i {
    // SAFETY: pieces are those of the layout, and the table has sixteen bytes.
    unsafe {
        if let Bits::Eight = const { S::LAYOUT.bits } {
            return _mm256_xor_si256(load(codes, G), _mm256_set1_epi8(-128));
        }
        let levels = _mm256_broadcastsi128_si256(_mm_loadu_si128(IQ4_LEVELS.as_ptr().cast()));
        _mm256_shuffle_epi8(levels, nibbles::<G>(codes))
    }
}

/// The codes of group G that are stored in four bits.
///
/// # Safety
/// As [`dots`], for eight rows.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn nibbles<const G: usize>(codes: *const u8) -> __m256i {
    // SAFETY: the layout has four pieces of them.
    let codes = unsafe { load(codes, G % 4) };
    let codes = if G < 4 { codes } else { _mm256_srli_epi16::<4>(codes) };
    _mm256_and_si256(codes, _mm256_set1_epi8(15))
}

/// # Safety
/// Piece `v` of the codes is there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(codes: *const u8, v: usize) -> __m256i {
    // SAFETY: promised by the caller.
    unsafe { _mm256_loadu_si256(codes.add(4 * PANEL * v).cast()) }
}
