//! The canonical layout of a KV block, and writing into it.

use super::SequenceQueries;
use crate::isa::Isa;
use crate::pool::ThreadPool;
use crate::simd::{LANES, Lanes, dispatch};

/// Element type of stored keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDtype {
    F16,
    Bf16,
    F32,
}

impl KvDtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            KvDtype::F16 | KvDtype::Bf16 => 2,
            KvDtype::F32 => 4,
        }
    }
}

/// Shape of the blocks of a model. A block is one contiguous payload of
/// `[layer][k, v][kv_head][token][head_dim]` in native (little) byte order, blocks are back to back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    pub layers: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Tokens of one block.
    pub block_tokens: usize,
    pub dtype: KvDtype,
}

impl KvLayout {
    /// Bytes of the row of one token in one plane.
    pub const fn row_bytes(&self) -> usize {
        self.head_dim * self.dtype.bytes()
    }

    /// Bytes of a plane: the keys or the values of one layer and KV head.
    pub const fn plane_bytes(&self) -> usize {
        self.block_tokens * self.row_bytes()
    }

    /// Bytes of a block.
    pub const fn block_bytes(&self) -> usize {
        2 * self.layers * self.kv_heads * self.plane_bytes()
    }

    /// Offset inside a block of the keys of a layer and KV head.
    pub const fn key_plane(&self, layer: usize, kv_head: usize) -> usize {
        (2 * layer * self.kv_heads + kv_head) * self.plane_bytes()
    }

    /// Offset inside a block of the values of a layer and KV head.
    pub const fn value_plane(&self, layer: usize, kv_head: usize) -> usize {
        ((2 * layer + 1) * self.kv_heads + kv_head) * self.plane_bytes()
    }

    /// Panics unless every row of `sequences` is one of `rows`, no two share one, and the blocks of
    /// their positions exist in a storage of `storage_len` bytes.
    pub(super) fn check(&self, storage_len: usize, sequences: &[SequenceQueries<'_>], rows: usize) {
        let block_bytes = self.block_bytes();
        assert!(block_bytes > 0, "a kv block must not be empty");
        let blocks_stored = storage_len / block_bytes;
        let mut next_row = 0;
        for (i, s) in sequences.iter().enumerate() {
            assert!(s.first_row >= next_row, "rows of sequence {i} overlap or are out of order");
            next_row = s.first_row + s.tokens;
            assert!(next_row <= rows, "rows of sequence {i} end at {next_row} of {rows}");
            let blocks = (s.position + s.tokens).div_ceil(self.block_tokens);
            assert!(blocks <= s.blocks.len(), "sequence {i} needs {blocks} blocks");
            let stored = s.blocks[..blocks].iter().all(|&b| (b as usize) < blocks_stored);
            assert!(stored, "sequence {i} names a block outside of the {blocks_stored} stored");
        }
    }
}

/// Stored keys and values.
#[derive(Clone, Copy, Debug)]
pub struct KvView<'a> {
    pub layout: KvLayout,
    /// All blocks back to back: block b begins at `b * layout.block_bytes()`.
    pub storage: &'a [u8],
}

