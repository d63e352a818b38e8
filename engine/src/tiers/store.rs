//! The file in which the disk tier lies: places of one size, one record in each.
//!
//! What is written is not synced, and no index is kept: after a crash the records themselves say what is
//! there, and one that does not verify is an empty place. So the worst that a crash, a full disk or a
//! bad sector can do is that a block is computed again.

use super::record::{Damage, HEADER_BYTES, RecordFormat};
use cache::BlockHash;
use cache::tiers::DiskSlot;
use std::collections::BTreeSet;
use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use thiserror::Error;

/// A file as the store needs it; tests put in one that breaks.
pub trait DiskFile: Send + Sync {
    /// Reads at most `buffer`; 0 at and beyond the end.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;
    /// Writes a beginning of `bytes`, and says how much; the file grows as needed.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize>;
    fn size(&self) -> io::Result<u64>;
    /// Cuts off what lies beyond.
    fn truncate(&self, len: u64) -> io::Result<()>;
    /// Bytes that this process could still write to the same disk.
    fn free_bytes(&self) -> io::Result<u64>;
}

/// Records of one format in one file.
#[derive(Debug)]
pub struct Store<F> {
    file: F,
    format: RecordFormat,
    places: u32,
    /// The highest write number given.
    writes: AtomicU64,
}

/// What lies on disk at the start.
#[derive(Debug, Default)]
pub struct Scan {
    /// Whole headers, the least recently written first, each name once.
    pub blocks: Vec<(DiskSlot, BlockHash)>,
    /// Places that hold something else than a record or nothing.
    pub damaged: Vec<(DiskSlot, Damage)>,
}

