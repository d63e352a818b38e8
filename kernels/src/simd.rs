//! Sixteen f32 lanes with the same meaning on every instruction set.
//!
//! Owns the vocabulary that norms, activations and attention are written in. Each operation is
//! correctly rounded and acts lane by lane, and reductions follow one fixed tree, so code that is
//! generic over [`Lanes`] gives the same bits on every implementation: the scalar one is the
//! reference, not an approximation. It refuses operations whose result depends on the hardware
//! (reciprocal estimates, sums in hardware order).
//!
//! Methods are `inline(always)` so that they take the target features of the function that
//! [`dispatch!`] makes around the generic code. What the ones of AVX2 and AVX-512 share is functions like
//! them and never closures with instructions in them, which cannot be told to be inlined: one that is
//! not has no features and becomes a call for each instruction.

#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::float;

#[cfg(target_arch = "aarch64")]
pub(crate) use neon::NeonLanes;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2Lanes, Avx512Lanes};

/// Lanes of one vector.
pub(crate) const LANES: usize = 16;

/// Sixteen lanes.
///
/// # Safety
/// Every method may only be called on a CPU that has the features of the implementation. Methods with
/// pointers ask in addition that all elements they name can be read or written; no alignment is asked.
pub(crate) trait Lanes: Copy {
    /// Query rows that attention takes at once: 8 with 32 registers, 6 with 16 halves, 4 with 32
    /// quarters, else 1.
    const ROWS: usize;

    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    /// Sixteen IEEE half precision values, converted exactly.
    unsafe fn load_f16(from: *const u16) -> Self;
    /// Sixteen bfloat16 values, converted exactly.
    unsafe fn load_bf16(from: *const u16) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// Rounds to nearest even.
    unsafe fn store_f16(self, to: *mut u16);
    /// Rounds to nearest even.
    unsafe fn store_bf16(self, to: *mut u16);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// `self * b + c`, rounded once.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    /// `c - self * b`, rounded once.
    unsafe fn fnma(self, b: Self, c: Self) -> Self;
    /// `self > other ? self : other`: the second operand where either is NaN or both are zeros.
    unsafe fn max(self, other: Self) -> Self;
    /// `self < other ? self : other`: the second operand where either is NaN or both are zeros.
    unsafe fn min(self, other: Self) -> Self;
    /// Lane `i` of `self` where bit `i` of `mask` is set, else of `other`.
    unsafe fn select(self, other: Self, mask: u16) -> Self;
    /// For `n + ROUND_MAGIC` with an integer `n`: 2^(n >> 1) and 2^(n - (n >> 1)).
    unsafe fn pow2_halves(self) -> (Self, Self);
    /// Lane `j` of row `i` becomes lane `i` of row `j`.
    unsafe fn transpose(rows: &mut [Self; LANES]);

    #[inline(always)]
    unsafe fn to_array(self) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        // SAFETY: the array has sixteen elements; the CPU is the caller's promise.
        unsafe { self.store(lanes.as_mut_ptr()) };
        lanes
    }

    /// The first `count <= 16` lanes from memory, the others `fill`.
    #[inline(always)]
    unsafe fn load_part(from: *const f32, count: usize, fill: f32) -> Self {
        let mut lanes = [fill; LANES];
        // SAFETY: the caller promises `count` readable elements, and at most sixteen.
        unsafe {
            std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), count);
            Self::load(lanes.as_ptr())
        }
    }

    /// Writes the first `count <= 16` lanes.
    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, count: usize) {
        // SAFETY: the caller promises `count` writable elements, and at most sixteen.
        unsafe {
            let lanes = self.to_array();
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, count);
        }
    }

    /// Sum of the lanes: halves are added until one lane is left.
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the caller's promise.
        let mut lanes = unsafe { self.to_array() };
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        lanes[0]
    }

    /// The greatest lane, by the rule of [`max`](Self::max).
    #[inline(always)]
    unsafe fn greatest(self) -> f32 {
        // SAFETY: the caller's promise.
        let mut lanes = unsafe { self.to_array() };
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] = if lanes[i] > lanes[i + half] { lanes[i] } else { lanes[i + half] };
            }
            half /= 2;
        }
        lanes[0]
    }

    /// e^self within 1 ulp (2 ulp where the result is subnormal); exactly 0 for -infinity and below
    /// -104, infinity above 88.73, NaN for NaN.
    ///
    /// Cody and Waite's reduction to |r| <= ln(2)/2, then a polynomial of degree six with minimal
    /// relative error (0.06 ulp).
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let x = Self::splat(EXP_MIN).max(self);
            let x = Self::splat(EXP_MAX).min(x);
            let magic = Self::splat(ROUND_MAGIC);
            let biased = x.fma(Self::splat(std::f32::consts::LOG2_E), magic);
            let n = biased.sub(magic);
            let r = n.fnma(Self::splat(LN2_HIGH), x);
            let r = n.fnma(Self::splat(LN2_LOW), r);
            let mut p = Self::splat(EXP_COEFFICIENTS[4]);
            for k in (0..4).rev() {
                p = p.fma(r, Self::splat(EXP_COEFFICIENTS[k]));
            }
            let p = p.mul(r).fma(r, r).add(Self::splat(1.0));
            let (a, b) = biased.pow2_halves();
            p.mul(a).mul(b)
        }
    }
}

