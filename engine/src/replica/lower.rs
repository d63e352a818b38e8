//! The tiers below the pool: what is evicted is saved before it is overwritten, and what a request needs
//! of them is brought up while it waits.
//!
//! A sequence waits for blocks that are on their way as it waits for blocks that another sequence computes:
//! their names are claimed. The claims end with the fetch, and a fetch ends in time: whatever a disk
//! does, the sequence computes the rest.

use std::collections::{BTreeMap, BTreeSet};

use cache::tiers::{FetchId, TiersStats};
use cache::transfer::TransferId;
use cache::{BlockHash, BlockId, HashChain, NameChange};
use protocol::{Duration, Instant, SequenceId};

use super::{Job, Replica};
use crate::tiers::{Ended, Finding, KvTiers, Landing, RecordFormat};

/// The tiers of a replica, and what is on its way up.
pub(super) struct Lower {
    tiers: KvTiers,
    fetches: BTreeMap<FetchId, Fetching>,
    next_fetch: u64,
    /// The last time that was told.
    now: Instant,
    /// Blocks of the pool, from this number on and around, that have not been looked at for copies since
    /// the last step.
    copies_at: u32,
    copies_left: u32,
    /// Names that others have been told of and that no block of the pool has, at most
    /// [`TOLD_BELOW_MAX`].
    told_below: BTreeSet<BlockHash>,
    /// What the pool alone has stored and removed, since names were asked for before the last time.
    of_pool: Vec<NameChange>,
    /// What a block takes to come up, smoothed; zero while unknown.
    block_time: Duration,
}

struct Fetching {
    /// Claims the names in the pool.
    owner: SequenceId,
    names: Vec<BlockHash>,
    /// References on what has come.
    kept: Vec<BlockId>,
    since: Instant,
    /// Not for a request of this replica but for a peer's.
    serves: Option<TransferId>,
}

impl Replica {
    /// Puts tiers below the pool. Say so before the first request.
    pub fn set_tiers(&mut self, tiers: KvTiers) {
        self.batcher.keep_evicted();
        self.lower = Some(Lower::new(tiers));
    }

    /// What a block is on disk.
    pub fn record_format(&self) -> RecordFormat {
        let identity = self.batcher.config().identity;
        let executor = &self.executor;
        let (block_tokens, block_bytes) = (executor.block_tokens(), executor.block_bytes());
        RecordFormat::new(identity.as_bytes(), block_tokens, block_bytes)
    }

    /// What lies below the pool; `None` if nothing does.
    pub fn tier_stats(&self) -> Option<TiersStats> {
        self.lower.as_ref().map(|lower| lower.tiers.stats())
    }

    /// What a block that lies below the pool takes to be in it, as measured of late; zero while none has
    /// come up. `None` if nothing lies there.
    pub fn block_time_below(&self) -> Option<Duration> {
        self.lower.as_ref().map(|lower| lower.block_time)
    }

    /// Names that the pool alone has stored and removed: those behind the last answer of
    /// [`take_name_changes`](Self::take_name_changes). Nothing without tiers, where that answer is it.
    pub fn take_pool_changes(&mut self) -> Vec<NameChange> {
        self.lower.as_mut().map(|lower| std::mem::take(&mut lower.of_pool)).unwrap_or_default()
    }

    /// What is to be logged about the disk since the last call.
    pub fn take_findings(&mut self) -> Vec<Finding> {
        self.lower.as_mut().map_or_else(Vec::new, |lower| lower.tiers.take_findings(lower.now))
    }

    /// To be called when no request is open: copies what only memory has to the disk, a little at a time.
    /// True if it wants to be called again soon.
    pub fn idle(&mut self, now: Instant) -> bool {
        if self.lower.is_none() || self.has_work() {
            return false;
        }
        self.copy_some(now);
        self.advance(now, true);
        self.go_on_serving(now);
        let pool_blocks = self.executor.block_capacity();
        let more = |lower: &Lower| lower.copies_left > 0 && lower.tiers.takes_copies(pool_blocks);
        self.lower.as_ref().is_some_and(|lower| lower.tiers.is_busy() || more(lower))
    }

    /// How many of these names, from the first on, lie below the pool.
    pub(super) fn blocks_below(&self, names: &[BlockHash]) -> usize {
        self.lower.as_ref().map_or(0, |lower| lower.tiers.known(names))
    }

