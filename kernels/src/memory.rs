//! What the system is told about large memory.

use std::ptr::NonNull;

/// Asks for huge pages under the part of `bytes` that can have them: what is read all over for each
/// token would otherwise wait for address translation, and the first write to each small page for the
/// system. Content stays as it is; whether the advice was taken makes no difference but speed.
pub fn prefer_huge_pages(bytes: &mut [u8]) {
    // SAFETY: the range is that of the slice.
    unsafe { advise_huge_pages(NonNull::from(&mut *bytes).cast(), bytes.len()) }
}

/// Only whole huge pages inside of the range: the system could otherwise back what lies around it,
/// too.
///
/// # Safety
/// The range belongs to one allocation.
#[cfg(target_os = "linux")]
pub(crate) unsafe fn advise_huge_pages(start: NonNull<u8>, len: usize) {
    unsafe extern "C" {
        fn madvise(addr: *mut std::ffi::c_void, length: usize, advice: i32) -> i32;
    }
    const MADV_HUGEPAGE: i32 = 14;
    let before = start.align_offset(HUGE_PAGE);
    let whole = len.saturating_sub(before) / HUGE_PAGE * HUGE_PAGE;
    if whole > 0 {
        // SAFETY: inside of the range; the advice changes no content.
        unsafe { madvise(start.as_ptr().add(before).cast(), whole, MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) unsafe fn advise_huge_pages(_start: NonNull<u8>, _len: usize) {}

/// Bytes of a huge page on the systems that we know.
pub(crate) const HUGE_PAGE: usize = 2 << 20;