/// Asks for the cache line of `place` to come to the second-level cache.
#[inline(always)]
pub(crate) fn prefetch(place: &u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint that changes no value and cannot fault; SSE is part of x86_64.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(place).cast()) };
    }
    // Miri knows no assembly.
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    // SAFETY: a hint that changes no value and cannot fault.
    unsafe {
        let place = std::ptr::from_ref(place);
        std::arch::asm!(
            "prfm pldl2keep, [{place}]",
            place = in(reg) place,
            options(nostack, preserves_flags, readonly)
        );
    }
    #[cfg(not(any(target_arch = "x86_64", all(target_arch = "aarch64", not(miri)))))]
    let _ = place;
}

/// The reference: plain Rust, one lane after the other.
#[derive(Clone, Copy)]
pub(crate) struct ScalarLanes([f32; LANES]);

impl ScalarLanes {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

// The methods that only compute are safe in fact; `unsafe` is the trait's.
impl Lanes for ScalarLanes {
    const ROWS: usize = 1;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller promises sixteen readable elements.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the caller promises sixteen readable elements.
        Self(unsafe { from.cast::<[u16; LANES]>().read_unaligned() }.map(float::f16_to_f32))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller promises sixteen readable elements.
        Self(unsafe { from.cast::<[u16; LANES]>().read_unaligned() }.map(float::bf16_to_f32))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller promises sixteen writable elements.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        // SAFETY: the caller promises sixteen writable elements.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(self.0.map(float::f32_to_f16)) }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        // SAFETY: the caller promises sixteen writable elements.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(self.0.map(float::f32_to_bf16)) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].mul_add(b.0[i], c.0[i])))
    }

    #[inline(always)]
    unsafe fn fnma(self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|i| (-self.0[i]).mul_add(b.0[i], c.0[i])))
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn select(self, other: Self, mask: u16) -> Self {
        Self(std::array::from_fn(|i| if mask >> i & 1 != 0 { self.0[i] } else { other.0[i] }))
    }

    #[inline(always)]
    unsafe fn pow2_halves(self) -> (Self, Self) {
        let n = self.0.map(|x| (x.to_bits() as i32).wrapping_sub(ROUND_MAGIC.to_bits() as i32));
        let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
        (Self(n.map(|n| power(n >> 1))), Self(n.map(|n| power(n.wrapping_sub(n >> 1)))))
    }

    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self; LANES]) {
        for i in 0..LANES {
            for j in 0..i {
                let swapped = rows[i].0[j];
                rows[i].0[j] = rows[j].0[i];
                rows[j].0[i] = swapped;
            }
        }
    }
}

/// Calls a function that is generic over [`Lanes`] with the implementation for an [`Isa`], compiled
/// with its target features: `dispatch!(isa, name(arg: Type, ...) -> Ret)`.
///
/// An `isa` that this CPU does not have falls back to the greatest one that it has: the bits are the
/// same. The generic function is `unsafe`, and the macro only vouches for the CPU: what else it asks
/// is for the SAFETY comment at the place of use.
///
/// [`Isa`]: crate::isa::Isa
macro_rules! dispatch {
    ($isa:expr, $function:ident($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)?) => {{
        #[cfg(target_arch = "x86_64")]
        {
            use $crate::simd::{Avx2Lanes, Avx512Lanes, ScalarLanes};

            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
            unsafe fn avx512($($arg: $type),*) $(-> $ret)? {
                // SAFETY: passed on to the caller, who has seen these features.
                unsafe { $function::<Avx512Lanes>($($arg),*) }
            }
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2($($arg: $type),*) $(-> $ret)? {
                // SAFETY: passed on to the caller, who has seen these features.
                unsafe { $function::<Avx2Lanes>($($arg),*) }
            }

            // `Isa` can be named without having been detected.
            match $isa.min($crate::isa::Isa::detect()) {
                $crate::isa::Isa::Avx512 | $crate::isa::Isa::Avx512Bf16 => avx512($($arg),*),
                $crate::isa::Isa::Avx2 => avx2($($arg),*),
                _ => $function::<ScalarLanes>($($arg),*),
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            use $crate::simd::{NeonLanes, ScalarLanes};

            #[target_feature(enable = "neon")]
            unsafe fn neon($($arg: $type),*) $(-> $ret)? {
                // SAFETY: passed on to the caller, who has seen this feature.
                unsafe { $function::<NeonLanes>($($arg),*) }
            }

            // `Isa` can be named without having been detected.
            match $isa.min($crate::isa::Isa::detect()) {
                $crate::isa::Isa::Scalar
                | $crate::isa::Isa::Avx2
                | $crate::isa::Isa::Avx512
                | $crate::isa::Isa::Avx512Bf16 => $function::<ScalarLanes>($($arg),*),
                _ => neon($($arg),*),
            }
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        {
            let _ = $isa;
            $function::<$crate::simd::ScalarLanes>($($arg),*)
        }
    }};
}
pub(crate) use dispatch;

/// Adding it to |n| < 2^22 rounds n to an integer, which is then in the low bits.
pub(crate) const ROUND_MAGIC: f32 = 12_582_912.0;

/// e^EXP_MIN rounds to zero.
const EXP_MIN: f32 = -104.0;
/// e^EXP_MAX overflows.
const EXP_MAX: f32 = 89.0;
/// ln(2) with the low bits cut, so that its product with any |n| < 256 is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// e^r = 1 + r + r^2 (c0 + c1 r + ...), fitted to |r| <= 0.35 with equal relative ripples.
const EXP_COEFFICIENTS: [f32; 5] =
    [0.5, 0.166_665_13, 0.041_666_187, 0.008_369_59, 0.001_395_177_4];

#[cfg(test)]
mod tests;
