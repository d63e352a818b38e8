//! Blocks that are not a sequence's: room for what comes from elsewhere, pins of what goes there.
//!
//! Who takes blocks here gives every one back: by [`Batcher::release_blocks`], or by leaving them to the pool's cache
//! once they are attached and released.

use cache::{BlockHash, BlockId, Committed, Lookup, NameChange};
use protocol::SequenceId;

use super::Batcher;

impl Batcher {
    /// How many of the names, from the first on, are in the pool or being computed by some sequence.
    pub fn blocks_known(&self, names: &[BlockHash]) -> usize {
        names.iter().take_while(|name| self.pool.lookup(name) != Lookup::Absent).count()
    }

    /// Whether the block is in the pool, whole.
    pub fn has_block(&self, name: &BlockHash) -> bool {
        matches!(self.pool.lookup(name), Lookup::Ready(_))
    }

    /// `n` blocks that nobody else reads or writes, or none at all if running sequences may need them. At
    /// most half of the pool is held in this way, so that sequences go on beside it.
    pub fn reserve_blocks(&mut self, n: usize) -> Vec<BlockId> {
        let kept = self.blocks_reserved() + self.config.blocks_watermark as usize;
        let held_max = self.pool.capacity() / 2;
        if n + kept > self.pool.available() || self.held + n > held_max {
            return Vec::new();
        }
        let blocks = self.pool.reserve(n, &mut Vec::new()).unwrap_or_default();
        self.held += blocks.len();
        blocks
    }

    /// Names reserved blocks whose bytes are whole. The references stay the caller's; where another block
    /// had the name already, they have moved to that one.
    pub fn attach_blocks(&mut self, blocks: &[(BlockId, BlockHash)]) -> Vec<BlockId> {
        let attached = blocks.iter().map(|&(block, name)| match self.pool.attach(block, name) {
            Committed::Indexed => block,
            Committed::Replaced(canonical) => canonical,
        });
        attached.collect()
    }

    /// References on the longest beginning of `names` that is in the pool.
    pub fn pin_blocks(&mut self, names: &[BlockHash]) -> Vec<BlockId> {
        let blocks = self.pool.match_prefix(names);
        self.held += blocks.len();
        blocks
    }

    /// Takes back one reference on each, which one of the above has given.
    pub fn release_blocks(&mut self, blocks: &[BlockId]) {
        self.held = self.held.checked_sub(blocks.len()).expect("only what was taken here");
        for &block in blocks.iter().rev() {
            self.pool.release(block);
        }
    }

    /// From now on evictions are kept for [`take_evicted`](Self::take_evicted).
    pub fn keep_evicted(&mut self) {
        self.pool.keep_evicted();
    }

    /// Blocks evicted since the last call, with their names; see [`cache::BlockPool::take_evicted`]. To be
    /// asked after each plan and each [`reserve_blocks`](Self::reserve_blocks), before anything is written.
    pub fn take_evicted(&mut self) -> Vec<(BlockId, BlockHash)> {
        self.pool.take_evicted()
    }

    /// Cached blocks with numbers in `from .. from + n`, and their names.
    pub fn cached_within(&self, from: u32, n: u32) -> Vec<(BlockId, BlockHash)> {
        self.pool.cached_within(from, n).collect()
    }

    /// From now on [`take_name_changes`](Self::take_name_changes) says what can be found in the pool.
    pub fn watch_names(&mut self) {
        self.pool.watch();
    }

    /// Names stored and removed since the last call, in order.
    pub fn take_name_changes(&mut self) -> Vec<NameChange> {
        self.pool.take_changes()
    }

    /// References that are held outside of sequences.
    pub fn blocks_held(&self) -> usize {
        self.held
    }

    /// Says that these blocks are on their way, so that sequences wait for them. `owner` is a number that
    /// no sequence has.
    pub fn claim_blocks(&mut self, names: &[BlockHash], owner: SequenceId) {
        for name in names {
            self.pool.claim(name, owner);
        }
    }

    /// Ends what [`claim_blocks`](Self::claim_blocks) said.
    pub fn unclaim_blocks(&mut self, names: &[BlockHash], owner: SequenceId) {
        for name in names {
            self.pool.unclaim(name, owner);
        }
    }
}
