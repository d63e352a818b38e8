//! A bounded set of numbered places for named blocks, of which the least recently used gives way.

use std::collections::{BTreeSet, HashMap};
use std::hash::BuildHasherDefault;

use crate::BlockHash;
use crate::pool::PrefixHasher;

/// The places of one tier. `S` is what the tier knows of each block.
///
/// A place with pins is being read or written and is never given to another block.
#[derive(Debug)]
pub(super) struct Shelf<S> {
    capacity: u32,
    /// Grows to the capacity as places are used.
    places: Vec<Option<Entry<S>>>,
    /// Empty places below the length of `places`, last in, first out.
    empty: Vec<u32>,
    index: HashMap<BlockHash, u32, BuildHasherDefault<PrefixHasher>>,
    /// Blocks without pins, the least recently used first.
    idle: BTreeSet<(u64, u32)>,
    uses: u64,
    /// Names that have come or gone since they were last taken, if anybody watches.
    touched: Option<Vec<BlockHash>>,
}

#[derive(Debug)]
pub(super) struct Entry<S> {
    pub name: BlockHash,
    pub state: S,
    pins: u32,
    used: u64,
}

/// A place that was made empty for a new block.
#[derive(Debug)]
pub(super) struct Vacated<S> {
    pub place: u32,
    /// What had to go.
    pub forgotten: Option<Entry<S>>,
}

impl<S> Shelf<S> {
    pub fn new(capacity: u32) -> Self {
        Shelf {
            capacity,
            places: Vec::new(),
            empty: Vec::new(),
            index: HashMap::default(),
            idle: BTreeSet::new(),
            uses: 0,
            touched: None,
        }
    }

    pub fn capacity(&self) -> usize {
        self.capacity as usize
    }

    /// From now on names that come and go are kept for [`take_touched`](Self::take_touched), and those
    /// that are there already.
    pub fn watch(&mut self) {
        if self.touched.is_none() {
            self.touched = Some(self.places.iter().flatten().map(|entry| entry.name).collect());
        }
    }

    /// Names that have come or gone since the last call; one may stand there more than once.
    pub fn take_touched(&mut self) -> Vec<BlockHash> {
        self.touched.as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn touched(&mut self, name: BlockHash) {
        if let Some(touched) = &mut self.touched {
            touched.push(name);
        }
    }

    /// Blocks on the shelf.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    pub fn find(&self, name: &BlockHash) -> Option<u32> {
        self.index.get(name).copied()
    }

    pub fn entry(&self, place: u32) -> Option<&Entry<S>> {
        self.places.get(place as usize)?.as_ref()
    }

    pub fn entry_mut(&mut self, place: u32) -> Option<&mut Entry<S>> {
        self.places.get_mut(place as usize)?.as_mut()
    }

    /// An empty place: one that has none, or that of the least recently used block without pins.
    /// `None` if all are pinned. The caller puts a block there before it asks again.
    pub fn vacate(&mut self) -> Option<Vacated<S>> {
        if let Some(place) = self.empty.pop() {
            return Some(Vacated { place, forgotten: None });
        }
        if self.places.len() < self.capacity() {
            self.places.push(None);
            return Some(Vacated { place: self.places.len() as u32 - 1, forgotten: None });
        }
        let (_, place) = self.idle.pop_first()?;
        let forgotten = self.places[place as usize].take().expect("idle places have a block");
        self.index.remove(&forgotten.name);
        self.touched(forgotten.name);
        Some(Vacated { place, forgotten: Some(forgotten) })
    }

    /// Puts a block with one pin into a place that [`vacate`](Self::vacate) gave.
    pub fn put(&mut self, place: u32, name: BlockHash, state: S) {
        self.uses += 1;
        let entry = Entry { name, state, pins: 1, used: self.uses };
        let before = self.places[place as usize].replace(entry);
        assert!(before.is_none(), "place {place} is taken");
        let twin = self.index.insert(name, place);
        assert!(twin.is_none(), "a name stands once on a shelf");
        self.touched(name);
    }

    /// Puts blocks where they were found, the least recently used first, on a shelf that is empty. Of
    /// blocks of one name or place the first stays; places beyond the capacity are left out.
    pub fn fill(&mut self, found: impl IntoIterator<Item = (u32, BlockHash, S)>) {
        assert!(self.places.is_empty(), "filled once, at the start");
        for (place, name, state) in found {
            if place >= self.capacity || self.index.contains_key(&name) {
                continue;
            }
            if self.places.len() <= place as usize {
                self.places.resize_with(place as usize + 1, || None);
            }
            if self.places[place as usize].is_none() {
                self.put(place, name, state);
                self.unpin(place);
            }
        }
        let is_empty = |place: &u32| self.places[*place as usize].is_none();
        self.empty = (0..self.places.len() as u32).rev().filter(is_empty).collect();
    }

    /// Empties a place, whatever pins it has.
    pub fn remove(&mut self, place: u32) -> Option<Entry<S>> {
        let entry = self.places.get_mut(place as usize)?.take()?;
        self.index.remove(&entry.name);
        self.idle.remove(&(entry.used, place));
        self.empty.push(place);
        self.touched(entry.name);
        Some(entry)
    }

    /// Makes the block the most recently used.
    pub fn touch(&mut self, place: u32) {
        let Some(entry) = self.places.get_mut(place as usize).and_then(Option::as_mut) else {
            return;
        };
        self.uses += 1;
        let before = std::mem::replace(&mut entry.used, self.uses);
        if self.idle.remove(&(before, place)) {
            self.idle.insert((self.uses, place));
        }
    }

    pub fn pin(&mut self, place: u32) {
        let entry = self.places[place as usize].as_mut().expect("only blocks are pinned");
        if entry.pins == 0 {
            self.idle.remove(&(entry.used, place));
        }
        entry.pins += 1;
    }

    pub fn unpin(&mut self, place: u32) {
        let entry = self.places[place as usize].as_mut().expect("only blocks are pinned");
        assert!(entry.pins > 0, "place {place} is not pinned");
        entry.pins -= 1;
        if entry.pins == 0 {
            self.idle.insert((entry.used, place));
        }
    }

    /// Blocks with pins.
    pub fn pinned(&self) -> usize {
        self.len() - self.idle.len()
    }
}
