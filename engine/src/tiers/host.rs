//! Payloads of blocks in host memory.

use cache::tiers::HostSlot;
use std::sync::Arc;

/// A bounded number of payloads of one size. Memory is taken when a place is used first, and kept.
///
/// A payload can be read by another thread while it lies here; it must not be replaced meanwhile, and
/// `cache::tiers` sees to that with its pins.
pub(super) struct HostSlab {
    block_bytes: usize,
    places: Vec<Option<Arc<Vec<u8>>>>,
}

impl HostSlab {
    pub fn new(block_bytes: usize) -> Self {
        HostSlab { block_bytes, places: Vec::new() }
    }

    /// Copies a payload into a place.
    pub fn store(&mut self, slot: HostSlot, payload: &[u8]) {
        assert_eq!(payload.len(), self.block_bytes, "payloads of one pool have one size");
        let place = self.place(slot);
        match place.as_mut().and_then(Arc::get_mut) {
            Some(buffer) => buffer.copy_from_slice(payload),
            // New, or somebody who was given it has answered and not let go yet.
            None => *place = Some(Arc::new(payload.to_vec())),
        }
    }

    /// An empty buffer for this place, to be given back by [`put`](Self::put).
    pub fn take(&mut self, slot: HostSlot) -> Vec<u8> {
        let block_bytes = self.block_bytes;
        let before = self.place(slot).take().and_then(Arc::into_inner);
        before.unwrap_or_else(|| vec![0; block_bytes])
    }

    pub fn put(&mut self, slot: HostSlot, payload: Vec<u8>) {
        *self.place(slot) = Some(Arc::new(payload));
    }

    /// What lies in a place; `None` if nothing was put there.
    pub fn payload(&self, slot: HostSlot) -> Option<&Arc<Vec<u8>>> {
        self.places.get(slot.0 as usize)?.as_ref()
    }

    fn place(&mut self, slot: HostSlot) -> &mut Option<Arc<Vec<u8>>> {
        let index = slot.0 as usize;
        if self.places.len() <= index {
            self.places.resize(index + 1, None);
        }
        &mut self.places[index]
    }
}
