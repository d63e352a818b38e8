//! The bytes of KV blocks.

use crate::device::DeviceError;
use cache::BlockId;
use kernels::attention::{KvLayout, KvView};

/// Storage for a fixed number of blocks in one allocation.
///
/// A block is one contiguous payload in the canonical layout `[layer][k|v][kv_head][token][head_dim]`,
/// little-endian, so that it can travel as it is. Pages, huge ones if the system has them, are touched
/// when a block is written first.
pub struct KvStorage {
    layout: KvLayout,
    capacity: usize,
    bytes: Vec<u8>,
    /// Where the first block begins, so that it is aligned to [`ALIGNMENT`].
    start: usize,
}

impl KvStorage {
    /// Room for `capacity` blocks; nothing is touched yet.
    pub(super) fn new(layout: KvLayout, capacity: usize) -> Result<Self, DeviceError> {
        let bytes = capacity.saturating_mul(layout.block_bytes());
        let too_large = || DeviceError::Memory { bytes };
        let len = bytes.checked_add(ALIGNMENT).ok_or_else(too_large)?;
        // Asks whether the memory can be had before an allocation that would abort.
        Vec::<u8>::new().try_reserve_exact(len).map_err(|_| too_large())?;
        let mut bytes = vec![0u8; len];
        kernels::pages::prefer_huge_pages(&mut bytes);
        let start = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Ok(KvStorage { layout, capacity, bytes, start })
    }

    /// The payload of a block.
    pub(super) fn block(&self, block: BlockId) -> &[u8] {
        let size = self.layout.block_bytes();
        &self.bytes[self.start + block.0 as usize * size..][..size]
    }

    /// Replaces the payload of a block by these pieces, one after the other.
    pub(super) fn write_block<P: AsRef<[u8]>>(&mut self, block: BlockId, pieces: &[P]) {
        let size = self.layout.block_bytes();
        let mut rest = &mut self.bytes[self.start + block.0 as usize * size..][..size];
        for piece in pieces {
            let (place, after) = rest.split_at_mut(piece.as_ref().len());
            place.copy_from_slice(piece.as_ref());
            rest = after;
        }
    }

    /// All blocks for reading.
    pub(super) fn view(&self) -> KvView<'_> {
        let len = self.capacity * self.layout.block_bytes();
        KvView { layout: self.layout, storage: &self.bytes[self.start..][..len] }
    }

    /// All blocks, back to back, for writing.
    pub(super) fn parts_mut(&mut self) -> (&KvLayout, &mut [u8]) {
        let len = self.capacity * self.layout.block_bytes();
        (&self.layout, &mut self.bytes[self.start..][..len])
    }
}

/// Blocks begin at a cache line.
const ALIGNMENT: usize = 64;
