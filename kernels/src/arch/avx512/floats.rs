//! Products with float weights: one fused multiply-add per weight and token, column after column, and for
//! pairs of bfloat16 two in one instruction.

use std::arch::x86_64::*;

use super::{prefetch, store};
use crate::float::f32_to_bf16;
use crate::format::Format;
use crate::linear::{Activations, DIRECT_TOKENS, PANEL, PanelOut, TILE, Tile};

/// One panel of float weights, `[cols][32 rows]`.
///
/// # Safety
/// The CPU has AVX-512 F.
#[target_feature(enable = "avx512f")]
pub unsafe fn floats(format: Format, panel: &[u8], x: &Activations, out: &PanelOut) {
    // SAFETY: the features are those of this function.
    unsafe {
        match format {
            Format::F32 => tiles::<F32>(panel, x, out),
            Format::F16 => tiles::<F16>(panel, x, out),
            Format::BF16 => tiles::<BF16>(panel, x, out),
            _ => unreachable!("quantized weights have a layout"),
        }
    }
}

/// One panel of bfloat16 weights in pairs, `[pairs of cols][32 rows]`.
///
/// # Safety
/// The CPU has AVX-512 F and BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub unsafe fn pairs(panel: &[u8], x: &Activations, out: &PanelOut) {
    // SAFETY: the features are those of this function.
    unsafe { tiles_of_pairs::<Pairs>(panel, x, out) }
}

/// Whether this CPU multiplies pairs as all kernels add: the products of the first columns, then those of
/// the second ones, each with one rounding. What the instruction does is described by its makers, and
/// differently.
///
/// # Safety
/// The CPU has AVX-512 F and BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub unsafe fn pairs_agree() -> bool {
    let word = |a: f32, b: f32| u32::from(f32_to_bf16(a)) << 16 | u32::from(f32_to_bf16(b));
    (0..256_u32).all(|i| {
        // Sums and products of about one size, so that order and rounding show.
        let sum = 1.0 + i as f32 * 0.001;
        let (x, b) = (
            [1.0 + (i % 8) as f32 / 8.0, 1.75 - (i % 4) as f32 / 4.0],
            -1.0 - (i % 16) as f32 / 16.0,
        );
        let a: [f32; 16] =
            std::array::from_fn(|r| (1 << (i % 20)) as f32 * (1.0 + r as f32 / 16.0));
        let expect = a.map(|a| b.mul_add(x[1], a.mul_add(x[0], sum)).to_bits());
        let words = a.map(|a| word(a, b));
        let mut sums = [0.0_f32; 16];
        // SAFETY: sixteen words and floats are a register; the features are those of this function.
        unsafe {
            let weights = Pairs::load(words.as_ptr().cast());
            let added = Pairs::add(_mm512_set1_ps(sum), weights, word(x[0], x[1]));
            _mm512_storeu_ps(sums.as_mut_ptr(), added);
        }
        sums.map(f32::to_bits) == expect
    })
}

/// The loops over tokens and units for weights that need these features of the CPU.
macro_rules! loops {
    ($tiles:ident, $tile:ident, $features:literal) => {
        /// # Safety
        /// The CPU has what the weights need.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn $tiles<W: Weights>(panel: &[u8], x: &Activations, out: &PanelOut) {
            assert_eq!(panel.len(), x.cols().div_ceil(W::COLS) * PANEL * W::BYTES, "a whole panel");
            let tile_tokens = if x.tokens() <= DIRECT_TOKENS { DIRECT_TOKENS } else { TILE };
            for token in out.tokens.clone().step_by(tile_tokens) {
                // SAFETY: the features are those of this function, the panel was just checked, and
                // a tile has at least as many tokens as are left, up to its width.
                unsafe {
                    match out.tokens.end - token {
                        1 => $tile::<W, 1>(panel, x, token, out),
                        2 => $tile::<W, 2>(panel, x, token, out),
                        3 => $tile::<W, 3>(panel, x, token, out),
                        4 => $tile::<W, 4>(panel, x, token, out),
                        5 => $tile::<W, 5>(panel, x, token, out),
                        6 => $tile::<W, 6>(panel, x, token, out),
                        7 => $tile::<W, 7>(panel, x, token, out),
                        8 => $tile::<W, 8>(panel, x, token, out),
                        9 => $tile::<W, 9>(panel, x, token, out),
                        10 => $tile::<W, 10>(panel, x, token, out),
                        11 => $tile::<W, 11>(panel, x, token, out),
                        _ => $tile::<W, 12>(panel, x, token, out),
                    }
                }
            }
        }

        /// # Safety
        /// As above; the panel has as many columns as `x`, and the tokens are in one tile of it.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn $tile<W: Weights, const T: usize>(
            panel: &[u8],
            x: &Activations,
            token: usize,
            out: &PanelOut,
        ) {
            let Tile { first: mut inputs, next_token, next_unit } = W::inputs(x, token);
            let next_token = if T > DIRECT_TOKENS { 1 } else { next_token };
            let mut acc = [[_mm512_setzero_ps(); 2]; T];
            for weights in panel.chunks_exact(PANEL * W::BYTES) {
                // SAFETY: the chunk holds a unit of 32 rows, and every unit of the tile is in the
                // buffer.
                unsafe {
                    if token == out.tokens.start {
                        prefetch(weights.as_ptr(), weights.len());
                    }
                    let low = W::load(weights.as_ptr());
                    let high = W::load(weights.as_ptr().add(16 * W::BYTES));
                    for (t, acc) in acc.iter_mut().enumerate() {
                        let x = *inputs.add(t * next_token);
                        acc[0] = W::add(acc[0], low, x);
                        acc[1] = W::add(acc[1], high, x);
                    }
                    inputs = inputs.wrapping_add(next_unit);
                }
            }
            store(&acc, token, out);
        }
    };
}

