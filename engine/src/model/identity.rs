//! What the bits of cached keys and values depend on.

use super::{Architecture, Quant, Rope, RopeLayout};
use kernels::attention::KvDtype;

/// Keys and values may be shared exactly between executors whose identities are equal.
///
/// Where blocks lie (layer range, block size) is the placement's business and not part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NumericalIdentity {
    /// BLAKE3 of all weights as the file has them.
    pub weights_digest: [u8; 32],
    /// How float weights were quantized while loading.
    pub quant: Option<Quant>,
    pub architecture: Architecture,
    pub kv_dtype: KvDtype,
    /// BLAKE3 of the rotary frequencies, their scale and their layout.
    pub rope_digest: [u8; 32],
    /// [`Device::NUMERICS`](crate::device::Device::NUMERICS) of what computes.
    pub numerics_version: u32,
}

impl NumericalIdentity {
    /// The identity as one value, for the root of the block hash chain.
    pub fn digest(&self) -> [u8; 32] {
        let dtype: u8 = match self.kv_dtype {
            KvDtype::F16 => 0,
            KvDtype::Bf16 => 1,
            KvDtype::F32 => 2,
        };
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&self.numerics_version.to_le_bytes());
        hasher.update(&self.weights_digest);
        hasher.update(&self.rope_digest);
        let quant: u8 = match self.quant {
            None => 0,
            Some(Quant::Q8_0) => 1,
            Some(Quant::Q4_0) => 2,
        };
        hasher.update(&[dtype, quant]);
        hasher.update(self.architecture.name().as_bytes());
        *hasher.finalize().as_bytes()
    }
}

pub(crate) fn rope_digest(rope: &Rope) -> [u8; 32] {
    let layout: u8 = match rope.layout {
        RopeLayout::Interleaved => 0,
        RopeLayout::Half => 1,
    };
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[layout]);
    hasher.update(&rope.mscale().to_le_bytes());
    for frequency in rope.inv_freq() {
        hasher.update(&frequency.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// Grows whenever a change of the engine changes the bits of keys and values on the CPU.
pub const NUMERICS_VERSION: u32 = 2;

const CONTEXT: &str = "grapevine 2026-11 numerical identity of keys and values";
