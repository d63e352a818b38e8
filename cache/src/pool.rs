//! Which block holds what, and who may write it.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use protocol::SequenceId;

use crate::{BlockHash, BlockId};

/// All blocks of one executor: reference counts, the free lists and the index from names to blocks.
///
/// A block is in exactly one of three states. *Free*: nobody refers to it, it has no name. *Cached*:
/// nobody refers to it, but its name still finds it; the least recently used one is reused when no
/// free block is left. *Used*: `references` sequences read it, and if it has no name, the one that
/// refers to it may write it. A block with a name is never written again.
///
/// Owns numbers, never bytes. Every operation but [`match_prefix`](Self::match_prefix) takes constant
/// time for each block and none of the lists allocates. Misuse (releasing what is not held, naming what is shared)
/// panics: it is an error of the caller that would let one sequence read another's keys.
#[derive(Debug)]
pub struct BlockPool {
    slots: Vec<Slot>,
    /// Without a name, taken first; last in, first out.
    free: List,
    /// With a name; taken from the front, released to the back.
    cached: List,
    index: HashMap<BlockHash, BlockId, BuildHasherDefault<PrefixHasher>>,
    pending: HashMap<BlockHash, SequenceId, BuildHasherDefault<PrefixHasher>>,
    evictions: u64,
    /// What was evicted since it was last asked for, if anybody asks.
    evicted: Option<Vec<(BlockId, BlockHash)>>,
    /// What has happened to names since it was last taken; nothing is kept unless somebody watches.
    changes: Option<Vec<NameChange>>,
}

/// A name that can be found from now on, or not any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameChange {
    Stored(BlockHash),
    Removed(BlockHash),
}

/// A block taken by [`BlockPool::allocate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocated {
    pub block: BlockId,
    /// The name that was forgotten for it: what a lower tier could keep.
    pub evicted: Option<BlockHash>,
}

/// What [`BlockPool::commit`] and [`BlockPool::attach`] made of a filled block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {
    /// The block is found under its name from now on.
    Indexed,
    /// Another block has that name already. The caller's reference has moved to it and the caller's
    /// block is free: equal names mean equal bytes, so one copy is enough.
    Replaced(BlockId),
}

/// Where a name stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Full and readable.
    Ready(BlockId),
    /// This sequence is computing it.
    Pending(SequenceId),
    Absent,
}

/// The pool at one moment. `free + cached + used` is the capacity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    pub free: usize,
    pub cached: usize,
    pub used: usize,
    /// Names that some sequence is computing.
    pub pending: usize,
    /// Names forgotten so far to reuse their blocks.
    pub evictions: u64,
}

impl BlockPool {
    /// `capacity` free blocks. Panics if it is `u32::MAX`.
    pub fn new(capacity: u32) -> Self {
        assert!(capacity < NIL, "one number is kept for the end of lists");
        let mut pool = BlockPool {
            slots: vec![Slot::default(); capacity as usize],
            free: List::default(),
            cached: List::default(),
            index: HashMap::default(),
            pending: HashMap::default(),
            evictions: 0,
            evicted: None,
            changes: None,
        };
        for block in (0..capacity).rev() {
            pool.free.push_front(&mut pool.slots, block);
        }
        pool
    }

    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// Blocks that [`allocate`](Self::allocate) can still give: free and cached ones.
    pub fn available(&self) -> usize {
        self.free.len + self.cached.len
    }

    /// A block without a name, with one reference: a free one, or else the least recently used cached
    /// one. `None` if every block is used.
    pub fn allocate(&mut self) -> Option<Allocated> {
        if let Some(block) = self.free.pop_front(&mut self.slots) {
            self.slots[block as usize].references = 1;
            return Some(Allocated { block: BlockId(block), evicted: None });
        }
        let block = self.cached.pop_front(&mut self.slots)?;
        let slot = &mut self.slots[block as usize];
        slot.references = 1;
        let hash = slot.hash.take().expect("a cached block has a name");
        self.index.remove(&hash);
        self.changed(NameChange::Removed(hash));
        self.evictions += 1;
        if let Some(evicted) = &mut self.evicted {
            evicted.push((BlockId(block), hash));
        }
        Some(Allocated { block: BlockId(block), evicted: Some(hash) })
    }

