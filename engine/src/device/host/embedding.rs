//! Rows of the token embedding, read where they lie.

use crate::model::{LoadError, TensorSource};
use crate::weights::{Format, Tensor, TensorRole};
use kernels::format::dequantize;
use kernels::pool::ThreadPool;
use protocol::TokenId;
use std::borrow::Cow;
use std::sync::Arc;

/// The token embedding `[vocab, hidden]`, in the format of the file and without a copy of it.
pub struct Embedding {
    source: Arc<dyn TensorSource>,
    /// The table, where the source had to make it; otherwise it stays in the source.
    made: Option<Vec<u8>>,
    format: Format,
    row_bytes: usize,
    hidden: usize,
}

impl Embedding {
    pub(super) fn new(source: Arc<dyn TensorSource>) -> Result<Self, LoadError> {
        let table = source.tensor(TensorRole::TokenEmbedding)?;
        let Tensor { format, cols: hidden, .. } = table;
        let row_bytes = format.bytes_for(hidden).ok_or_else(|| {
            let reason = format!("a row of {hidden} values does not fill {format} blocks");
            LoadError::Tensor { tensor: table.name.clone(), reason }
        })?;
        let made = match table.bytes {
            Cow::Owned(bytes) => Some(bytes),
            Cow::Borrowed(_) => None,
        };
        Ok(Embedding { source, made, format, row_bytes, hidden })
    }

    pub(super) fn hidden(&self) -> usize {
        self.hidden
    }

    /// `out[t] = table[tokens[t]]`, `[tokens, hidden]`. Every token is in the vocabulary.
    pub(super) fn look_up(&self, pool: &ThreadPool, tokens: &[TokenId], out: &mut [f32]) {
        let table = match &self.made {
            Some(bytes) => Cow::Borrowed(bytes.as_slice()),
            None => match self.source.tensor(TensorRole::TokenEmbedding) {
                Ok(table) => table.bytes,
                // The source gave it when the decoder was loaded, and sources do not change.
                Err(_) => Cow::Borrowed(&[][..]),
            },
        };
        pool.run_chunks(out, self.hidden * ROWS_PER_TASK, |task, out| {
            let tokens = &tokens[task * ROWS_PER_TASK..];
            for (&token, out) in tokens.iter().zip(out.chunks_exact_mut(self.hidden)) {
                let from = token as usize * self.row_bytes;
                let row = table.get(from..from + self.row_bytes);
                if row.is_none_or(|row| dequantize(self.format, row, out).is_err()) {
                    // Shows in every logit instead of hiding.
                    out.fill(f32::NAN);
                }
            }
        });
    }
}

/// Rows that are worth handing to a thread.
const ROWS_PER_TASK: usize = 16;
