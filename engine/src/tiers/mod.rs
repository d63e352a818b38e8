//! KV blocks below the pool: their bytes in host memory and on disk.
//!
//! `cache::tiers` decides, this does: copies blocks that the pool forgets, keeps them, and hands them
//! back. The thread that computes never waits for a disk; whatever a disk does, a block that is handed
//! back is the one that was put in, bit for bit. Names, bounds and files: docs/kv-tiers.md.

mod disk;
mod host;
mod record;
mod store;

pub use disk::{Disk, DiskAnswer, DiskJob, Finding};
pub use record::{Damage, HEADER_BYTES, RecordFormat};
pub use store::{DiskFile, FREE_BYTES_KEPT, OpenError, ReadError, Scan, Store};

use cache::tiers::{
    DiskFault, FetchId, HostSlot, Tiers, TiersConfig, TiersInput, TiersOutput, TiersStats,
};
use cache::{BlockHash, BlockId};
use disk::DiskThreads;
use host::HostSlab;
use protocol::{Duration, Instant, Machine};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

/// What an operator gives to one model below its pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TiersOptions {
    /// Unit: bytes of host memory for blocks that the pool has forgotten. 0 for none, but see
    /// [`DiskOptions`].
    pub host_bytes: usize,
    pub disk: Option<DiskOptions>,
}

/// A folder for blocks. It needs some host memory in front of it, at least
/// [`HOST_BLOCKS_MIN`](cache::tiers::HOST_BLOCKS_MIN) blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// Of this model only; made if it is not there, with mode 0700.
    pub folder: PathBuf,
    /// Unit: bytes of the file at most.
    pub bytes: u64,
}

/// The tiers below one pool.
pub struct KvTiers {
    machine: Tiers,
    slab: HostSlab,
    disk: Option<Box<dyn Disk>>,
    block_bytes: usize,
    outputs: Vec<TiersOutput>,
    landings: VecDeque<Landing>,
    ended: Vec<Ended>,
    findings: Findings,
    /// Damaged records found at the start.
    corrupt_at_start: u64,
    /// The disk has not said yet what it has.
    is_scanning: bool,
}

/// A block to be put into the pool; answer with [`KvTiers::landed`].
#[derive(Debug)]
pub struct Landing {
    pub fetch: FetchId,
    pub name: BlockHash,
    pub payload: Arc<Vec<u8>>,
    from: HostSlot,
}

/// A fetch that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    pub fetch: FetchId,
    /// Its blocks that the pool has got.
    pub landed: usize,
}

impl KvTiers {
    /// The tiers that `options` ask for, `None` if that is none. A disk that cannot be used is a finding;
    /// the rest goes on without it. `format` says what a block is.
    pub fn open(options: &TiersOptions, format: RecordFormat) -> Option<Self> {
        let blocks = |bytes: u64, each: usize| {
            u32::try_from(bytes / each as u64).unwrap_or(u32::MAX - 1).min(u32::MAX - 1)
        };
        let host_blocks = blocks(options.host_bytes as u64, format.block_bytes);
        let disk_blocks =
            options.disk.as_ref().map_or(0, |disk| blocks(disk.bytes, format.record_bytes()));
        if host_blocks == 0 && disk_blocks == 0 {
            return None;
        }
        let config = TiersConfig::new(host_blocks, disk_blocks);
        let mut findings = Findings::default();
        let disk = options.disk.as_ref().filter(|_| disk_blocks > 0).and_then(|disk| {
            let jobs_max = config.disk_reads_max.max(config.disk_writes_max);
            let opened = store::open(&disk.folder, &format).map_err(|error| error.to_string());
            let spawned = opened.and_then(|(file, path)| {
                let store = Store::new(file, format, disk_blocks);
                DiskThreads::spawn(store, path.display().to_string(), jobs_max)
                    .map_err(|error| error.to_string())
            });
            let threads =
                spawned.map_err(|error| findings.add(Finding::Unusable { error })).ok()?;
            Some(Box::new(threads) as Box<dyn Disk>)
        });
        let mut tiers = KvTiers::new(config, format.block_bytes, disk);
        tiers.findings = findings;
        Some(tiers)
    }

