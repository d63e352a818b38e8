//! The instruction sets that kernels are written for.
//!
//! An [`Isa`] above [`Isa::Scalar`] can only be had from [`Isa::detect`] or [`Isa::available`],
//! or by naming a variant: kernels therefore check again, once for each call, that the CPU has
//! what the variant promises.
//!
//! What is proven and how: all tests of this crate run for every variant that the CPU has, against
//! the bits of [`Isa::Scalar`]. The NEON variants run them under an emulator (`kernels/aarch64`):
//! their results are proven, their speed was never measured.

use std::fmt;
use std::sync::OnceLock;

/// An instruction set; those of one architecture are ordered from the slowest to the fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable Rust, the reference that the others are tested against.
    Scalar,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL, DQ and VNNI (and everything in [`Isa::Avx2`]).
    Avx512,
    /// AVX-512 with products of pairs of bfloat16 (and everything in [`Isa::Avx512`]).
    Avx512Bf16,
    /// What every aarch64 has: NEON with conversion of binary16.
    Neon,
    /// NEON with dot products of bytes (`dotprod`, from Armv8.2 on).
    NeonDot,
    /// NEON with products of matrices of bytes (`i8mm`, from Armv8.6 on; and all of
    /// [`Isa::NeonDot`]).
    NeonI8mm,
}

impl Isa {
    const ALL: [Isa; 7] = [
        Isa::Scalar,
        Isa::Avx2,
        Isa::Avx512,
        Isa::Avx512Bf16,
        Isa::Neon,
        Isa::NeonDot,
        Isa::NeonI8mm,
    ];

    /// The fastest instruction set of this CPU.
    pub fn detect() -> Isa {
        let available = Isa::ALL.into_iter().rev().find(|isa| isa.is_available() && isa.pays());
        available.expect("every CPU runs scalar kernels")
    }

    /// All instruction sets that this CPU has, slowest first.
    pub fn available() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// Whether this CPU can run kernels of this instruction set.
    #[cfg(target_arch = "x86_64")]
    pub fn is_available(self) -> bool {
        let avx2 = || {
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
        };
        let avx512 = || {
            avx2()
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vnni")
        };
        match self {
            Isa::Scalar => true,
            Isa::Avx2 => avx2(),
            Isa::Avx512 => avx512(),
            Isa::Avx512Bf16 => {
                avx512()
                    && is_x86_feature_detected!("avx512bf16")
                    && *PAIRS_AGREE.get_or_init(|| {
                        // SAFETY: the CPU has the instruction set.
                        unsafe { crate::arch::avx512::pairs_agree() }
                    })
            }
            Isa::Neon | Isa::NeonDot | Isa::NeonI8mm => false,
        }
    }

    /// Whether this CPU can run kernels of this instruction set.
    #[cfg(target_arch = "aarch64")]
    pub fn is_available(self) -> bool {
        use std::arch::is_aarch64_feature_detected as detected;
        // Miri has no vector instructions, whatever the CPU.
        let vectors = !cfg!(miri);
        match self {
            Isa::Scalar => true,
            Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 => false,
            Isa::Neon => vectors && detected!("neon"),
            Isa::NeonDot => vectors && detected!("neon") && detected!("dotprod"),
            Isa::NeonI8mm => {
                vectors && detected!("neon") && detected!("dotprod") && detected!("i8mm")
            }
        }
    }

    /// Whether this CPU can run kernels of this instruction set.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub fn is_available(self) -> bool {
        self == Isa::Scalar
    }

    /// Whether it is faster than those before it, where that is not the same on all CPUs that have it:
    /// some multiply pairs of bfloat16 at half the pace of single floats, others at twice that pace.
    fn pays(self) -> bool {
        self != Isa::Avx512Bf16 || *PAIRS_PAY.get_or_init(crate::measure::pairs_pay)
    }

    /// Panics unless the CPU has this instruction set: what makes calling its kernels sound.
    pub(crate) fn assert_available(self) {
        assert!(self.is_available(), "this CPU does not have {self}");
    }
}

/// Whether the CPU's products of pairs have the bits of two fused multiply-adds.
#[cfg(target_arch = "x86_64")]
static PAIRS_AGREE: OnceLock<bool> = OnceLock::new();
static PAIRS_PAY: OnceLock<bool> = OnceLock::new();

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512-bf16",
            Isa::Neon => "neon",
            Isa::NeonDot => "neon-dot",
            Isa::NeonI8mm => "neon-i8mm",
        })
    }
}