    /// Goes on with the tiers before a step is planned.
    pub(super) fn step_tiers(&mut self, now: Instant) {
        if self.lower.is_some() {
            self.advance(now, false);
        }
        if let Some(lower) = &mut self.lower {
            lower.copies_left = u32::try_from(self.executor.block_capacity()).unwrap_or(u32::MAX);
        }
    }

    /// Saves what the pool has evicted. Nothing is written to a block before this was called: until then
    /// its bytes are those of the name that it had.
    pub(super) fn spill(&mut self) {
        let Some(lower) = &mut self.lower else { return };
        for (block, name) in self.batcher.take_evicted() {
            if let Some(payload) = self.executor.block_payload(block) {
                lower.tiers.evicted(lower.now, block, name, payload);
            }
        }
    }

    /// The names that these jobs lack in the pool and could have from below, a list for each.
    pub(super) fn names_below(&mut self, now: Instant, jobs: &[Job]) -> Vec<Vec<BlockHash>> {
        if self.lower.is_none() {
            return Vec::new();
        }
        self.advance(now, false);
        let Some(lower) = &self.lower else { return Vec::new() };
        let (config, mut seen) = (self.batcher.config(), BTreeSet::new());
        let block_tokens = config.block_tokens;
        let missing = jobs.iter().filter(|job| job.submission.reuse_prefix).filter_map(|job| {
            let submission = &job.submission;
            // The last token is computed in any case.
            let full = submission.tokens.len().saturating_sub(1) / block_tokens;
            let tokens = &submission.tokens[..full * block_tokens];
            let mut chain = HashChain::new(submission.salt, &config.identity, block_tokens);
            chain.extend(tokens);
            let known = self.batcher.blocks_known(chain.hashes());
            let mut names = chain.hashes()[known..].to_vec();
            names.truncate(lower.tiers.known(&names));
            names.last().is_some_and(|last| seen.insert(*last)).then_some(names)
        });
        missing.collect()
    }

    /// Begins to bring blocks up. Sequences that want them wait; those of host memory are there at once.
    pub(super) fn bring_up(&mut self, now: Instant, below: Vec<Vec<BlockHash>>) {
        for names in below {
            self.fetch(now, names, None);
        }
    }

    /// Begins to bring up what a peer wants, as far as it lies below the pool. False if nothing does.
    pub(super) fn bring_up_for(
        &mut self,
        now: Instant,
        transfer: TransferId,
        names: &[BlockHash],
    ) -> bool {
        if self.lower.is_none() {
            return false;
        }
        self.advance(now, false);
        let names = names[..self.blocks_below(names)].to_vec();
        let any = !names.is_empty();
        if any {
            self.fetch(now, names, Some(transfer));
        }
        any
    }

    /// The peer does not want it any more.
    pub(super) fn stop_bringing_up(&mut self, now: Instant, transfer: TransferId) {
        let Some(lower) = &mut self.lower else { return };
        let is_for = |f: &Fetching| f.serves == Some(transfer);
        if let Some((&fetch, _)) = lower.fetches.iter().find(|(_, f)| is_for(f)) {
            lower.tiers.cancel(now, fetch);
        }
    }

    fn fetch(&mut self, now: Instant, names: Vec<BlockHash>, serves: Option<TransferId>) {
        let rate = self.batcher.stats().prompt_rate;
        let tokens = self.batcher.config().block_tokens as f64;
        let block_compute_time = match rate {
            0 => Duration::ZERO,
            rate => Duration::from_secs_f64(tokens / f64::from(rate)),
        };
        let Some(lower) = &mut self.lower else { return };
        let owner = SequenceId(self.next_sequence);
        self.next_sequence += 1;
        let fetch = FetchId(lower.next_fetch);
        lower.next_fetch += 1;
        self.batcher.claim_blocks(&names, owner);
        let (kept, since) = (Vec::new(), now);
        let fetching = Fetching { owner, names: names.clone(), kept, since, serves };
        lower.fetches.insert(fetch, fetching);
        lower.tiers.fetch(now, fetch, names, block_compute_time);
        self.advance(now, false);
    }

