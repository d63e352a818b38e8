//! [`Lanes`] on AVX2 (two registers) and AVX-512 (one).

// Every method forwards the promises of the trait to the intrinsics: the CPU has the features, and
// pointers cover sixteen elements.
#![allow(clippy::missing_safety_doc)]

use std::arch::x86_64::*;

use super::{LANES, Lanes, ROUND_MAGIC};

#[derive(Clone, Copy)]
pub(crate) struct Avx512Lanes(__m512);

impl Lanes for Avx512Lanes {
    const ROWS: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the trait's promise.
        Self(unsafe { _mm512_set1_ps(x) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the trait's promise.
        Self(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the trait's promise.
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the trait's promise.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the trait's promise.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        // SAFETY: the trait's promise.
        unsafe {
            _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0))
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        // SAFETY: the trait's promise.
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let chosen = _mm512_mask_mov_epi32(rounded, nan, quiet);
            let high = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(chosen));
            _mm256_storeu_si256(to.cast(), high);
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the trait's promise.
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: the trait's promise.
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: the trait's promise.
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: the trait's promise.
        Self(unsafe { _mm512_div_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: the trait's promise.
        Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }

    #[inline(always)]
    unsafe fn fnma(self, b: Self, c: Self) -> Self {
        // SAFETY: the trait's promise.
        Self(unsafe { _mm512_fnmadd_ps(self.0, b.0, c.0) })
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: the trait's promise.
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: the trait's promise.
        Self(unsafe { _mm512_min_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn select(self, other: Self, mask: u16) -> Self {
        // SAFETY: the trait's promise.
        Self(unsafe { _mm512_mask_mov_ps(other.0, mask, self.0) })
    }

    #[inline(always)]
    unsafe fn pow2_halves(self) -> (Self, Self) {
        // SAFETY: the trait's promise.
        unsafe {
            let magic = _mm512_set1_epi32(ROUND_MAGIC.to_bits() as i32);
            let n = _mm512_sub_epi32(_mm512_castps_si512(self.0), magic);
            let first = _mm512_srai_epi32::<1>(n);
            let second = _mm512_sub_epi32(n, first);
            let bias = _mm512_set1_epi32(127);
            let a = _mm512_slli_epi32::<23>(_mm512_add_epi32(first, bias));
            let b = _mm512_slli_epi32::<23>(_mm512_add_epi32(second, bias));
            (Self(_mm512_castsi512_ps(a)), Self(_mm512_castsi512_ps(b)))
        }
    }

    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self; LANES]) {
        // SAFETY: the trait's promise.
        unsafe {
            // Within each group of four rows: transpose the 4x4 pieces that share a 128-bit part.
            let mut quads = [_mm512_setzero_ps(); LANES];
            for g in 0..4 {
                let [r0, r1, r2, r3] = std::array::from_fn(|i| rows[4 * g + i].0);
                let low01 = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1));
                let high01 = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
                let low23 = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3));
                let high23 = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
                quads[4 * g] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
                quads[4 * g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
                quads[4 * g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
                quads[4 * g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
            }
            // quads[4g + c] has, in part p, column 4p + c of rows 4g..4g+4: transpose the parts.
            for c in 0..4 {
                let [a, b, d, e] = std::array::from_fn(|g| quads[4 * g + c]);
                let ab_even = _mm512_shuffle_f32x4::<0x88>(a, b);
                let ab_odd = _mm512_shuffle_f32x4::<0xdd>(a, b);
                let de_even = _mm512_shuffle_f32x4::<0x88>(d, e);
                let de_odd = _mm512_shuffle_f32x4::<0xdd>(d, e);
                rows[c].0 = _mm512_shuffle_f32x4::<0x88>(ab_even, de_even);
                rows[4 + c].0 = _mm512_shuffle_f32x4::<0x88>(ab_odd, de_odd);
                rows[8 + c].0 = _mm512_shuffle_f32x4::<0xdd>(ab_even, de_even);
                rows[12 + c].0 = _mm512_shuffle_f32x4::<0xdd>(ab_odd, de_odd);
            }
        }
    }
}

/// Lanes 0 to 7, then 8 to 15.
#[derive(Clone, Copy)]
pub(crate) struct Avx2Lanes(__m256, __m256);

impl Lanes for Avx2Lanes {
    const ROWS: usize = 6;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the trait's promise.
        let half = unsafe { _mm256_set1_ps(x) };
        Self(half, half)
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the trait's promise.
        unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the trait's promise.
        unsafe {
            Self(
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the trait's promise.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
            Self(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the trait's promise.
        unsafe {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        // SAFETY: the trait's promise.
        unsafe {
            let low = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
            let high = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.1);
            _mm_storeu_si128(to.cast(), low);
            _mm_storeu_si128(to.add(8).cast(), high);
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        // SAFETY: the trait's promise.
        unsafe {
            // Packing works on 128-bit parts, so the middle two have to change places.
            let packed = _mm256_packus_epi32(bf16_of(self.0), bf16_of(self.1));
            _mm256_storeu_si256(to.cast(), _mm256_permute4x64_epi64::<0xd8>(packed));
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the trait's promise.
        unsafe { Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: the trait's promise.
        unsafe { Self(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: the trait's promise.
        unsafe { Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: the trait's promise.
        unsafe { Self(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: the trait's promise.
        unsafe { Self(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
    }

    #[inline(always)]
    unsafe fn fnma(self, b: Self, c: Self) -> Self {
        // SAFETY: the trait's promise.
        unsafe { Self(_mm256_fnmadd_ps(self.0, b.0, c.0), _mm256_fnmadd_ps(self.1, b.1, c.1)) }
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: the trait's promise.
        unsafe { Self(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: the trait's promise.
        unsafe { Self(_mm256_min_ps(self.0, other.0), _mm256_min_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn select(self, other: Self, mask: u16) -> Self {
        // SAFETY: the trait's promise.
        unsafe {
            let (low, high) = (lanes_of(mask as u8), lanes_of((mask >> 8) as u8));
            Self(_mm256_blendv_ps(other.0, self.0, low), _mm256_blendv_ps(other.1, self.1, high))
        }
    }

    #[inline(always)]
    unsafe fn pow2_halves(self) -> (Self, Self) {
        // SAFETY: the trait's promise.
        unsafe {
            let ((a0, b0), (a1, b1)) = (pow2_halves_8(self.0), pow2_halves_8(self.1));
            (Self(a0, a1), Self(b0, b1))
        }
    }

    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self; LANES]) {
        // SAFETY: the trait's promise.
        unsafe {
            // The four 8x8 quarters are transposed; the two off the diagonal change places.
            let upper_left = transpose_8x8(std::array::from_fn(|i| rows[i].0));
            let upper_right = transpose_8x8(std::array::from_fn(|i| rows[i].1));
            let lower_left = transpose_8x8(std::array::from_fn(|i| rows[8 + i].0));
            let lower_right = transpose_8x8(std::array::from_fn(|i| rows[8 + i].1));
            for i in 0..8 {
                rows[i] = Self(upper_left[i], lower_left[i]);
                rows[8 + i] = Self(upper_right[i], lower_right[i]);
            }
        }
    }
}

/// Rounded to nearest even: bfloat16 in the lower halves of the lanes.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn bf16_of(x: __m256) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let bits = _mm256_castps_si256(x);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan))
    }
}

/// A bit for each lane, spread over all bits of the lane.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn lanes_of(mask: u8) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        let set = _mm256_and_si256(_mm256_set1_epi32(i32::from(mask)), bits);
        _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bits))
    }
}

/// [`Lanes::pow2_halves`] of eight lanes.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn pow2_halves_8(x: __m256) -> (__m256, __m256) {
    // SAFETY: the caller's promise.
    unsafe {
        let magic = _mm256_set1_epi32(ROUND_MAGIC.to_bits() as i32);
        let n = _mm256_sub_epi32(_mm256_castps_si256(x), magic);
        let first = _mm256_srai_epi32::<1>(n);
        let second = _mm256_sub_epi32(n, first);
        let bias = _mm256_set1_epi32(127);
        let a = _mm256_slli_epi32::<23>(_mm256_add_epi32(first, bias));
        let b = _mm256_slli_epi32::<23>(_mm256_add_epi32(second, bias));
        (_mm256_castsi256_ps(a), _mm256_castsi256_ps(b))
    }
}

#[inline(always)]
unsafe fn transpose_8x8(rows: [__m256; 8]) -> [__m256; 8] {
    // SAFETY: the caller's promise that the CPU has AVX2.
    unsafe {
        let mut quads = rows;
        for g in 0..2 {
            let [r0, r1, r2, r3] = std::array::from_fn(|i| rows[4 * g + i]);
            let low01 = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1));
            let high01 = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1));
            let low23 = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3));
            let high23 = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
            quads[4 * g] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
            quads[4 * g + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
            quads[4 * g + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
            quads[4 * g + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
        }
        let mut out = rows;
        for c in 0..4 {
            out[c] = _mm256_permute2f128_ps::<0x20>(quads[c], quads[4 + c]);
            out[4 + c] = _mm256_permute2f128_ps::<0x31>(quads[c], quads[4 + c]);
        }
        out
    }
}