    /// Tiers over a disk of one's own.
    pub fn new(config: TiersConfig, block_bytes: usize, mut disk: Option<Box<dyn Disk>>) -> Self {
        let is_scanning = disk.is_some();
        if let Some(disk) = &mut disk {
            disk.submit(DiskJob::Scan);
        }
        KvTiers {
            machine: Tiers::new(config),
            slab: HostSlab::new(block_bytes),
            disk,
            block_bytes,
            outputs: Vec::new(),
            landings: VecDeque::new(),
            ended: Vec::new(),
            findings: Findings::default(),
            corrupt_at_start: 0,
            is_scanning,
        }
    }

    /// The pool has forgotten `name`; `payload` is what the block still holds. Keeps a copy if it is
    /// worth it.
    pub fn evicted(&mut self, now: Instant, block: BlockId, name: BlockHash, payload: &[u8]) {
        self.machine.handle(now, TiersInput::Evicted { block, name }, &mut self.outputs);
        for output in std::mem::take(&mut self.outputs) {
            match output {
                TiersOutput::Save { block: saved, into } if saved == block => {
                    self.slab.store(into, payload);
                }
                other => self.outputs.push(other),
            }
        }
        self.carry_out();
    }

    /// How many of these names, from the first on, could be brought up.
    pub fn known(&self, names: &[BlockHash]) -> usize {
        self.machine.known(names)
    }

    /// From now on [`take_touched`](Self::take_touched) says which names may have come or gone.
    pub fn watch(&mut self) {
        self.machine.watch();
    }

    /// Names for which [`known`](Self::known) may have changed since the last call.
    pub fn take_touched(&mut self) -> Vec<BlockHash> {
        self.machine.take_touched()
    }

    /// Begins to bring these blocks up; they come as [`Landing`]s, and at the end an [`Ended`] does. The
    /// id is new. `block_compute_time` is what one of them takes to compute, zero if unknown: the whole
    /// fetch takes no longer than computing would.
    pub fn fetch(
        &mut self,
        now: Instant,
        fetch: FetchId,
        names: Vec<BlockHash>,
        block_compute_time: Duration,
    ) {
        let input = TiersInput::Fetch { fetch, names, block_compute_time };
        self.machine.handle(now, input, &mut self.outputs);
        self.carry_out();
    }

    /// Ends a fetch; its `Ended` comes.
    pub fn cancel(&mut self, now: Instant, fetch: FetchId) {
        self.machine.handle(now, TiersInput::Cancel { fetch }, &mut self.outputs);
        self.carry_out();
    }

    /// Takes the disk's answers and goes on. What can land then is given by
    /// [`next_landing`](Self::next_landing), at most so many bytes of it, but one block. `is_idle` says
    /// that nothing is asked of the replica.
    pub fn step(&mut self, now: Instant, landing_bytes_max: usize, is_idle: bool) {
        while let Some(answer) = self.disk.as_mut().and_then(|disk| disk.poll()) {
            self.take_answer(now, answer);
        }
        let landings_max = (landing_bytes_max / self.block_bytes.max(1)).max(1);
        self.machine.handle(now, TiersInput::Step { landings_max, is_idle }, &mut self.outputs);
        self.carry_out();
    }

    /// Each is to be answered before the next `step`.
    pub fn next_landing(&mut self) -> Option<Landing> {
        self.landings.pop_front()
    }

    /// Answers a landing: whether the pool has the block.
    pub fn landed(&mut self, now: Instant, landing: Landing, is_held: bool) {
        let Landing { fetch, payload, from, .. } = landing;
        drop(payload);
        let input = TiersInput::Landed { fetch, from, is_held };
        self.machine.handle(now, input, &mut self.outputs);
        self.carry_out();
    }

    /// Fetches that ended since the last call.
    pub fn take_ended(&mut self) -> Vec<Ended> {
        std::mem::take(&mut self.ended)
    }

    /// Whether `step` is to be called again soon, though nothing is asked.
    pub fn is_busy(&self) -> bool {
        self.is_scanning || self.machine.is_busy()
    }

    /// Whether copies of what the pool still has, so many blocks, are worth making while nothing is
    /// asked: a node that begins again finds them on disk.
    pub fn takes_copies(&self, pool_blocks: usize) -> bool {
        !self.is_busy() && self.machine.takes_copies(pool_blocks)
    }

    pub fn stats(&self) -> TiersStats {
        let mut stats = self.machine.stats();
        stats.disk.corrupt += self.corrupt_at_start;
        stats
    }

