//! A file in memory that does to its bytes what disks do: loses what was not synced, flips bits, tears
//! writes, is full, is cut short, cannot be read.

use engine::tiers::{Disk, DiskAnswer, DiskFile, DiskJob, Store};
use protocol::random::Random;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use cache::tiers::DiskSlot;

/// How bad it is, each in thousandths of what is asked of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub flips: usize,
    pub torn: usize,
    pub misplaced: usize,
    pub lost: usize,
    pub errors: usize,
    pub short: usize,
    /// Bytes after which writes that make the file longer say that the disk is full.
    pub full_at: Option<u64>,
    /// What the disk says that it has left, if not plenty.
    pub free_bytes: Option<u64>,
}

/// The bytes, which outlive the process that wrote them.
#[derive(Clone)]
pub struct FaultyFile(Arc<Mutex<Platter>>);

struct Platter {
    bytes: Vec<u8>,
    /// What each write since the last crash has replaced: it may not have come to the disk.
    undo: VecDeque<(u64, Vec<u8>)>,
    faults: Faults,
    random: Random,
}

impl FaultyFile {
    pub fn new(seed: u64) -> Self {
        FaultyFile(Arc::new(Mutex::new(Platter {
            bytes: Vec::new(),
            undo: VecDeque::new(),
            faults: Faults::default(),
            random: Random::new(seed),
        })))
    }

    pub fn set_faults(&self, faults: Faults) {
        self.platter().faults = faults;
    }

    /// The machine loses power: of what was written lately, sector by sector, some never came.
    pub fn crash(&self) {
        let mut platter = self.platter();
        let Platter { bytes, undo, random, .. } = &mut *platter;
        while let Some((offset, before)) = undo.pop_back() {
            for (index, sector) in before.chunks(512).enumerate() {
                if random.below(3) == 0 {
                    let at = offset as usize + index * 512;
                    let end = (at + sector.len()).min(bytes.len());
                    if at < end {
                        bytes[at..end].copy_from_slice(&sector[..end - at]);
                    }
                }
            }
        }
        if random.below(4) == 0 && !bytes.is_empty() {
            let length = random.below(bytes.len());
            bytes.truncate(length);
        }
    }

    /// Somebody or something changes bits that were well.
    pub fn rot(&self, flips: usize) {
        let mut platter = self.platter();
        let Platter { bytes, random, .. } = &mut *platter;
        for _ in 0..flips {
            if !bytes.is_empty() {
                let at = random.below(bytes.len());
                bytes[at] ^= 1 << random.below(8);
            }
        }
    }

    fn platter(&self) -> MutexGuard<'_, Platter> {
        self.0.lock().expect("nobody panics with it")
    }
}

impl Platter {
    fn happens(&mut self, thousandths: usize) -> bool {
        self.random.below(1000) < thousandths
    }
}

impl DiskFile for FaultyFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut platter = self.platter();
        let faults = platter.faults;
        if platter.happens(faults.errors) {
            return Err(io::Error::other("input/output error"));
        }
        let start = (offset as usize).min(platter.bytes.len());
        let mut length = buffer.len().min(platter.bytes.len() - start);
        if platter.happens(faults.short) && length > 1 {
            length = 1 + platter.random.below(length - 1);
        }
        buffer[..length].copy_from_slice(&platter.bytes[start..start + length]);
        if platter.happens(faults.flips) && length > 0 {
            let at = platter.random.below(length);
            buffer[at] ^= 1 << platter.random.below(8);
        }
        Ok(length)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let mut platter = self.platter();
        let faults = platter.faults;
        if platter.happens(faults.errors) {
            return Err(io::Error::other("input/output error"));
        }
        let mut length = bytes.len();
        if let Some(full_at) = faults.full_at {
            let room = full_at.max(platter.bytes.len() as u64).saturating_sub(offset);
            length = length.min(room as usize);
            if length == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
        }
        if platter.happens(faults.short) && length > 1 {
            length = 1 + platter.random.below(length - 1);
        }
        // What the caller believes to be written, and what is.
        let mut kept = length;
        if platter.happens(faults.lost) {
            kept = 0;
        } else if platter.happens(faults.torn) {
            kept = platter.random.below(length + 1);
        }
        let mut at = offset as usize;
        if platter.happens(faults.misplaced) && !platter.bytes.is_empty() {
            let length = platter.bytes.len();
            at = platter.random.below(length) / 512 * 512;
        }
        if platter.bytes.len() < at + kept {
            platter.bytes.resize(at + kept, 0);
        }
        let before = platter.bytes[at..at + kept].to_vec();
        platter.undo.push_back((at as u64, before));
        if platter.undo.len() > UNSYNCED_MAX {
            platter.undo.pop_front();
        }
        platter.bytes[at..at + kept].copy_from_slice(&bytes[..kept]);
        Ok(length)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.platter().bytes.len() as u64)
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.platter().bytes.truncate(len as usize);
        Ok(())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        Ok(self.platter().faults.free_bytes.unwrap_or(u64::MAX))
    }
}

/// Does the jobs of a store when it likes, in any order, on the caller's thread.
pub struct SlowDisk {
    store: Store<FaultyFile>,
    jobs: Vec<DiskJob>,
    random: Random,
    /// In hundredths: whether a poll does a job.
    pace: usize,
}

impl SlowDisk {
    pub fn new(store: Store<FaultyFile>, seed: u64, pace: usize) -> Self {
        SlowDisk { store, jobs: Vec::new(), random: Random::new(seed), pace }
    }
}

impl Disk for SlowDisk {
    fn submit(&mut self, job: DiskJob) {
        self.jobs.push(job);
        assert!(self.jobs.len() <= 100, "jobs are bounded");
    }

    fn poll(&mut self) -> Option<DiskAnswer> {
        if self.jobs.is_empty() || self.random.below(100) >= self.pace {
            return None;
        }
        let job = self.random.below(self.jobs.len());
        Some(self.jobs.swap_remove(job).run(&self.store))
    }

    fn place(&self, slot: DiskSlot) -> String {
        format!("memory at byte {}", self.store.offset(slot))
    }
}

/// Writes that a crash can take back.
const UNSYNCED_MAX: usize = 8;
