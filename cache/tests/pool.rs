//! The pool against a naive one: a list of blocks and a list of their last uses.

use std::collections::BTreeMap;

use cache::{BlockHash, BlockId, BlockPool, Committed, Lookup};
use proptest::prelude::*;
use protocol::SequenceId;

#[derive(Clone, Copy, Debug)]
enum Op {
    Allocate,
    /// So many blocks or none.
    Reserve(usize),
    /// One of the references held, under one of a few names, whoever claims that.
    Attach(usize, u8),
    /// One of the references held.
    Release(usize),
    /// One of the references held, under one of a few names.
    Commit(usize, u8),
    /// Names `from .. from + n`.
    Match(u8, u8),
    Claim(u8, u8),
    Unclaim(u8, u8),
}

#[derive(Clone, Debug, Default)]
struct Block {
    references: u32,
    hash: Option<BlockHash>,
    /// When its last reference was released.
    released: u64,
}

/// What the pool should be, in the simplest words.
struct Model {
    blocks: Vec<Block>,
    pending: BTreeMap<BlockHash, SequenceId>,
    held: Vec<BlockId>,
    clock: u64,
}

impl Model {
    fn block(&mut self, block: BlockId) -> &mut Block {
        &mut self.blocks[block.0 as usize]
    }

    fn find(&self, hash: &BlockHash) -> Option<BlockId> {
        let found: Vec<_> =
            (0..).zip(&self.blocks).filter(|(_, b)| b.hash == Some(*hash)).collect();
        assert!(found.len() <= 1, "two blocks of one name");
        found.first().map(|(i, _)| BlockId(*i))
    }

    fn release(&mut self, block: BlockId) {
        self.clock += 1;
        let clock = self.clock;
        let block = self.block(block);
        block.references = block.references.checked_sub(1).expect("never below zero");
        if block.references == 0 {
            block.released = clock;
        }
    }

    fn count(&self, what: impl Fn(&Block) -> bool) -> usize {
        self.blocks.iter().filter(|block| what(block)).count()
    }

    fn apply(&mut self, pool: &mut BlockPool, op: Op) {
        match op {
            Op::Allocate => self.allocate(pool),
            Op::Reserve(n) => self.reserve(pool, n),
            Op::Release(which) if !self.held.is_empty() => {
                let block = self.held.swap_remove(which % self.held.len());
                pool.release(block);
                self.release(block);
            }
            Op::Commit(which, name) if !self.held.is_empty() => {
                let at = which % self.held.len();
                self.commit(pool, at, name, Some(SequenceId(u64::from(name % 3))));
            }
            Op::Attach(which, name) if !self.held.is_empty() => {
                let at = which % self.held.len();
                self.commit(pool, at, name, None);
            }
            Op::Release(_) | Op::Commit(..) | Op::Attach(..) => {}
            Op::Match(from, n) => {
                let names: Vec<_> = (from..from + n).map(hash).collect();
                let found: Vec<_> = names.iter().map_while(|name| self.find(name)).collect();
                assert_eq!(pool.match_prefix(&names), found);
                for &block in &found {
                    self.block(block).references += 1;
                }
                self.held.extend(found);
            }
            Op::Claim(name, owner) => {
                let (name, owner) = (hash(name), SequenceId(owner.into()));
                let free = self.find(&name).is_none()
                    && self.pending.get(&name).is_none_or(|other| *other == owner);
                assert_eq!(pool.claim(&name, owner), free);
                if free {
                    self.pending.insert(name, owner);
                }
            }
            Op::Unclaim(name, owner) => self.unclaim_both(pool, hash(name), owner),
        }
    }

    fn allocate(&mut self, pool: &mut BlockPool) {
        let free = self.count(|b| b.references == 0 && b.hash.is_none());
        let cached = self.blocks.iter().filter(|b| b.references == 0 && b.hash.is_some());
        let oldest = cached.min_by_key(|b| b.released).and_then(|b| b.hash);
        let Some(allocated) = pool.allocate() else {
            assert!(free == 0 && oldest.is_none(), "there was a block");
            return;
        };
        assert_eq!(allocated.evicted, if free > 0 { None } else { oldest });
        let block = self.block(allocated.block);
        assert_eq!((block.references, block.hash), (0, allocated.evicted));
        (block.references, block.hash) = (1, None);
        self.held.push(allocated.block);
    }

    fn reserve(&mut self, pool: &mut BlockPool, n: usize) {
        let mut cached: Vec<_> =
            self.blocks.iter().filter(|b| b.references == 0 && b.hash.is_some()).collect();
        cached.sort_by_key(|b| b.released);
        let free = self.count(|b| b.references == 0 && b.hash.is_none());
        let names: Vec<_> = cached.iter().take(n.saturating_sub(free)).map(|b| b.hash).collect();
        let room = free + cached.len();
        let mut evicted = Vec::new();
        let Some(blocks) = pool.reserve(n, &mut evicted) else {
            assert!(room < n && evicted.is_empty(), "there was room");
            return;
        };
        assert_eq!((blocks.len(), evicted.into_iter().map(Some).collect()), (n, names));
        for &block in &blocks {
            let block = self.block(block);
            (block.references, block.hash) = (1, None);
        }
        self.held.extend(blocks);
    }

