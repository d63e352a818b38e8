//! Huge pages, for memory that every step reads all over: it would wait for address translation otherwise,
//! and the first write to each small page for the system.

/// Asks the system to back the whole huge pages inside of `memory` as such. The content stays as it is,
/// and nothing is asked of what lies around it.
pub fn prefer_huge_pages(memory: &mut [u8]) {
    // SAFETY: a slice is memory of its own.
    unsafe { advise_huge_pages(memory.as_mut_ptr(), memory.len()) }
}

/// As [`prefer_huge_pages`], for memory of any content.
///
/// # Safety
/// The `len` bytes from `start` belong to the caller.
#[cfg(all(target_os = "linux", not(miri)))]
pub(crate) unsafe fn advise_huge_pages(start: *mut u8, len: usize) {
    unsafe extern "C" {
        fn madvise(addr: *mut std::ffi::c_void, length: usize, advice: i32) -> i32;
    }
    const MADV_HUGEPAGE: i32 = 14;
    let before = start.align_offset(HUGE_PAGE);
    let whole = len.saturating_sub(before) / HUGE_PAGE * HUGE_PAGE;
    if whole > 0 {
        // SAFETY: the range is the caller's and begins at a page; the advice changes no content.
        // Whether it was taken makes no difference but speed.
        unsafe { madvise(start.add(before).cast(), whole, MADV_HUGEPAGE) };
    }
}

#[cfg(not(all(target_os = "linux", not(miri))))]
pub(crate) unsafe fn advise_huge_pages(_start: *mut u8, _len: usize) {}

/// Bytes of a huge page on the systems that we know.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_there_stays() {
        for len in [0, 1, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 5] {
            for offset in [0, 1, 4096] {
                let mut memory: Vec<u8> = (0..offset + len).map(|i| (i % 251) as u8).collect();
                prefer_huge_pages(&mut memory[offset..]);
                let stays = memory.iter().enumerate().all(|(i, &byte)| byte == (i % 251) as u8);
                assert!(stays, "{len} bytes from {offset}");
            }
        }
    }
}