    fn advance(&mut self, now: Instant, is_idle: bool) {
        let Some(lower) = &mut self.lower else { return };
        lower.now = now;
        lower.tiers.step(now, LANDING_BYTES_PER_STEP, is_idle);
        while let Some(landing) = self.lower.as_mut().and_then(|lower| lower.tiers.next_landing()) {
            let is_held = self.land(&landing);
            if let Some(lower) = &mut self.lower {
                lower.tiers.landed(now, landing, is_held);
            }
        }
        self.pin_what_came_up();
        let ended = self.lower.as_mut().map(|lower| lower.tiers.take_ended()).unwrap_or_default();
        for Ended { fetch, landed } in ended {
            let Some(lower) = &mut self.lower else { return };
            if let Some(Fetching { owner, names, kept, since, serves }) =
                lower.fetches.remove(&fetch)
            {
                lower.took(landed, now.saturating_since(since));
                self.batcher.unclaim_blocks(&names, owner);
                self.batcher.release_blocks(&kept);
                self.transfers.raised.extend(serves);
            }
        }
    }

    /// What was brought up for peers is held by their transfers from here on: held twice, it would take
    /// twice its share of what may be held outside of sequences.
    fn pin_what_came_up(&mut self) {
        let Some(lower) = &mut self.lower else { return };
        let for_peers = lower.fetches.values_mut().filter(|fetching| fetching.serves.is_some());
        let came: Vec<BlockId> = for_peers.flat_map(|f| std::mem::take(&mut f.kept)).collect();
        if !came.is_empty() {
            self.pin_all_ready();
            self.batcher.release_blocks(&came);
        }
    }

    /// Says of tiers, too, what can be had here: `changes` are the pool's. A name that only moves between
    /// tiers may be said to be stored once more.
    pub(super) fn with_changes_below(&mut self, changes: Vec<NameChange>) -> Vec<NameChange> {
        let Some(lower) = &mut self.lower else { return changes };
        let mut seen = BTreeSet::new();
        lower.of_pool.clone_from(&changes);
        let of_pool = changes.into_iter().map(|change| match change {
            NameChange::Stored(name) | NameChange::Removed(name) => name,
        });
        let touched = of_pool.chain(lower.tiers.take_touched()).filter(|name| seen.insert(*name));
        let batcher = &self.batcher;
        touched.map(|name| lower.change(name, batcher.has_block(&name))).collect()
    }

    /// See [`watch_names`](Self::watch_names).
    pub(super) fn watch_below(&mut self) {
        if let Some(lower) = &mut self.lower {
            lower.tiers.watch();
        }
    }

    /// Puts a block into the pool; false if there is no room or nobody waits for it.
    fn land(&mut self, landing: &Landing) -> bool {
        let waits = |lower: &Lower| lower.fetches.contains_key(&landing.fetch);
        if !self.lower.as_ref().is_some_and(waits) {
            return false;
        }
        let mut blocks = self.batcher.pin_blocks(&[landing.name]);
        if blocks.is_empty() {
            let Some(&block) = self.batcher.reserve_blocks(1).first() else { return false };
            self.spill();
            if self.executor.write_block(block, &landing.payload).is_err() {
                self.batcher.release_blocks(&[block]);
                return false;
            }
            blocks = self.batcher.attach_blocks(&[(block, landing.name)]);
        }
        let lower = self.lower.as_mut().expect("looked at above");
        lower.fetches.get_mut(&landing.fetch).expect("looked at above").kept.extend(blocks);
        true
    }

    /// Copies a few blocks that the pool still has, as if they were evicted.
    fn copy_some(&mut self, now: Instant) {
        let capacity = self.executor.block_capacity();
        let Some(lower) = &mut self.lower else { return };
        if lower.copies_left == 0 || !lower.tiers.takes_copies(capacity) {
            return;
        }
        let mut copied = 0;
        let to_end = u32::try_from(capacity).unwrap_or(u32::MAX) - lower.copies_at;
        let window = COPY_WINDOW_BLOCKS.min(lower.copies_left).min(to_end);
        for (block, name) in self.batcher.cached_within(lower.copies_at, window) {
            if copied == COPIES_PER_CALL {
                (lower.copies_left, lower.copies_at) =
                    (lower.copies_left - (block.0 - lower.copies_at), block.0);
                return;
            }
            let is_new = lower.tiers.known(&[name]) == 0;
            if let (true, Some(payload)) = (is_new, self.executor.block_payload(block)) {
                lower.tiers.evicted(now, block, name, payload);
                copied += 1;
            }
        }
        lower.copies_left -= window;
        lower.copies_at += window;
        if lower.copies_at as usize >= capacity {
            lower.copies_at = 0;
        }
    }
}

