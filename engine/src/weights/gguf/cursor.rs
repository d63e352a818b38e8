//! A place in the bytes of a file, and the sentences for when they end too early.

use std::fmt::Display;
use std::path::Path;

use crate::weights::ModelError;

/// Reads forward; every failure names the file, the place and what was being read.
pub(super) struct Cursor<'a> {
    file: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(file: &'a Path, bytes: &'a [u8]) -> Cursor<'a> {
        Cursor { file, bytes, at: 0 }
    }

    /// Bytes read so far.
    pub fn at(&self) -> usize {
        self.at
    }

    /// What is not read yet.
    pub fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }

    pub fn take(&mut self, len: u64, what: &dyn Display) -> Result<&'a [u8], ModelError> {
        let taken = usize::try_from(len).ok().and_then(|len| self.rest().get(..len));
        let Some(taken) = taken else {
            let (end, at) = (self.bytes.len(), self.at);
            return Err(self.refuse(format!(
                "the file ends too early: {what} needs {len} bytes at {at}, the file has {end}"
            )));
        };
        self.at += taken.len();
        Ok(taken)
    }

    pub fn array<const N: usize>(&mut self, what: impl Display) -> Result<[u8; N], ModelError> {
        let taken = self.take(N as u64, &what)?;
        Ok(taken.try_into().expect("take gives the length asked for"))
    }

    pub fn u32(&mut self, what: impl Display) -> Result<u32, ModelError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, what: impl Display) -> Result<u64, ModelError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A length and that many bytes.
    pub fn string(&mut self, what: &dyn Display) -> Result<&'a [u8], ModelError> {
        let len = self.u64(what)?;
        self.take(len, what)
    }

    /// A string that names something: UTF-8 of 1 to `max` bytes.
    pub fn name(&mut self, what: &dyn Display, max: usize) -> Result<&'a str, ModelError> {
        let at = self.at;
        let bytes = self.string(what)?;
        match std::str::from_utf8(bytes) {
            Ok(name) if (1..=max).contains(&name.len()) => Ok(name),
            Ok(_) => {
                let len = bytes.len();
                Err(self.refuse(format!("{what} at {at} is {len} bytes; expected 1 to {max}")))
            }
            Err(_) => Err(self.refuse(format!("{what} at {at} is not UTF-8"))),
        }
    }

    pub fn refuse(&self, reason: impl Into<String>) -> ModelError {
        ModelError::File { file: self.file.to_owned(), reason: reason.into() }
    }

    pub fn refuse_tensor(&self, tensor: &str, reason: impl Into<String>) -> ModelError {
        ModelError::Tensor {
            file: self.file.to_owned(),
            tensor: tensor.to_owned(),
            reason: reason.into(),
        }
    }
}
