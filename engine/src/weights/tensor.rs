//! A tensor's bytes with their meaning.

use std::borrow::Cow;

use super::Format;

/// A matrix, or a vector as one row. The bytes are row-major in `format` and need not be aligned;
/// a row fills whole blocks of the format.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    /// Its name in the file.
    pub name: String,
    pub format: Format,
    pub rows: usize,
    pub cols: usize,
    /// Borrowed from the mapped file where nothing had to be changed.
    pub bytes: Cow<'a, [u8]>,
}
