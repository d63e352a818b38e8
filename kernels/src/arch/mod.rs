//! Kernels for one instruction set each. Every function here is `unsafe` to call for one reason:
//! the caller must know that the CPU has the features that it names.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) mod f16c;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;

/// Signed levels as bytes with their zero at 128.
#[cfg(target_arch = "x86_64")]
const fn levels_from_zero(levels: &[i8; 16]) -> [u8; 16] {
    let mut bytes = [0; 16];
    let mut i = 0;
    while i < 16 {
        bytes[i] = levels[i] as u8 ^ 0x80;
        i += 1;
    }
    bytes
}
