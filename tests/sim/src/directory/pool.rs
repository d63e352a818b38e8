//! A stand-in for a pool: which blocks a node has, and which it forgets first.

use std::collections::{BTreeMap, BTreeSet};

use protocol::directory::ShortName;
use protocol::random::{Random, mix};

/// What prompts are made of: families that begin alike and go on differently.
#[derive(Clone, Copy, Debug)]
pub struct Texts {
    pub families: usize,
    pub variants: usize,
    /// Blocks that a family has in common.
    pub shared: usize,
    /// Blocks of the longest prompt.
    pub blocks_max: usize,
}

impl Texts {
    /// The names of some prompt's blocks.
    pub fn draw(&self, random: &mut Random) -> Vec<ShortName> {
        let family = random.below(self.families) as u64 + 1;
        let variant = random.below(self.variants) as u64 + 1;
        let blocks = 1 + random.below(self.blocks_max);
        let name = |block: usize| {
            let variant = if block < self.shared { 0 } else { variant };
            ShortName::from_number(mix(family << 40 | variant << 20 | block as u64))
        };
        (0..blocks).map(name).collect()
    }
}

/// Forgets the least recently used, the end of a prompt before its beginning.
#[derive(Debug)]
pub struct Pool {
    capacity: usize,
    used: u64,
    held: BTreeMap<ShortName, Held>,
    /// By last use and, last block first, depth.
    order: BTreeSet<(u64, u32, ShortName)>,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    first: ShortName,
    used: u64,
    height: u32,
}

impl Pool {
    /// `capacity` must be more than the longest prompt has blocks.
    pub fn new(capacity: usize) -> Self {
        Pool { capacity, used: 0, held: BTreeMap::new(), order: BTreeSet::new() }
    }

    /// Computes a prompt. Gives what was forgotten for it, and what is new.
    pub fn compute(&mut self, prompt: &[ShortName]) -> (Vec<ShortName>, Vec<ShortName>) {
        self.used += 1;
        let (mut forgotten, mut stored) = (Vec::new(), Vec::new());
        for (depth, name) in prompt.iter().enumerate() {
            let height = u32::MAX - depth as u32;
            let held = Held { first: prompt[0], used: self.used, height };
            match self.held.insert(*name, held) {
                Some(old) => _ = self.order.remove(&(old.used, old.height, *name)),
                None => stored.push(*name),
            }
            self.order.insert((self.used, height, *name));
        }
        while self.held.len() > self.capacity {
            let (_, _, name) = self.order.pop_first().expect("as many as are held");
            self.held.remove(&name);
            forgotten.push(name);
        }
        (forgotten, stored)
    }

    pub fn len(&self) -> usize {
        self.held.len()
    }

    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// What is held, with the first block of its prompt.
    pub fn names(&self) -> impl Iterator<Item = (ShortName, ShortName)> + '_ {
        self.held.iter().map(|(name, held)| (*name, held.first))
    }

    /// How many blocks of the prompt's beginning are held.
    pub fn beginning(&self, prompt: &[ShortName]) -> usize {
        prompt.iter().take_while(|name| self.held.contains_key(name)).count()
    }
}