/// Why a block was not read.
#[derive(Debug, Error)]
pub enum ReadError {
    #[error(transparent)]
    Damaged(#[from] Damage),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl<F: DiskFile> Store<F> {
    /// A store of `places` records. Nothing is read yet.
    pub fn new(file: F, format: RecordFormat, places: u32) -> Self {
        Store { file, format, places, writes: AtomicU64::new(0) }
    }

    pub fn format(&self) -> &RecordFormat {
        &self.format
    }

    /// Where a place begins in the file, in bytes.
    pub fn offset(&self, slot: DiskSlot) -> u64 {
        u64::from(slot.0) * self.format.record_bytes() as u64
    }

    /// Reads all headers; payloads are verified when they are read. What lies beyond the last place, of
    /// a time when there were more, is cut off.
    pub fn scan(&self) -> io::Result<Scan> {
        let end = self.offset(DiskSlot(self.places));
        if self.file.size()? > end {
            self.file.truncate(end)?;
        }
        let record_bytes = self.format.record_bytes() as u64;
        let used = self.file.size()?.div_ceil(record_bytes).min(u64::from(self.places)) as u32;
        let (mut found, mut scan) = (Vec::new(), Scan::default());
        let (mut bytes, mut errors) = ([0; HEADER_BYTES], 0);
        for slot in (0..used).map(DiskSlot) {
            let length = match self.read_full(self.offset(slot), &mut bytes) {
                Ok(length) => length,
                Err(error) => {
                    errors += 1;
                    if errors > SCAN_ERRORS_MAX {
                        return Err(error);
                    }
                    scan.damaged.push((slot, Damage::Unreadable));
                    continue;
                }
            };
            match self.format.header(&bytes[..length]) {
                Ok(header) => found.push((header.write, slot, header.name)),
                // A place that was never written, before one that was.
                Err(_) if bytes[..length].iter().all(|byte| *byte == 0) => {}
                Err(damage) => scan.damaged.push((slot, damage)),
            }
        }
        found.sort_unstable();
        self.writes.store(found.last().map_or(0, |(write, ..)| *write), Ordering::Relaxed);
        let mut names = BTreeSet::new();
        let newest = found.into_iter().rev().filter(|(.., name)| names.insert(*name));
        scan.blocks = newest.map(|(_, slot, name)| (slot, name)).collect();
        scan.blocks.reverse();
        Ok(scan)
    }

    /// Writes a record. After an error the place holds no block. The file does not grow into the last
    /// [`FREE_BYTES_KEPT`] of the disk.
    pub fn write(&self, slot: DiskSlot, name: &BlockHash, payload: &[u8]) -> io::Result<()> {
        let write = self.writes.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let mut record = Vec::with_capacity(HEADER_BYTES + payload.len());
        self.format.encode(name, write, payload, &mut record);
        let (mut offset, mut rest) = (self.offset(slot), &record[..]);
        let grows = offset + rest.len() as u64 > self.file.size()?;
        if grows && self.file.free_bytes()? < FREE_BYTES_KEPT {
            let why = "less than 256 MiB are free on this disk, which are kept for others";
            return Err(io::Error::new(io::ErrorKind::StorageFull, why));
        }
        while !rest.is_empty() {
            match self.file.write_at(offset, rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => (offset, rest) = (offset + n as u64, &rest[n.min(rest.len())..]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads the block `name` into `payload`, of the size of one. After an error `payload` is anything.
    pub fn read(
        &self,
        slot: DiskSlot,
        name: &BlockHash,
        payload: &mut [u8],
    ) -> Result<(), ReadError> {
        let mut header = [0; HEADER_BYTES];
        let length = self.read_full(self.offset(slot), &mut header)?;
        let read = self.read_full(self.offset(slot) + HEADER_BYTES as u64, payload)?;
        Ok(self.format.verify(name, &header[..length], &payload[..read])?)
    }

    /// Fills the buffer as far as the file goes.
    fn read_full(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(offset + done as u64, &mut buffer[done..]) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}

impl DiskFile for File {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        FileExt::read_at(self, buffer, offset)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        FileExt::write_at(self, bytes, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.set_len(len)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let disk = nix::sys::statvfs::fstatvfs(self)?;
        // Their types differ between platforms.
        #[allow(clippy::useless_conversion)]
        Ok(u64::from(disk.blocks_available()).saturating_mul(u64::from(disk.fragment_size())))
    }
}

/// Why a folder cannot be used. What was there before is as it was.
#[derive(Debug, Error)]
pub enum OpenError {
    #[error("{} belongs to another process", .0.display())]
    Locked(PathBuf),
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// Opens the file for `format` below `folder`, which belongs to one model. Folders of other formats that
/// it had are removed: a model has one format at a time. The file is locked until it is dropped.
pub fn open(folder: &Path, format: &RecordFormat) -> Result<(File, PathBuf), OpenError> {
    let own = folder.join(format.folder());
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| OpenError::Io { path, source }
    };
    DirBuilder::new().recursive(true).mode(0o700).create(&own).map_err(failed(&own))?;
    let path = own.join(FILE);
    let file = open_file(&path, true).map_err(failed(&path))?;
    file.set_permissions(Permissions::from_mode(0o600)).map_err(failed(&path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(OpenError::Locked(path)),
        Err(TryLockError::Error(source)) => return Err(OpenError::Io { path, source }),
    }
    remove_others(folder, &own).map_err(failed(folder))?;
    Ok((file, path))
}

fn open_file(path: &Path, create: bool) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(create).mode(0o600).open(path)
}

/// Removes what stores of other formats left, and nothing else: a folder whose name is such a format's,
/// and in it the one file, unless a process uses it.
fn remove_others(folder: &Path, own: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let is_ours = name.len() == 32 && name.bytes().all(|b| b.is_ascii_hexdigit());
        if !is_ours || path == own {
            continue;
        }
        let file = path.join(FILE);
        match open_file(&file, false) {
            Ok(other) if other.try_lock().is_err() => continue,
            Ok(_) => std::fs::remove_file(&file)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        // Stays if somebody has put something else there.
        let _ = std::fs::remove_dir(&path);
    }
    Ok(())
}

/// Of a disk's free bytes, those that a cache does not take: the node's own state and whatever else lies
/// on that disk need room, too.
pub const FREE_BYTES_KEPT: u64 = 256 << 20;
const FILE: &str = "blocks.kv";
/// Headers that may be unreadable at the start; with more of them the disk is given up.
const SCAN_ERRORS_MAX: usize = 16;
