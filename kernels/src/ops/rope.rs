//! Rotary position embedding (Su et al. 2021, "RoFormer").
//!
//! Owns the rotation of rows and the cosines and sines of the positions of one step. Frequencies come
//! from the model: how they are scaled for long contexts is decided there.

use crate::pool::ThreadPool;

/// Which elements of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// Elements 2i and 2i + 1: the order of GGUF files of the llama architecture.
    Interleaved,
    /// Elements i and i + dims / 2: the order of Hugging Face checkpoints.
    HalfSplit,
}

/// Cosines and sines for the rows of one step, shared by all layers.
#[derive(Clone, Debug)]
pub struct RopeTable {
    layout: RopeLayout,
    inv_freq: Vec<f32>,
    mscale: f32,
    /// [rows, 2, pairs]: cosines, then sines.
    rows: Vec<f32>,
}

impl RopeTable {
    /// Rotates the first `2 * inv_freq.len()` elements of each head, pair `i` by
    /// `position * inv_freq[i]`. Cosines and sines are multiplied by `mscale` (the attention factor of
    /// YaRN; 1 otherwise).
    ///
    /// # Panics
    /// If `inv_freq` is empty.
    pub fn new(layout: RopeLayout, inv_freq: &[f32], mscale: f32) -> Self {
        assert!(!inv_freq.is_empty(), "rope needs at least one frequency");
        Self { layout, inv_freq: inv_freq.to_vec(), mscale, rows: Vec::new() }
    }

    /// Elements of a head that are rotated.
    pub fn dims(&self) -> usize {
        2 * self.inv_freq.len()
    }

    /// Computes the rows of a step: row `t` belongs to a token at `positions[t]`. The angle is rounded
    /// to f32 before its cosine is taken, as transformers does.
    pub fn set_positions(&mut self, positions: &[u32]) {
        self.rows.clear();
        self.rows.reserve(positions.len() * self.dims());
        for &position in positions {
            let angle = |f: &f32| f64::from(position as f32 * f);
            let cosines = self.inv_freq.iter().map(|f| angle(f).cos() as f32 * self.mscale);
            self.rows.extend(cosines);
            let sines = self.inv_freq.iter().map(|f| angle(f).sin() as f32 * self.mscale);
            self.rows.extend(sines);
        }
    }

    /// Rotates `x` of [rows, heads, head_dim] in place, one row for each position that was set.
    ///
    /// # Panics
    /// If `x` does not have that many rows of `heads * head_dim`, or a head is shorter than
    /// [`dims`](Self::dims).
    pub fn apply(&self, pool: &ThreadPool, x: &mut [f32], heads: usize, head_dim: usize) {
        let dims = self.dims();
        let row_len = heads * head_dim;
        assert!(dims <= head_dim, "rope turns {dims} elements of a head that has {head_dim}");
        assert_eq!(
            x.len(),
            self.rows.len() / dims * row_len,
            "rows and positions differ in number"
        );
        if x.is_empty() {
            return;
        }
        let rows_per_task = (super::ELEMENTS_PER_TASK / row_len).max(1);
        pool.run_chunks(x, rows_per_task * row_len, |index, x| {
            let angles = self.rows[index * rows_per_task * dims..].chunks_exact(dims);
            for (row, angles) in x.chunks_exact_mut(row_len).zip(angles) {
                let (cosines, sines) = angles.split_at(dims / 2);
                for head in row.chunks_exact_mut(head_dim) {
                    rotate(self.layout, &mut head[..dims], cosines, sines);
                }
            }
        });
    }
}

/// Products and sums are rounded apart (no fused multiply), as transformers does.
fn rotate(layout: RopeLayout, x: &mut [f32], cosines: &[f32], sines: &[f32]) {
    match layout {
        RopeLayout::Interleaved => {
            for ((pair, c), s) in x.as_chunks_mut::<2>().0.iter_mut().zip(cosines).zip(sines) {
                let [a, b] = *pair;
                *pair = [a * c - b * s, b * c + a * s];
            }
        }
        RopeLayout::HalfSplit => {
            let (low, high) = x.split_at_mut(cosines.len());
            for (((a, b), c), s) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
                let (was_a, was_b) = (*a, *b);
                *a = was_a * c - was_b * s;
                *b = was_b * c + was_a * s;
            }
        }
    }
}