/// Stores the keys and values of a step's rows for one layer: row t of a sequence goes to position
/// `position + t`. `k` and `v` are [rows, kv_heads, head_dim]; f16 and bf16 are rounded to nearest
/// even.
///
/// A position that two sequences name (a shared block) gets the rows of the later one.
///
/// # Panics
/// If shapes do not fit, a block lies outside of the storage, blocks do not reach to a row's position,
/// or `sequences` are not in ascending order of disjoint rows.
pub fn write_kv(
    pool: &ThreadPool,
    isa: Isa,
    layout: &KvLayout,
    storage: &mut [u8],
    layer: usize,
    k: &[f32],
    v: &[f32],
    sequences: &[SequenceQueries<'_>],
) {
    let row_len = layout.kv_heads * layout.head_dim;
    assert!(layer < layout.layers, "layer {layer} of {}", layout.layers);
    assert_eq!(k.len(), v.len(), "keys and values differ in length");
    assert!(k.len().is_multiple_of(row_len), "k is not rows of {row_len}");
    layout.check(storage.len(), sequences, k.len() / row_len);

    let write = Write { layout, storage: storage.as_mut_ptr(), layer, k, v, sequences };
    let write = &write;
    let planes = 2 * layout.kv_heads;
    let task = |plane: usize| {
        // SAFETY: `check` has established that all rows and blocks exist, and each plane is written
        // by one task.
        unsafe { dispatch!(isa, write_plane(write: &Write<'_>, plane: usize)) }
    };
    if k.len() < ELEMENTS_WORTH_A_REGION {
        (0..planes).for_each(task);
    } else {
        pool.run(planes, &task);
    }
}

struct Write<'a> {
    layout: &'a KvLayout,
    storage: *mut u8,
    layer: usize,
    k: &'a [f32],
    v: &'a [f32],
    sequences: &'a [SequenceQueries<'a>],
}

// SAFETY: `storage` is borrowed mutably for the life of this value, and tasks write disjoint planes.
unsafe impl Sync for Write<'_> {}

/// Writes the rows of one KV head: planes 0.. are keys, planes `kv_heads`.. are values.
#[inline(always)]
unsafe fn write_plane<L: Lanes>(write: &Write<'_>, plane: usize) {
    let layout = write.layout;
    let (heads, head_dim, block_tokens) = (layout.kv_heads, layout.head_dim, layout.block_tokens);
    let head = plane % heads;
    let (from, plane_offset) = if plane < heads {
        (write.k, layout.key_plane(write.layer, head))
    } else {
        (write.v, layout.value_plane(write.layer, head))
    };
    for sequence in write.sequences {
        for t in 0..sequence.tokens {
            let position = sequence.position + t;
            let block = sequence.blocks[position / block_tokens] as usize;
            let offset = block * layout.block_bytes()
                + plane_offset
                + position % block_tokens * layout.row_bytes();
            let row = &from[((sequence.first_row + t) * heads + head) * head_dim..][..head_dim];
            // SAFETY: the block exists (the caller's promise), and the row lies inside of it.
            unsafe { store_row::<L>(row, layout.dtype, write.storage.add(offset)) };
        }
    }
}

/// Converts `row` to `dtype` at `to`, which has room for it.
#[inline(always)]
unsafe fn store_row<L: Lanes>(row: &[f32], dtype: KvDtype, to: *mut u8) {
    let whole = row.len() / LANES * LANES;
    let bytes = dtype.bytes();
    // SAFETY: offsets stay below the length of the row on both sides.
    unsafe {
        for i in (0..whole).step_by(LANES) {
            let lanes = L::load(row.as_ptr().add(i));
            match dtype {
                KvDtype::F16 => lanes.store_f16(to.add(i * bytes).cast()),
                KvDtype::Bf16 => lanes.store_bf16(to.add(i * bytes).cast()),
                KvDtype::F32 => lanes.store(to.add(i * bytes).cast()),
            }
        }
        let rest = row.len() - whole;
        if rest > 0 {
            let lanes = L::load_part(row.as_ptr().add(whole), rest, 0.0);
            let mut converted = [0u8; 4 * LANES];
            match dtype {
                KvDtype::F16 => lanes.store_f16(converted.as_mut_ptr().cast()),
                KvDtype::Bf16 => lanes.store_bf16(converted.as_mut_ptr().cast()),
                KvDtype::F32 => lanes.store(converted.as_mut_ptr().cast()),
            }
            let to = to.add(whole * bytes);
            std::ptr::copy_nonoverlapping(converted.as_ptr(), to, rest * bytes);
        }
    }
}

/// Below this the conversion is done before another thread would have begun.
const ELEMENTS_WORTH_A_REGION: usize = 16_384;
