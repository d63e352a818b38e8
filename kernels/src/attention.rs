//! Causal attention over paged keys and values, with grouped queries and sliding windows.
//!
//! Owns the layout of a KV block, the writing of keys and values into blocks, and the attention of a
//! step's query rows. It refuses to know which request a block belongs to or who else uses it.
//!
//! # Exactness
//! The output of a query row at position p depends, bit for bit, on that row, on the keys and values
//! it may see and on nothing else: not on the rows beside it, the cut of the prefill, the number of
//! threads, the instruction set or the order of blocks in memory. For this,
//! - positions are taken in tiles of [`TILE`] and splits of [`SPLIT`] that start at absolute multiples;
//! - within a split the softmax is computed online over its tiles in ascending order (Milakov and
//!   Gimelshein 2018; Dao et al. 2022, "FlashAttention"), always from an empty state;
//! - splits are merged in ascending order, also where one thread computes them all ("flash decoding");
//! - a dot product q k is one chain of fused multiply-adds in ascending dimension, and each element of
//!   the output one chain in ascending position;
//! - positions that a row may not see are left out of its chains, not multiplied by zero.

mod kv;
mod plan;
mod tile;

pub use kv::{KvDtype, KvLayout, KvView, write_kv};

use std::sync::atomic::Ordering;

use crate::isa::Isa;
use crate::pool::ThreadPool;
use crate::simd::dispatch;
use plan::{Item, Plan};
use tile::{Tile, merge_partials, run_item};

/// The query rows of one sequence in a step, and where its keys and values are.
#[derive(Clone, Copy, Debug)]
pub struct SequenceQueries<'a> {
    /// Index of the first of its rows in q, k, v and the output.
    pub first_row: usize,
    /// Number of rows: consecutive tokens.
    pub tokens: usize,
    /// Position of the first row's token.
    pub position: usize,
    /// Blocks of the sequence in order; they must reach to the last row's position.
    pub blocks: &'a [u32],
}

/// What is the same for all rows of a call of [`attend`].
#[derive(Clone, Copy, Debug)]
pub struct AttentionParams {
    pub layer: usize,
    /// Query heads, a multiple of the layout's `kv_heads`: query head h uses KV head
    /// `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Factor of the scores, usually 1 / sqrt(head_dim).
    pub scale: f32,
    /// A row sees itself and the `window - 1` positions before it; None: all before it.
    pub window: Option<usize>,
}

/// Memory that [`attend`] keeps between calls. Grows to what the largest call needs: some hundred KiB
/// for each thread, and for long contexts of few sequences a partial result for each split.
#[derive(Debug, Default)]
pub struct AttentionScratch {
    plan: Plan,
    slots: Vec<f32>,
    partials: Vec<f32>,
}

impl AttentionScratch {
    pub fn new() -> Self {
        Self::default()
    }
}

/// `out = softmax(scale * q k^T + mask) v` for each row and query head; `q` and `out` are
/// [rows, heads, head_dim]. Keys and values of the rows themselves must have been written
/// ([`write_kv`]). Rows of `out` that belong to no sequence stay as they are.
///
/// # Panics
/// If shapes do not fit, a block lies outside of the storage, blocks do not reach to a row's position,
/// or `sequences` are not in ascending order of disjoint rows.
pub fn attend(
    pool: &ThreadPool,
    isa: Isa,
    kv: &KvView<'_>,
    params: &AttentionParams,
    q: &[f32],
    sequences: &[SequenceQueries<'_>],
    out: &mut [f32],
    scratch: &mut AttentionScratch,
) {
    let layout = &kv.layout;
    let row_len = params.heads * layout.head_dim;
    assert!(params.layer < layout.layers, "layer {} of {}", params.layer, layout.layers);
    assert!(
        params.heads > 0 && params.heads.is_multiple_of(layout.kv_heads),
        "{} query heads do not share {} kv heads",
        params.heads,
        layout.kv_heads
    );
    assert!(params.window != Some(0), "a window of zero positions sees nothing");
    assert_eq!(q.len(), out.len(), "queries and output differ in length");
    assert!(q.len().is_multiple_of(row_len), "q is not rows of {row_len}");
    layout.check(kv.storage.len(), sequences, q.len() / row_len);

    let AttentionScratch { plan, slots, partials } = scratch;
    plan.make(layout, params, sequences, pool.threads());
    partials.resize(plan.partials_len().max(partials.len()), 0.0);
    let tile = Tile::new(layout.head_dim, plan.rows_max());
    let slots_used = plan.slots();
    slots.resize((slots_used * tile.slot_len()).max(slots.len()), 0.0);

    let call = Call {
        kv,
        params,
        sequences,
        q,
        out: out.as_mut_ptr(),
        partials: partials.as_mut_ptr(),
        plan,
        tile,
    };
    let call = &call;
    let slots = &mut slots[..slots_used * tile.slot_len()];
    pool.run_chunks(slots, tile.slot_len(), |_, slot| {
        while let Some(item) = call.plan.claim() {
            // SAFETY: `check` and the assertions above have established the bounds that `run_item`
            // asks for; each item is claimed once, and items write to disjoint places.
            unsafe {
                dispatch!(isa, run_item(call: &Call<'_>, item: Item, slot: &mut [f32]));
                let group = &call.plan.groups[item.group];
                if item.split.is_some() && group.remaining.fetch_sub(1, Ordering::AcqRel) == 1 {
                    // The last split of the group: all partials are written and visible.
                    dispatch!(isa, merge_partials(call: &Call<'_>, item: Item, slot: &mut [f32]));
                }
            }
        }
    });
}

/// One call of [`attend`], shared by all threads.
struct Call<'a> {
    kv: &'a KvView<'a>,
    params: &'a AttentionParams,
    sequences: &'a [SequenceQueries<'a>],
    q: &'a [f32],
    out: *mut f32,
    partials: *mut f32,
    plan: &'a Plan,
    tile: Tile,
}

// SAFETY: the pointers are to buffers that `attend` borrows mutably for the life of the call, and items
// write to disjoint parts of them; everything else is shared for reading.
unsafe impl Sync for Call<'_> {}

impl Call<'_> {
    /// Positions that a row at `position` sees: from the first to before the second.
    #[inline(always)]
    fn visible(&self, position: usize) -> (usize, usize) {
        plan::visible(self.params.window, position)
    }
}

/// Positions whose keys are taken together; a multiple of the lanes.
pub const TILE: usize = 64;
/// Positions that one softmax state covers before it is merged into the total; a multiple of [`TILE`].
/// Smaller: more merging (below 1 % here). Larger: less work to share between the threads for one
/// decoding sequence.
pub const SPLIT: usize = 256;

#[cfg(test)]
mod tests;