impl Lower {
    fn new(tiers: KvTiers) -> Self {
        Lower {
            tiers,
            fetches: BTreeMap::new(),
            next_fetch: 0,
            now: Instant::ORIGIN,
            copies_at: 0,
            copies_left: 0,
            told_below: BTreeSet::new(),
            of_pool: Vec::new(),
            block_time: Duration::ZERO,
        }
    }

    /// So many blocks have come up in one fetch, with all its waits.
    fn took(&mut self, landed: usize, time: Duration) {
        if landed == 0 {
            return;
        }
        let each = time / u32::try_from(landed).unwrap_or(u32::MAX);
        self.block_time = match self.block_time {
            Duration::ZERO => each,
            before => before - before / 4 + each / 4,
        };
    }

    /// What is to be said of a name after all that happened to it.
    fn change(&mut self, name: BlockHash, is_in_pool: bool) -> NameChange {
        if is_in_pool {
            self.told_below.remove(&name);
            return NameChange::Stored(name);
        }
        let is_below = self.tiers.known(&[name]) == 1;
        if is_below && (self.told_below.len() < TOLD_BELOW_MAX || self.told_below.contains(&name)) {
            self.told_below.insert(name);
            return NameChange::Stored(name);
        }
        self.told_below.remove(&name);
        NameChange::Removed(name)
    }
}

/// Names below the pool that others are told of, for each model; what goes beyond is brought up for
/// requests of this node only. Too small: peers compute what lies on this disk. Too large: the tables of
/// the directory's owners, two million names, are full of what is rarely asked for.
const TOLD_BELOW_MAX: usize = 131_072;
/// Bytes copied up between two steps, but one block: about 10 ms. Too small: a long prefix takes many
/// steps. Too large: streams stutter.
const LANDING_BYTES_PER_STEP: usize = 64 << 20;
/// Blocks copied for the disk in one call while idle, and those looked at.
const COPIES_PER_CALL: usize = 8;
const COPY_WINDOW_BLOCKS: u32 = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiers::TiersOptions;
    use cache::tiers::TiersConfig;

    fn name(n: u32) -> BlockHash {
        let mut name = [0; 32];
        name[..4].copy_from_slice(&n.to_le_bytes());
        BlockHash(name)
    }

    #[test]
    fn a_block_from_below_has_a_price() {
        let ms = Duration::from_millis;
        let options = TiersOptions { host_bytes: 1 << 20, disk: None };
        let tiers = KvTiers::open(&options, RecordFormat::new(&[0; 32], 16, 512)).unwrap();
        let mut lower = Lower::new(tiers);
        for (landed, time, expect) in [
            (0, ms(900), ms(0)),
            (4, ms(40), ms(10)),
            (2, ms(100), ms(20)),
            (0, ms(900), ms(20)),
            (1, ms(20), ms(20)),
        ] {
            lower.took(landed, time);
            assert_eq!(lower.block_time, expect, "{landed} in {time:?}");
        }
    }

    #[test]
    fn what_is_told_from_below_is_bounded() {
        let most = TOLD_BELOW_MAX as u32;
        let mut lower = Lower::new(KvTiers::new(TiersConfig::new(most + 2, 0), 1, None));
        for n in 0..most + 2 {
            lower.tiers.evicted(Instant::ORIGIN, BlockId(n), name(n), &[0]);
            let change = match n < most {
                true => NameChange::Stored(name(n)),
                false => NameChange::Removed(name(n)),
            };
            assert_eq!(lower.change(name(n), false), change);
        }
        // Said again: the same.
        assert_eq!(lower.change(name(0), false), NameChange::Stored(name(0)));
        assert_eq!(lower.change(name(most), false), NameChange::Removed(name(most)));
        // What comes into the pool is not among them, and makes room.
        assert_eq!(lower.change(name(0), true), NameChange::Stored(name(0)));
        assert_eq!(lower.change(name(most), false), NameChange::Stored(name(most)));
        assert_eq!(lower.change(name(most + 1), false), NameChange::Removed(name(most + 1)));
        assert_eq!(lower.told_below.len(), TOLD_BELOW_MAX);
    }
}