    /// With an owner as a commit, without one as an attach.
    fn commit(&mut self, pool: &mut BlockPool, at: usize, name: u8, owner: Option<SequenceId>) {
        let block = self.held[at];
        let own = self.block(block).references == 1 && self.block(block).hash.is_none();
        assert_eq!(pool.is_writable(block), own);
        if !own {
            return;
        }
        let name = hash(name);
        let committed = match owner {
            Some(owner) => pool.commit(block, name, owner),
            None => pool.attach(block, name),
        };
        if owner.is_some() && self.pending.get(&name).copied() == owner {
            self.pending.remove(&name);
        }
        match self.find(&name) {
            None => {
                assert_eq!(committed, Committed::Indexed);
                self.block(block).hash = Some(name);
            }
            Some(canonical) => {
                assert_eq!(committed, Committed::Replaced(canonical));
                self.block(canonical).references += 1;
                self.release(block);
                self.held[at] = canonical;
            }
        }
    }

    fn unclaim_both(&mut self, pool: &mut BlockPool, name: BlockHash, owner: u8) {
        let owner = SequenceId(owner.into());
        pool.unclaim(&name, owner);
        if self.pending.get(&name) == Some(&owner) {
            self.pending.remove(&name);
        }
    }

    fn assert_equal(&self, pool: &BlockPool) {
        let stats = pool.stats();
        assert_eq!(stats.free, self.count(|b| b.references == 0 && b.hash.is_none()));
        assert_eq!(stats.cached, self.count(|b| b.references == 0 && b.hash.is_some()));
        assert_eq!(stats.used, self.count(|b| b.references > 0));
        assert_eq!(stats.pending, self.pending.len());
        assert_eq!(stats.free + stats.cached + stats.used, pool.capacity());
        for (i, block) in (0..).zip(&self.blocks) {
            assert_eq!(pool.references(BlockId(i)), block.references);
            let writable = block.references == 1 && block.hash.is_none();
            assert_eq!(pool.is_writable(BlockId(i)), writable);
        }
        for name in (0..NAMES).map(hash) {
            let expected = match (self.find(&name), self.pending.get(&name)) {
                (Some(block), _) => Lookup::Ready(block),
                (None, Some(owner)) => Lookup::Pending(*owner),
                (None, None) => Lookup::Absent,
            };
            assert_eq!(pool.lookup(&name), expected);
        }
    }
}

/// Names that collide in the truncation the index hashes by.
fn hash(name: u8) -> BlockHash {
    let mut bytes = [0; 32];
    bytes[0] = name % 2;
    bytes[31] = name;
    BlockHash(bytes)
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let name = || 0..NAMES;
    let op = prop_oneof![
        4 => Just(Op::Allocate),
        1 => (0..6usize).prop_map(Op::Reserve),
        2 => (any::<usize>(), name()).prop_map(|(which, name)| Op::Attach(which, name)),
        4 => any::<usize>().prop_map(Op::Release),
        3 => (any::<usize>(), name()).prop_map(|(which, name)| Op::Commit(which, name)),
        2 => (name(), 0..4u8).prop_map(|(from, n)| Op::Match(from, n)),
        1 => (name(), 0..3u8).prop_map(|(name, owner)| Op::Claim(name, owner)),
        1 => (name(), 0..3u8).prop_map(|(name, owner)| Op::Unclaim(name, owner)),
    ];
    proptest::collection::vec(op, 0..300)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    #[test]
    fn pool_is_what_the_model_is(capacity in 1..12u32, ops in ops()) {
        let mut pool = BlockPool::new(capacity);
        let mut model = Model {
            blocks: vec![Block::default(); capacity as usize],
            pending: BTreeMap::new(),
            held: Vec::new(),
            clock: 0,
        };
        for op in ops {
            model.apply(&mut pool, op);
            model.assert_equal(&pool);
        }
        for block in std::mem::take(&mut model.held) {
            pool.release(block);
        }
        prop_assert_eq!(pool.stats().used, 0);
        prop_assert_eq!(pool.available(), pool.capacity());
    }
}

#[test]
fn the_end_of_a_prefix_is_forgotten_before_its_beginning() {
    let mut pool = BlockPool::new(3);
    let blocks: Vec<_> = (0..3).map(|_| pool.allocate().expect("free").block).collect();
    for (&block, name) in blocks.iter().zip(0..) {
        assert_eq!(pool.commit(block, hash(name), SequenceId(0)), Committed::Indexed);
    }
    for &block in blocks.iter().rev() {
        pool.release(block);
    }
    let evicted: Vec<_> = (0..3).map(|_| pool.allocate().expect("cached").evicted).collect();
    assert_eq!(evicted, [Some(hash(2)), Some(hash(1)), Some(hash(0))]);
    assert_eq!(pool.allocate(), None);
    assert_eq!(pool.stats().evictions, 3);
}

#[test]
#[should_panic(expected = "block 0 is released but not held")]
fn releasing_what_is_not_held_panics() {
    BlockPool::new(1).release(BlockId(0));
}

#[test]
#[should_panic(expected = "block 0 is named but not the caller's own")]
fn naming_what_others_read_panics() {
    let mut pool = BlockPool::new(1);
    let block = pool.allocate().expect("free").block;
    pool.commit(block, hash(1), SequenceId(0));
    pool.commit(block, hash(2), SequenceId(0));
}

const NAMES: u8 = 10;
