//! Where a decoder's weights come from.

use super::DecoderConfig;
use crate::weights::{ModelError, ModelSource, Tensor, TensorRole};

/// A model as its description and its tensors, whatever they are stored in.
pub trait TensorSource: Send + Sync {
    fn config(&self) -> &DecoderConfig;

    /// The tensor of a role that [`TensorRole::all`] names for this description, in the role's
    /// shape. Cheap where the bytes are borrowed.
    fn tensor(&self, role: TensorRole) -> Result<Tensor<'_>, ModelError>;

    /// BLAKE3 of all tensors: different for any other weights. May read all of them.
    fn digest(&self) -> [u8; 32];

    /// Says that a borrowed tensor was copied and its pages may leave memory.
    fn release(&self, _role: TensorRole) {}
}

impl TensorSource for ModelSource {
    fn config(&self) -> &DecoderConfig {
        &self.config
    }

    fn tensor(&self, role: TensorRole) -> Result<Tensor<'_>, ModelError> {
        ModelSource::tensor(self, role)
    }

    fn digest(&self) -> [u8; 32] {
        ModelSource::digest(self)
    }

    fn release(&self, role: TensorRole) {
        ModelSource::release(self, role);
    }
}
