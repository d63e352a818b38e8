//! Which blocks lie below the pool: in host memory and on disk. What falls out of a tier moves down,
//! what is asked for moves up, everything is bounded.
//!
//! ```text
//! pool (device) ──Evicted──► host ──written ahead──► disk ──► forgotten
//!               ◄──Land─────      ◄──Read───────────
//! ```
//!
//! [`Tiers`] decides; the shell moves bytes as the outputs say and answers. Names are the only keys, in
//! every tier, and a name is keyed with its tenant's salt: no tier can give one tenant's block to
//! another. docs/kv-tiers.md tells the whole story.
//!
//! What must never happen, and why it cannot:
//!
//! - *A place is given to another block while its bytes are read or written.* It has a pin from the
//!   output to the answer, however late that comes.
//! - *A block lands before it is whole.* A place under a [`TiersOutput::Read`] is not readable before
//!   the answer, and the answer of a record that does not verify empties it.
//! - *A request waits for a disk without end.* A fetch has a deadline: the time in which its blocks can
//!   be computed instead.

mod shelf;

use std::collections::{BTreeMap, BTreeSet};

use protocol::{Duration, Instant, Machine};

use crate::{BlockHash, BlockId};
use shelf::Shelf;

/// Bounds and waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TiersConfig {
    /// Unit: blocks in host memory, those on their way to and from the disk included. Too small: what
    /// the pool evicts in one step finds no place and is lost. Too large: memory that others miss.
    pub host_blocks: u32,
    /// Unit: blocks of the host tier that are kept empty or copied to disk, so that a new block need
    /// not wait for a write. `blocks evicted per second x seconds of a slow write` is enough. Too
    /// small: blocks are lost in bursts. Too large: the disk writes what would soon be used again.
    /// `host_blocks` makes it a mere buffer in front of the disk.
    pub host_ahead: u32,
    /// Unit: blocks on disk; 0 for no disk.
    pub disk_blocks: u32,
    /// Unit: writes with the shell at once. Too small: the disk idles between two. Too large: nothing
    /// but the memory that they pin.
    pub disk_writes_max: usize,
    /// Unit: reads with the shell at once; the same.
    pub disk_reads_max: usize,
    /// Unit: fetches at once; more end at once with nothing. Each keeps one request from computing.
    pub fetches_max: usize,
    /// No fetch takes longer, whatever its blocks cost to compute. Too small: a disk that wakes up is
    /// never used. Too large: a disk that hangs costs that much, once.
    pub fetch_wait_max: Duration,
    /// How long a block may take to compute if the caller does not know. Too small: the first requests
    /// compute what lies on disk. Too large: they wait for a slow disk.
    pub block_compute_default: Duration,
    /// How long the disk is left alone after a failure; doubled with each further one up to
    /// [`disk_pause_max`](Self::disk_pause_max). Too small: log and disk are busy with failures. Too
    /// large: a disk that works again is not used.
    pub disk_pause: Duration,
    pub disk_pause_max: Duration,
}

impl TiersConfig {
    /// The defaults for so many blocks. With a disk, `host_blocks` is at least [`HOST_BLOCKS_MIN`], and
    /// if it is no more than that, the host tier is a buffer.
    pub fn new(host_blocks: u32, disk_blocks: u32) -> Self {
        let least = if disk_blocks > 0 { HOST_BLOCKS_MIN } else { 0 };
        let is_buffer = host_blocks <= least;
        let host_blocks = host_blocks.max(least);
        TiersConfig {
            host_blocks,
            host_ahead: if is_buffer { host_blocks } else { host_blocks.div_ceil(4) },
            disk_blocks,
            disk_writes_max: 8,
            disk_reads_max: 32,
            fetches_max: 64,
            fetch_wait_max: Duration::from_secs(5),
            block_compute_default: Duration::from_millis(50),
            disk_pause: Duration::from_secs(5),
            disk_pause_max: Duration::from_secs(300),
        }
    }
}

/// A place in the host tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostSlot(pub u32);

/// A place on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DiskSlot(pub u32);

/// Blocks that are brought up for one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FetchId(pub u64);

/// Why a record was not read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFault {
    /// What lies there is not the block: torn, flipped, cut short, another's. The disk itself works.
    Damaged,
    /// The disk is full or broken.
    Failed,
}

