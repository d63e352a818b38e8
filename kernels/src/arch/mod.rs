//! Kernels for one instruction set each. Every function here is `unsafe` to call for one reason:
//! the caller must know that the CPU has the features that it names.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) mod f16c;
