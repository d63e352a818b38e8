//! The tiers below the pool: what is evicted is saved before it is overwritten, and what a request needs
//! of them is brought up while it waits.
//!
//! A sequence waits for blocks that are on their way as it waits for blocks that another sequence computes:
//! their names are claimed. The claims end with the fetch, and a fetch ends in time: whatever a disk
//! does, the sequence computes the rest.

use std::collections::{BTreeMap, BTreeSet};

use cache::tiers::{FetchId, TiersStats};
use cache::{BlockHash, BlockId, HashChain};
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
}

struct Fetching {
    /// Claims the names in the pool.
    owner: SequenceId,
    names: Vec<BlockHash>,
    /// References on what has come.
    kept: Vec<BlockId>,
}

impl Replica {
    /// Puts tiers below the pool. Say so before the first request.
    pub fn set_tiers(&mut self, tiers: KvTiers) {
        self.batcher.keep_evicted();
        self.lower = Some(Lower {
            tiers,
            fetches: BTreeMap::new(),
            next_fetch: 0,
            now: Instant::ORIGIN,
            copies_at: 0,
            copies_left: 0,
        });
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
            let Some(lower) = &mut self.lower else { return };
            let owner = SequenceId(self.next_sequence);
            self.next_sequence += 1;
            let fetch = FetchId(lower.next_fetch);
            lower.next_fetch += 1;
            self.batcher.claim_blocks(&names, owner);
            let rate = self.batcher.stats().prompt_rate;
            let tokens = self.batcher.config().block_tokens as f64;
            let block_compute_time = match rate {
                0 => Duration::ZERO,
                rate => Duration::from_secs_f64(tokens / f64::from(rate)),
            };
            lower.fetches.insert(fetch, Fetching { owner, names: names.clone(), kept: Vec::new() });
            lower.tiers.fetch(now, fetch, names, block_compute_time);
            self.advance(now, false);
        }
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
        let ended = self.lower.as_mut().map(|lower| lower.tiers.take_ended()).unwrap_or_default();
        for Ended { fetch, .. } in ended {
            let fetching = self.lower.as_mut().and_then(|lower| lower.fetches.remove(&fetch));
            if let Some(Fetching { owner, names, kept }) = fetching {
                self.batcher.unclaim_blocks(&names, owner);
                self.batcher.release_blocks(&kept);
            }
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

/// Bytes copied up between two steps, but one block: about 10 ms. Too small: a long prefix takes many
/// steps. Too large: streams stutter.
const LANDING_BYTES_PER_STEP: usize = 64 << 20;
/// Blocks copied for the disk in one call while idle, and those looked at.
const COPIES_PER_CALL: usize = 8;
const COPY_WINDOW_BLOCKS: u32 = 1024;