    /// What is to be logged since the last call.
    pub fn take_findings(&mut self, now: Instant) -> Vec<Finding> {
        self.findings.take(now)
    }

    fn take_answer(&mut self, now: Instant, answer: DiskAnswer) {
        let input = match answer {
            DiskAnswer::Scanned(scan) => match self.scanned(scan) {
                Some(input) => input,
                None => return,
            },
            DiskAnswer::Read { from, into, buffer, result } => {
                self.slab.put(into, buffer);
                let result = result.map_err(|error| match error {
                    ReadError::Damaged(damage) => {
                        self.findings.add(Finding::Damaged { place: self.place(from), damage });
                        DiskFault::Damaged
                    }
                    ReadError::Io(error) => self.failed("read", from, &error),
                });
                TiersInput::Read { from, result }
            }
            DiskAnswer::Written { to, result } => {
                let result = result.map_err(|error| self.failed("written", to, &error));
                TiersInput::Written { to, result }
            }
        };
        self.machine.handle(now, input, &mut self.outputs);
    }

    fn scanned(&mut self, scan: std::io::Result<Scan>) -> Option<TiersInput> {
        self.is_scanning = false;
        match scan {
            Ok(Scan { blocks, damaged }) => {
                self.corrupt_at_start += damaged.len() as u64;
                for (slot, damage) in damaged {
                    self.findings.add(Finding::Damaged { place: self.place(slot), damage });
                }
                Some(TiersInput::DiskFound { blocks })
            }
            Err(error) => {
                self.findings.add(Finding::Unusable { error: error.to_string() });
                None
            }
        }
    }

    fn failed(
        &mut self,
        doing: &'static str,
        slot: cache::tiers::DiskSlot,
        error: &std::io::Error,
    ) -> DiskFault {
        let place = self.place(slot);
        self.findings.add(Finding::Failed { doing, place, error: error.to_string() });
        DiskFault::Failed
    }

    fn place(&self, slot: cache::tiers::DiskSlot) -> String {
        self.disk.as_ref().map_or_else(String::new, |disk| disk.place(slot))
    }

    /// Does what the machine said; no output but `Save` needs more than this struct has.
    fn carry_out(&mut self) {
        for output in std::mem::take(&mut self.outputs) {
            match output {
                TiersOutput::Save { .. } => {
                    unreachable!("only evictions are saved, where they are told")
                }
                TiersOutput::Land { fetch, name, from } => {
                    let payload =
                        self.slab.payload(from).expect("what lands was put there").clone();
                    self.landings.push_back(Landing { fetch, name, payload, from });
                }
                TiersOutput::Write { name, from, to } => {
                    let payload = self.slab.payload(from).expect("what is written was put there");
                    let payload = payload.clone();
                    self.submit(DiskJob::Write { name, to, payload });
                }
                TiersOutput::Read { name, from, into } => {
                    let buffer = self.slab.take(into);
                    self.submit(DiskJob::Read { name, from, into, buffer });
                }
                TiersOutput::Ended { fetch, landed } => self.ended.push(Ended { fetch, landed }),
            }
        }
    }

    fn submit(&mut self, job: DiskJob) {
        let disk = self.disk.as_mut().expect("the machine knows of a disk only from its scan");
        disk.submit(job);
    }
}

/// Findings on their way to the log, few a minute.
#[derive(Debug, Default)]
struct Findings {
    waiting: Vec<Finding>,
    /// Not kept, because there are too many.
    more: u64,
    /// Told since `since`.
    told: usize,
    since: Instant,
}

impl Findings {
    fn add(&mut self, finding: Finding) {
        match self.waiting.len() < FINDINGS_MAX {
            true => self.waiting.push(finding),
            false => self.more += 1,
        }
    }

    fn take(&mut self, now: Instant) -> Vec<Finding> {
        if now.saturating_since(self.since) >= FINDINGS_INTERVAL {
            (self.since, self.told) = (now, 0);
        }
        if self.told >= FINDINGS_MAX || (self.waiting.is_empty() && self.more == 0) {
            return Vec::new();
        }
        let mut told = std::mem::take(&mut self.waiting);
        if self.more > 0 {
            told.push(Finding::More { findings: std::mem::take(&mut self.more) });
        }
        self.told += told.len();
        told
    }
}

/// Findings told in one interval; the rest is counted.
const FINDINGS_MAX: usize = 10;
const FINDINGS_INTERVAL: Duration = Duration::from_secs(60);