    /// `n` blocks as [`allocate`](Self::allocate) gives them, or none at all: room for what will come
    /// from elsewhere. The names forgotten for them are appended to `evicted`.
    pub fn reserve(&mut self, n: usize, evicted: &mut Vec<BlockHash>) -> Option<Vec<BlockId>> {
        if n > self.available() {
            return None;
        }
        let allocated = (0..n).map(|_| self.allocate().expect("there are as many"));
        Some(allocated.inspect(|a| evicted.extend(a.evicted)).map(|a| a.block).collect())
    }

    /// From now on evictions are kept for [`take_evicted`](Self::take_evicted).
    pub fn keep_evicted(&mut self) {
        self.evicted.get_or_insert_default();
    }

    /// Blocks whose names were forgotten since the last call, and those names, in order: what a lower
    /// tier could keep. Ask before any block is written, for until then each still holds what the name
    /// stood for.
    pub fn take_evicted(&mut self) -> Vec<(BlockId, BlockHash)> {
        self.evicted.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The cached blocks with numbers in `from .. from + n`, and their names.
    pub fn cached_within(
        &self,
        from: u32,
        n: u32,
    ) -> impl Iterator<Item = (BlockId, BlockHash)> + '_ {
        let end = from.saturating_add(n).min(self.slots.len() as u32);
        (from.min(end)..end).filter_map(|block| {
            let slot = &self.slots[block as usize];
            slot.hash.filter(|_| slot.references == 0).map(|hash| (BlockId(block), hash))
        })
    }

    /// Takes back one reference. The last one makes the block cached if it has a name, free if not.
    /// Release a sequence's blocks last to first, so that the end of a prefix is forgotten before the
    /// beginning.
    pub fn release(&mut self, block: BlockId) {
        let slot = &mut self.slots[block.0 as usize];
        assert!(slot.references > 0, "block {} is released but not held", block.0);
        slot.references -= 1;
        if slot.references > 0 {
            return;
        }
        match slot.hash {
            Some(_) => self.cached.push_back(&mut self.slots, block.0),
            None => self.free.push_front(&mut self.slots, block.0),
        }
    }

    /// Names a block that the caller has filled, and ends the claim of `owner` on that name. The
    /// caller holds the only reference.
    pub fn commit(&mut self, block: BlockId, hash: BlockHash, owner: SequenceId) -> Committed {
        self.unclaim(&hash, owner);
        self.attach(block, hash)
    }

    /// Names a block whose bytes came from elsewhere and are verified. The caller holds the only
    /// reference. A claim on the name stays its owner's: who computes it finds it there.
    pub fn attach(&mut self, block: BlockId, hash: BlockHash) -> Committed {
        assert!(self.is_writable(block), "block {} is named but not the caller's own", block.0);
        if let Some(&canonical) = self.index.get(&hash) {
            self.retain(canonical);
            self.release(block);
            return Committed::Replaced(canonical);
        }
        self.slots[block.0 as usize].hash = Some(hash);
        self.index.insert(hash, block);
        self.changed(NameChange::Stored(hash));
        Committed::Indexed
    }

    /// From now on changes of names are kept for [`take_changes`](Self::take_changes), which must be
    /// called now and then: there are as many as blocks were named.
    pub fn watch(&mut self) {
        self.changes.get_or_insert_default();
    }