loops!(tiles, tile, "avx512f");
loops!(tiles_of_pairs, tile_of_pairs, "avx512f,avx512bf16");

/// How the weights of sixteen rows are multiplied, one unit of columns at a time.
trait Weights {
    /// Columns of a unit.
    const COLS: usize = 1;
    /// Bytes of a unit and row.
    const BYTES: usize;
    /// A unit of inputs.
    type Input: Copy;
    /// A unit of sixteen rows.
    type Register: Copy;

    fn inputs(x: &Activations, token: usize) -> Tile<Self::Input>;

    /// # Safety
    /// The CPU has what the weights need, and a unit of sixteen rows is at `from`.
    unsafe fn load(from: *const u8) -> Self::Register;

    /// # Safety
    /// The CPU has what the weights need.
    unsafe fn add(acc: __m512, weights: Self::Register, x: Self::Input) -> __m512;
}

struct F32;
struct F16;
struct BF16;
struct Pairs;

/// What all weights have in common that become f32.
macro_rules! in_f32 {
    ($inputs:ident) => {
        type Input = f32;
        type Register = __m512;

        #[inline]
        fn inputs(x: &Activations, token: usize) -> Tile<f32> {
            x.$inputs(token)
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn add(acc: __m512, weights: __m512, x: f32) -> __m512 {
            _mm512_fmadd_ps(weights, _mm512_set1_ps(x), acc)
        }
    };
}

impl Weights for F32 {
    const BYTES: usize = 4;
    in_f32!(plain);

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const u8) -> __m512 {
        // SAFETY: promised by the caller.
        unsafe { _mm512_loadu_ps(from.cast()) }
    }
}

impl Weights for F16 {
    const BYTES: usize = 2;
    in_f32!(plain);

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const u8) -> __m512 {
        // SAFETY: promised by the caller.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast()) })
    }
}

impl Weights for BF16 {
    const BYTES: usize = 2;
    in_f32!(rounded);

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const u8) -> __m512 {
        // SAFETY: promised by the caller.
        let bits = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(from.cast()) });
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
    }
}

impl Weights for Pairs {
    const COLS: usize = 2;
    const BYTES: usize = 4;
    type Input = u32;
    type Register = __m512i;

    #[inline]
    fn inputs(x: &Activations, token: usize) -> Tile<u32> {
        x.pairs(token)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const u8) -> __m512i {
        // SAFETY: promised by the caller.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    /// Adds the product of the upper halves, then that of the lower ones, each rounded once.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn add(acc: __m512, weights: __m512i, x: u32) -> __m512 {
        let x = _mm512_set1_epi32(x.cast_signed());
        // SAFETY: all three are 64 bytes for which every content is valid.
        let (weights, x) = unsafe {
            (
                std::mem::transmute::<__m512i, __m512bh>(weights),
                std::mem::transmute::<__m512i, __m512bh>(x),
            )
        };
        _mm512_dpbf16_ps(acc, weights, x)
    }
}