#[derive(Clone, Debug)]
pub enum TiersInput {
    /// What the disk had at the start, the least recently written first. Once; without it no disk is
    /// used.
    DiskFound { blocks: Vec<(DiskSlot, BlockHash)> },
    /// The pool has forgotten this name, and the block will be written soon.
    Evicted { block: BlockId, name: BlockHash },
    /// Bring these blocks up, in this order, as far as they are known without a gap.
    /// `block_compute_time` is what one of them takes to compute; zero if unknown.
    Fetch { fetch: FetchId, names: Vec<BlockHash>, block_compute_time: Duration },
    /// The request has gone.
    Cancel { fetch: FetchId },
    /// Answers `Land`: whether the pool has the block now.
    Landed { fetch: FetchId, from: HostSlot, is_held: bool },
    /// Answers `Write`.
    Written { to: DiskSlot, result: Result<(), DiskFault> },
    /// Answers `Read`, with the time that the disk took for this record.
    Read { from: DiskSlot, result: Result<Duration, DiskFault> },
    /// Some time has passed: goes on with everything, and lands at most so many blocks. While nothing is
    /// asked of the node (`is_idle`) whatever only memory has is written to the disk.
    Step { landings_max: usize, is_idle: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TiersOutput {
    /// Copy the block before it is written. No answer.
    Save { block: BlockId, into: HostSlot },
    /// Copy into a block of the pool and name it, if there is room. Answer: `Landed`.
    Land { fetch: FetchId, name: BlockHash, from: HostSlot },
    /// Answer: `Written`, always and once.
    Write { name: BlockHash, from: HostSlot, to: DiskSlot },
    /// Answer: `Read`, always and once.
    Read { name: BlockHash, from: DiskSlot, into: HostSlot },
    /// The fetch is over; so many of its blocks have landed.
    Ended { fetch: FetchId, landed: usize },
}

/// The tiers at one moment. Counters only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TiersStats {
    pub host: TierStats,
    pub disk: TierStats,
    /// Fetches that ended because their time was over.
    pub fetches_late: u64,
    /// Whether the disk is left alone for a while.
    pub disk_is_paused: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierStats {
    /// Blocks that it has now, whole.
    pub blocks: usize,
    /// Blocks handed up from it into the pool.
    pub hits: u64,
    /// Blocks put into it.
    pub stored: u64,
    /// Blocks forgotten, without a copy below, for want of room or of a working disk.
    pub dropped: u64,
    /// Records that did not verify.
    pub corrupt: u64,
}

/// What lies below one pool. See the [module](self).
///
/// Inputs that answer something never asked, and fetches of an id that is used, are errors of the
/// caller and panic.
#[derive(Debug)]
pub struct Tiers {
    config: TiersConfig,
    host: Shelf<Host>,
    disk: Shelf<Disk>,
    disk_is_known: bool,
    /// Blocks of the host tier that the disk does not have, the ones there longest first.
    unwritten: BTreeSet<(u64, u32)>,
    saves: u64,
    writes: BTreeMap<DiskSlot, HostSlot>,
    reads: BTreeMap<DiskSlot, Reading>,
    fetches: BTreeMap<FetchId, Fetch>,
    /// The fetch that lands first in the next step, so that each gets its turn.
    turn: FetchId,
    write_pause: Pause,
    read_pause: Pause,
    /// What a record takes to read, smoothed; zero while unknown.
    read_time: Duration,
    /// Fetches that computed because the disk was slower.
    skips: u64,
    stats: TiersStats,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Host {
    /// Being read from disk.
    Filling,
    /// Whole, and a copy below.
    Clean,
    /// Whole, the only copy; the number orders `unwritten`.
    Dirty(u64),
    /// Whole, being written to disk.
    Writing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disk {
    Writing,
    Stored,
}

#[derive(Clone, Copy, Debug)]
struct Reading {
    into: HostSlot,
    since: Instant,
    /// Keeps what was read until it has landed.
    fetch: FetchId,
}

#[derive(Debug)]
struct Fetch {
    names: Vec<BlockHash>,
    /// Names before this have been handed to the shell.
    handed: usize,
    /// Names before this are in the host tier or on their way to it.
    looked_at: usize,
    landed: usize,
    landings: usize,
    /// Whole blocks that were read for it and wait, each with a pin.
    kept: BTreeMap<BlockHash, HostSlot>,
    uses_disk: bool,
    deadline: Instant,
}

#[derive(Debug, Default)]
struct Pause {
    until: Instant,
    failures: u32,
}

impl Tiers {
    /// Empty tiers.
    pub fn new(config: TiersConfig) -> Self {
        Tiers {
            host: Shelf::new(config.host_blocks),
            disk: Shelf::new(config.disk_blocks),
            config,
            disk_is_known: false,
            unwritten: BTreeSet::new(),
            saves: 0,
            writes: BTreeMap::new(),
            reads: BTreeMap::new(),
            fetches: BTreeMap::new(),
            turn: FetchId(0),
            write_pause: Pause::default(),
            read_pause: Pause::default(),
            read_time: Duration::ZERO,
            skips: 0,
            stats: TiersStats::default(),
        }
    }

    pub fn config(&self) -> &TiersConfig {
        &self.config
    }

    /// How many of these names, from the first on, a tier has: what a fetch of them could bring up.
    pub fn known(&self, names: &[BlockHash]) -> usize {
        let has = |name: &&BlockHash| self.host.find(name).is_some() || self.is_stored(name);
        names.iter().take_while(has).count()
    }

    /// From now on [`take_touched`](Self::take_touched) says what may have come or gone, beginning with
    /// what is there already.
    pub fn watch(&mut self) {
        self.host.watch();
        self.disk.watch();
    }

    /// Names for which [`known`](Self::known) may have changed since the last call. To be asked now and
    /// then once they are watched: there are as many as blocks were moved.
    pub fn take_touched(&mut self) -> Vec<BlockHash> {
        let mut touched = self.host.take_touched();
        touched.append(&mut self.disk.take_touched());
        touched
    }

    /// Whether the disk would take copies of what the pool still has: it works, and they drive nothing
    /// out that is not older, given that the pool has so many blocks.
    pub fn takes_copies(&self, pool_blocks: usize) -> bool {
        let has_room = self.disk.len() < self.disk.capacity();
        let is_large = self.disk.capacity() >= pool_blocks.saturating_mul(2);
        self.disk_is_known && self.write_pause.failures == 0 && (has_room || is_large)
    }

    /// Whether a fetch is under way or the disk owes an answer: then `Step` is to be said again soon.
    pub fn is_busy(&self) -> bool {
        !(self.fetches.is_empty() && self.writes.is_empty() && self.reads.is_empty())
    }

    pub fn stats(&self) -> TiersStats {
        let mut stats = self.stats;
        stats.host.blocks = self.host.len();
        stats.disk.blocks = self.disk.len() - self.writes.len();
        stats.disk_is_paused = self.write_pause.failures > 0 || self.read_pause.failures > 0;
        stats
    }

    fn is_stored(&self, name: &BlockHash) -> bool {
        self.stored(name).is_some()
    }

    fn stored(&self, name: &BlockHash) -> Option<u32> {
        let place = self.disk.find(name)?;
        let is_stored = self.disk.entry(place).is_some_and(|e| e.state == Disk::Stored);
        is_stored.then_some(place)
    }

    fn evicted(&mut self, block: BlockId, name: BlockHash, out: &mut Vec<TiersOutput>) {
        let stored = self.stored(&name);
        if let Some(place) = stored {
            self.disk.touch(place);
        }
        if let Some(place) = self.host.find(&name) {
            self.host.touch(place);
            return;
        }
        // A buffer keeps nothing that the disk has.
        if stored.is_some() && self.config.host_ahead >= self.config.host_blocks {
            return;
        }
        let Some(into) = self.vacate_host() else {
            self.stats.host.dropped += u64::from(stored.is_none());
            return;
        };
        let state = if stored.is_some() { Host::Clean } else { self.dirty(into) };
        self.host.put(into, name, state);
        self.host.unpin(into);
        self.stats.host.stored += 1;
        out.push(TiersOutput::Save { block, into: HostSlot(into) });
    }

    /// The state of a block that only this place has.
    fn dirty(&mut self, place: u32) -> Host {
        self.saves += 1;
        self.unwritten.insert((self.saves, place));
        Host::Dirty(self.saves)
    }

    /// A place of the host tier for another block; what was there is forgotten.
    fn vacate_host(&mut self) -> Option<u32> {
        let vacated = self.host.vacate()?;
        if let Some(Host::Dirty(order)) = vacated.forgotten.map(|entry| entry.state) {
            self.unwritten.remove(&(order, vacated.place));
            self.stats.host.dropped += 1;
        }
        Some(vacated.place)
    }

    /// Writes the blocks that are longest in the host tier, as far as fewer than `ready` places are ready
    /// for new ones.
    fn write_ahead(&mut self, now: Instant, ready: u32, out: &mut Vec<TiersOutput>) {
        if !(self.disk_is_known && self.write_pause.is_over(now)) {
            return;
        }
        let unready_max = self.host.capacity().saturating_sub(ready as usize);
        while self.unwritten.len() > unready_max && self.writes.len() < self.config.disk_writes_max
        {
            // A probe after failures is one write.
            if self.write_pause.failures > 0 && !self.writes.is_empty() {
                return;
            }
            let Some(&(order, from)) = self.unwritten.first() else { return };
            let entry = self.host.entry_mut(from).expect("unwritten places have a block");
            let name = entry.name;
            if self.disk.find(&name).is_some() {
                // Saved before the disk had said what it has.
                entry.state = Host::Clean;
                self.unwritten.remove(&(order, from));
                continue;
            }
            let Some(vacated) = self.disk.vacate() else { return };
            entry.state = Host::Writing;
            self.stats.disk.dropped += u64::from(vacated.forgotten.is_some());
            self.unwritten.remove(&(order, from));
            self.host.pin(from);
            let to = DiskSlot(vacated.place);
            self.disk.put(vacated.place, name, Disk::Writing);
            self.writes.insert(to, HostSlot(from));
            out.push(TiersOutput::Write { name, from: HostSlot(from), to });
        }
    }

    fn written(&mut self, now: Instant, to: DiskSlot, result: Result<(), DiskFault>) {
        let from = self.writes.remove(&to).expect("answers a write").0;
        let state = match result {
            Ok(()) => {
                self.write_pause.failures = 0;
                self.stats.disk.stored += 1;
                self.disk.entry_mut(to.0).expect("pinned while written").state = Disk::Stored;
                self.disk.unpin(to.0);
                Host::Clean
            }
            Err(_) => {
                self.disk.remove(to.0);
                self.write_pause.fail(now, &self.config);
                self.dirty(from)
            }
        };
        self.host.entry_mut(from).expect("pinned while written").state = state;
        self.host.unpin(from);
    }

    fn read(&mut self, now: Instant, from: DiskSlot, result: Result<Duration, DiskFault>) {
        let reading = self.reads.remove(&from).expect("answers a read");
        let into = reading.into.0;
        match result {
            Ok(took) => {
                self.read_pause.failures = 0;
                self.measure(took);
                self.disk.unpin(from.0);
                let entry = self.host.entry_mut(into).expect("pinned while filled");
                entry.state = Host::Clean;
                let name = entry.name;
                match self.fetches.get_mut(&reading.fetch) {
                    Some(fetch) => drop(fetch.kept.insert(name, reading.into)),
                    None => self.host.unpin(into),
                }
            }
            Err(fault) => {
                // Also after a failure: a record that cannot be read is as good as none.
                self.disk.remove(from.0);
                self.host.remove(into);
                match fault {
                    DiskFault::Damaged => self.stats.disk.corrupt += 1,
                    DiskFault::Failed => self.read_pause.fail(now, &self.config),
                }
            }
        }
    }

    fn measure(&mut self, took: Duration) {
        self.read_time = match self.read_time {
            Duration::ZERO => took,
            before => (before * 7 + took) / 8,
        };
    }

    fn fetch(
        &mut self,
        now: Instant,
        id: FetchId,
        mut names: Vec<BlockHash>,
        block_compute_time: Duration,
        out: &mut Vec<TiersOutput>,
    ) {
        assert!(!self.fetches.contains_key(&id), "{id:?} is used twice");
        names.truncate(self.known(&names));
        if names.is_empty() || self.fetches.len() >= self.config.fetches_max {
            out.push(TiersOutput::Ended { fetch: id, landed: 0 });
            return;
        }
        // Last to first: the end of a prefix is forgotten before its beginning.
        for name in names.iter().rev() {
            self.touch(name);
        }
        let compute = match block_compute_time {
            Duration::ZERO => self.config.block_compute_default,
            time => time,
        };
        let is_slow = self.read_time > compute;
        self.skips += u64::from(is_slow);
        // A slow disk is measured again from time to time.
        let uses_disk = !is_slow || self.skips.is_multiple_of(SKIPS_PER_MEASUREMENT);
        let blocks = u32::try_from(names.len()).unwrap_or(u32::MAX);
        let wait = compute.saturating_mul(blocks).min(self.config.fetch_wait_max);
        let fetch = Fetch {
            names,
            handed: 0,
            looked_at: 0,
            landed: 0,
            landings: 0,
            kept: BTreeMap::new(),
            uses_disk,
            deadline: now + wait,
        };
        self.fetches.insert(id, fetch);
        self.look_ahead(now, id, out);
    }

    fn touch(&mut self, name: &BlockHash) {
        if let Some(place) = self.host.find(name) {
            self.host.touch(place);
        }
        if let Some(place) = self.disk.find(name) {
            self.disk.touch(place);
        }
    }

    /// Reads what a fetch will need, as far as there are places and the disk takes it; cuts the fetch
    /// off before what nobody has.
    fn look_ahead(&mut self, now: Instant, id: FetchId, out: &mut Vec<TiersOutput>) {
        let usable = self.disk_is_known && self.read_pause.is_over(now);
        let Some(fetch) = self.fetches.get(&id) else { return };
        let uses_disk = fetch.uses_disk && usable;
        while let Some(fetch) = self.fetches.get_mut(&id) {
            let Some(&name) = fetch.names.get(fetch.looked_at) else { return };
            if self.host.find(&name).is_some() {
                fetch.looked_at += 1;
                continue;
            }
            let place = self.stored(&name).filter(|_| uses_disk);
            let Some(from) = place else {
                let fetch = self.fetches.get_mut(&id).expect("looked up above");
                fetch.names.truncate(fetch.looked_at);
                return;
            };
            if self.reads.len() >= self.config.disk_reads_max {
                return;
            }
            let Some(into) = self.vacate_host() else { return };
            self.host.put(into, name, Host::Filling);
            self.disk.pin(from);
            let (from, into) = (DiskSlot(from), HostSlot(into));
            self.reads.insert(from, Reading { into, since: now, fetch: id });
            out.push(TiersOutput::Read { name, from, into });
            self.fetches.get_mut(&id).expect("looked up above").looked_at += 1;
        }
    }

    /// Hands over what is ready of a fetch, at most `room` blocks; says how many.
    fn land(
        &mut self,
        now: Instant,
        id: FetchId,
        room: usize,
        out: &mut Vec<TiersOutput>,
    ) -> usize {
        let mut handed = 0;
        while handed < room {
            let Some(fetch) = self.fetches.get_mut(&id) else { break };
            let Some(&name) = fetch.names.get(fetch.handed) else { break };
            let Some(place) = self.host.find(&name) else {
                // Evicted or damaged since it was looked at: it may still be on disk.
                fetch.looked_at = fetch.handed;
                let before = fetch.names.len();
                self.look_ahead(now, id, out);
                let cut = self.fetches.get(&id).is_none_or(|f| f.names.len() < before);
                if cut { continue } else { break }
            };
            if self.host.entry(place).is_some_and(|e| e.state == Host::Filling) {
                break;
            }
            let from_disk = fetch.kept.remove(&name).is_some();
            fetch.handed += 1;
            fetch.landings += 1;
            fetch.looked_at = fetch.looked_at.max(fetch.handed);
            match from_disk {
                true => self.stats.disk.hits += 1,
                false => {
                    self.stats.host.hits += 1;
                    self.host.pin(place);
                }
            }
            handed += 1;
            out.push(TiersOutput::Land { fetch: id, name, from: HostSlot(place) });
        }
        handed
    }

    fn landed(&mut self, id: FetchId, from: HostSlot, is_held: bool, out: &mut Vec<TiersOutput>) {
        self.host.unpin(from.0);
        let Some(fetch) = self.fetches.get_mut(&id) else { return };
        fetch.landings -= 1;
        fetch.landed += usize::from(is_held);
        if !is_held {
            // No room above: the rest would find none either.
            fetch.names.truncate(fetch.handed);
        }
        self.end_if_done(id, out);
    }

    fn end_if_done(&mut self, id: FetchId, out: &mut Vec<TiersOutput>) {
        let is_done = |f: &Fetch| f.landings == 0 && f.handed == f.names.len();
        if self.fetches.get(&id).is_some_and(is_done) {
            self.end(id, out);
        }
    }

    fn end(&mut self, id: FetchId, out: &mut Vec<TiersOutput>) {
        let Some(fetch) = self.fetches.remove(&id) else { return };
        for slot in fetch.kept.into_values() {
            self.host.unpin(slot.0);
        }
        out.push(TiersOutput::Ended { fetch: id, landed: fetch.landed });
    }

    fn step(
        &mut self,
        now: Instant,
        landings_max: usize,
        is_idle: bool,
        out: &mut Vec<TiersOutput>,
    ) {
        let mut room = landings_max;
        // Round robin, one turn for each: a long fetch does not hold up the others for ever.
        let after: Vec<FetchId> = self.fetches.range(self.turn..).map(|(id, _)| *id).collect();
        let before: Vec<FetchId> = self.fetches.range(..self.turn).map(|(id, _)| *id).collect();
        for id in after.into_iter().chain(before) {
            if room > 0 {
                room -= self.land(now, id, room, out);
                self.turn = FetchId(id.0.wrapping_add(1));
            }
            if self.fetches.get(&id).is_some_and(|fetch| fetch.deadline <= now) {
                self.expire(now, id);
            } else {
                self.look_ahead(now, id, out);
            }
            self.end_if_done(id, out);
        }
        let ready = match is_idle {
            true => self.config.host_blocks,
            false => self.config.host_ahead,
        };
        self.write_ahead(now, ready, out);
    }

    /// Cuts off a fetch whose blocks could have been computed by now.
    fn expire(&mut self, now: Instant, id: FetchId) {
        let Some(fetch) = self.fetches.get_mut(&id) else { return };
        if fetch.handed == fetch.names.len() {
            return;
        }
        fetch.names.truncate(fetch.handed);
        self.stats.fetches_late += 1;
        // A read that does not come back counts with the time that it has taken so far.
        let oldest = self.reads.values().filter(|r| r.fetch == id).map(|r| r.since).min();
        if let Some(since) = oldest {
            self.read_time = self.read_time.max(now.saturating_since(since));
        }
    }
}

impl Pause {
    fn is_over(&self, now: Instant) -> bool {
        self.failures == 0 || now >= self.until
    }

    /// Begins, or begins again for twice as long.
    fn fail(&mut self, now: Instant, config: &TiersConfig) {
        // What was under way when it began fails with it, once.
        if self.failures > 0 && now < self.until {
            return;
        }
        let doubled = config.disk_pause.saturating_mul(2u32.saturating_pow(self.failures.min(16)));
        self.until = now + doubled.min(config.disk_pause_max);
        self.failures = self.failures.saturating_add(1);
    }
}

impl Machine for Tiers {
    type Input = TiersInput;
    type Output = TiersOutput;

    fn handle(&mut self, now: Instant, input: TiersInput, out: &mut Vec<TiersOutput>) {
        match input {
            TiersInput::DiskFound { blocks } => {
                self.disk.fill(blocks.into_iter().map(|(slot, name)| (slot.0, name, Disk::Stored)));
                self.disk_is_known = true;
            }
            TiersInput::Evicted { block, name } => self.evicted(block, name, out),
            TiersInput::Fetch { fetch, names, block_compute_time } => {
                self.fetch(now, fetch, names, block_compute_time, out);
            }
            TiersInput::Cancel { fetch } => self.end(fetch, out),
            TiersInput::Landed { fetch, from, is_held } => self.landed(fetch, from, is_held, out),
            TiersInput::Written { to, result } => self.written(now, to, result),
            TiersInput::Read { from, result } => self.read(now, from, result),
            TiersInput::Step { landings_max, is_idle } => {
                self.step(now, landings_max, is_idle, out);
            }
        }
        debug_assert!(self.host.pinned() <= self.host.capacity());
    }

    /// The earliest deadline of a fetch. Answers of the disk need a `Step` without waiting for it.
    fn next_deadline(&self) -> Option<Instant> {
        self.fetches.values().map(|fetch| fetch.deadline).min()
    }
}

/// Blocks of host memory in front of a disk: what a step of 512 tokens can evict, and as much again on
/// its way.
pub const HOST_BLOCKS_MIN: u32 = 64;
/// Of so many fetches that would find the disk slower than computing, one uses it.
const SKIPS_PER_MEASUREMENT: u64 = 16;