    /// What has happened to names since the last call, in order.
    pub fn take_changes(&mut self) -> Vec<NameChange> {
        self.changes.as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn changed(&mut self, change: NameChange) {
        if let Some(changes) = &mut self.changes {
            changes.push(change);
        }
    }

    /// Where a name stands; takes no reference.
    pub fn lookup(&self, hash: &BlockHash) -> Lookup {
        match (self.index.get(hash), self.pending.get(hash)) {
            (Some(&block), _) => Lookup::Ready(block),
            (None, Some(&owner)) => Lookup::Pending(owner),
            (None, None) => Lookup::Absent,
        }
    }

    /// The blocks of the longest beginning of `hashes` that is ready, with a reference on each.
    pub fn match_prefix(&mut self, hashes: &[BlockHash]) -> Vec<BlockId> {
        let mut blocks = Vec::new();
        for hash in hashes {
            let Some(&block) = self.index.get(hash) else { break };
            self.retain(block);
            blocks.push(block);
        }
        blocks
    }

    /// Says that `owner` is going to compute the block of that name, so that others can wait for it.
    /// False if it is ready already or someone else computes it.
    pub fn claim(&mut self, hash: &BlockHash, owner: SequenceId) -> bool {
        match self.lookup(hash) {
            Lookup::Absent => self.pending.insert(*hash, owner).is_none(),
            Lookup::Pending(other) => other == owner,
            Lookup::Ready(_) => false,
        }
    }

    /// Ends the claim of `owner` on that name, if it has one: it will not compute it after all.
    pub fn unclaim(&mut self, hash: &BlockHash, owner: SequenceId) {
        if self.pending.get(hash) == Some(&owner) {
            self.pending.remove(hash);
        }
    }

    /// Whether its one holder may write the block: nobody else can read it, now or by its name.
    pub fn is_writable(&self, block: BlockId) -> bool {
        let slot = &self.slots[block.0 as usize];
        slot.references == 1 && slot.hash.is_none()
    }

    /// How many hold the block.
    pub fn references(&self, block: BlockId) -> u32 {
        self.slots[block.0 as usize].references
    }

    pub fn stats(&self) -> PoolStats {
        let available = self.available();
        PoolStats {
            free: self.free.len,
            cached: self.cached.len,
            used: self.slots.len() - available,
            pending: self.pending.len(),
            evictions: self.evictions,
        }
    }

    fn retain(&mut self, block: BlockId) {
        if self.slots[block.0 as usize].references == 0 {
            self.cached.unlink(&mut self.slots, block.0);
        }
        self.slots[block.0 as usize].references += 1;
    }
}

#[derive(Clone, Debug)]
struct Slot {
    references: u32,
    hash: Option<BlockHash>,
    previous: u32,
    next: u32,
}

impl Default for Slot {
    fn default() -> Self {
        Slot { references: 0, hash: None, previous: NIL, next: NIL }
    }
}

/// A doubly linked list through the slots. A slot is in at most one list.
#[derive(Debug)]
struct List {
    head: u32,
    tail: u32,
    len: usize,
}

impl Default for List {
    fn default() -> Self {
        List { head: NIL, tail: NIL, len: 0 }
    }
}

impl List {
    fn push_front(&mut self, slots: &mut [Slot], block: u32) {
        slots[block as usize].previous = NIL;
        slots[block as usize].next = self.head;
        match self.head {
            NIL => self.tail = block,
            head => slots[head as usize].previous = block,
        }
        self.head = block;
        self.len += 1;
    }

    fn push_back(&mut self, slots: &mut [Slot], block: u32) {
        slots[block as usize].next = NIL;
        slots[block as usize].previous = self.tail;
        match self.tail {
            NIL => self.head = block,
            tail => slots[tail as usize].next = block,
        }
        self.tail = block;
        self.len += 1;
    }

    fn pop_front(&mut self, slots: &mut [Slot]) -> Option<u32> {
        let block = self.head;
        (block != NIL).then(|| {
            self.unlink(slots, block);
            block
        })
    }

    fn unlink(&mut self, slots: &mut [Slot], block: u32) {
        let Slot { previous, next, .. } = slots[block as usize];
        match previous {
            NIL => self.head = next,
            _ => slots[previous as usize].next = next,
        }
        match next {
            NIL => self.tail = previous,
            _ => slots[next as usize].previous = previous,
        }
        self.len -= 1;
    }
}

/// The first eight bytes of a name. Names are keyed hashes: nobody without the key can choose them, so
/// hashing them again buys nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct PrefixHasher(u64);

impl Hasher for PrefixHasher {
    fn write(&mut self, bytes: &[u8]) {
        let mut first = [0; 8];
        let n = bytes.len().min(8);
        first[..n].copy_from_slice(&bytes[..n]);
        self.0 = u64::from_le_bytes(first);
    }

    /// The length of the array comes apart from its bytes and says nothing.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

const NIL: u32 = u32::MAX;
