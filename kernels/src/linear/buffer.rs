//! Memory for packed weights.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use crate::pages::{HUGE_PAGE, advise_huge_pages};

/// Bytes that begin at a cache line, and lie in huge pages as far as the system has them.
pub(super) struct Buffer {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a `Buffer` owns its memory and hands out shared slices only, but for `piece`, whose
// callers promise not to overlap.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Memory with any content: every byte is written, through [`Buffer::piece`], before
    /// [`Buffer::bytes`] is called. None if no memory can have this size.
    pub fn new(len: usize) -> Option<Buffer> {
        let layout = layout(len)?;
        // SAFETY: the size is not zero.
        let start = unsafe { alloc(layout) };
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout));
        // SAFETY: just allocated.
        unsafe { advise_huge_pages(start.as_ptr(), len) };
        Some(Buffer { start, len })
    }

    /// Bytes of the buffer.
    pub fn len(&self) -> usize {
        self.len
    }

    /// A part of the buffer for writing, zeroed.
    ///
    /// # Panics
    /// If it is not inside of the buffer.
    ///
    /// # Safety
    /// Nothing else uses these bytes while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn piece(&self, first: usize, len: usize) -> &mut [u8] {
        assert!(first <= self.len && len <= self.len - first, "a piece of the buffer");
        // SAFETY: inside of the allocation, as was just checked; initialized before it becomes a
        // slice; that it is the only one is promised by the caller.
        unsafe {
            let start = self.start.as_ptr().add(first);
            start.write_bytes(0, len);
            std::slice::from_raw_parts_mut(start, len)
        }
    }

    /// All bytes.
    ///
    /// # Safety
    /// All of them were written, and no [`Buffer::piece`] is alive.
    pub unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: `start` owns `len` bytes for as long as `self` lives; the rest is promised by
        // the caller.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let layout = layout(self.len).expect("checked in new");
        // SAFETY: allocated in `new` with this very layout.
        unsafe { dealloc(self.start.as_ptr(), layout) }
    }
}

fn layout(len: usize) -> Option<Layout> {
    let align = if len >= HUGE_PAGE { HUGE_PAGE } else { LINE };
    Layout::from_size_align(len.max(1), align).ok()
}

/// Bytes of a cache line.
const LINE: usize = 64;
