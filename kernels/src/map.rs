//! Files seen as memory.
//!
//! Owns the one mapping call of the project. Refuses to guess what is in the file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;

/// A regular file, mapped read-only in whole; the pages are read when they are touched.
///
/// The length is that of the moment of opening and is never asked again. Two limits are stated
/// instead of hidden: a process that writes into the file changes the bytes seen here, and one
/// that truncates it makes the next touch of the lost pages a `SIGBUS`, which ends this process.
/// Replacing a model file by renaming another over it is safe.
#[derive(Debug)]
pub struct MappedFile {
    /// None for an empty file, which cannot be mapped.
    map: Option<Mmap>,
}

impl MappedFile {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// Whatever the operating system says, and `InvalidInput` for anything but a regular file:
    /// opening a pipe would wait for a writer.
    pub fn open(path: &Path) -> io::Result<MappedFile> {
        let regular = |meta: std::fs::Metadata| match meta.is_file() {
            true => Ok(meta.len()),
            false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")),
        };
        regular(std::fs::metadata(path)?)?;
        let file = File::open(path)?;
        if regular(file.metadata()?)? == 0 {
            return Ok(MappedFile { map: None });
        }
        // SAFETY: the mapping is private to this value, read-only, and as long as the file was at
        // the call. The caller promises, by the documentation above, that no one truncates or
        // rewrites the file meanwhile; the bytes are only ever read as `u8`, for which every bit
        // pattern is valid, and every reader checks what it reads.
        let map = unsafe { Mmap::map(&file)? };
        Ok(MappedFile { map: Some(map) })
    }

    /// The bytes of the file.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }

    /// Says that `range` is not needed for now: its pages leave this process and come back, from
    /// the system's cache or from the disk, when they are touched again. Without effect where the
    /// system has no such call, or beyond the end.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Some(map) = self.map.as_ref().filter(|map| range.end <= map.len()) {
            // SAFETY: the mapping is of a file and never written through, so that dropping its
            // pages changes no byte that a reader can see: the next touch reads them again.
            let released = unsafe {
                map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len())
            };
            // Only memory use depends on it.
            drop(released);
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

// Miri maps no files.
#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn sees_what_was_written() {
        let dir = std::env::temp_dir().join(format!("grapevine-map-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a temporary directory");
        for content in [&b""[..], &b"x"[..], &[7; 70_000][..]] {
            let path = dir.join("file");
            std::fs::write(&path, content).expect("a file");
            let file = MappedFile::open(&path).expect("opens");
            assert_eq!(file.bytes(), content);
            for range in [0..content.len(), content.len() / 2..content.len(), 0..usize::MAX] {
                file.release(range);
                assert_eq!(file.bytes(), content);
            }
        }
        let refused = |path: &Path| MappedFile::open(path).expect_err("is refused").kind();
        assert_eq!(refused(&dir), io::ErrorKind::InvalidInput);
        assert_eq!(refused(&dir.join("absent")), io::ErrorKind::NotFound);
        std::fs::remove_dir_all(&dir).expect("removed");
    }
}
