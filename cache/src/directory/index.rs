//! Names to holders: the table of one part.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};

use protocol::directory::ShortName;
use protocol::random::mix;

/// Which slot (a node, as the owner numbers them) has which names.
///
/// A name has one row of 24 bytes and one entry of 16 in a hash map; up to [`FEW`] holders lie in the row,
/// more in a bitmap beside it. A slot that dies is not searched for: it stops to be seen at once, and
/// [`sweep`](Self::sweep) removes it row by row before it is given out again.
#[derive(Debug)]
pub(super) struct Index {
    rows: Vec<Row>,
    free: Vec<u32>,
    by_name: HashMap<u64, u32, Seed>,
    alive: Slots,
    /// Dead, and being removed by the sweep that is under way.
    dying: Slots,
    /// Dead since that sweep began: for the next one.
    dead: Slots,
    /// The row that the sweep looks at next.
    swept: usize,
}

/// A node in an [`Index`].
pub(super) type Slot = u16;

/// A set of slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slots([u64; SLOTS / 64]);

#[derive(Debug)]
struct Row {
    name: u64,
    holders: Holders,
}

#[derive(Debug)]
enum Holders {
    Few { len: u8, slots: [Slot; FEW] },
    Many(Box<Slots>),
}

impl Index {
    /// `seed` is secret: members that chose names to collide would otherwise make every step slow.
    pub fn new(seed: u64) -> Self {
        Index {
            rows: Vec::new(),
            free: Vec::new(),
            by_name: HashMap::with_hasher(Seed(seed)),
            alive: Slots::NONE,
            dying: Slots::NONE,
            dead: Slots::NONE,
            swept: 0,
        }
    }

    /// Names that take room, those that only dead slots have included.
    pub fn names(&self) -> usize {
        self.by_name.len()
    }

    /// A slot that nobody has. `None` if all [`SLOTS`] are taken or not yet swept.
    pub fn take_slot(&mut self) -> Option<Slot> {
        let taken = self.alive.or(&self.dying).or(&self.dead);
        let slot = taken.first_missing()?;
        self.alive.add(slot);
        Some(slot)
    }

    /// From now on no query finds it.
    pub fn drop_slot(&mut self, slot: Slot) {
        self.alive.remove(slot);
        self.dead.add(slot);
    }

    /// Whether that is new. The slot is alive.
    pub fn insert(&mut self, name: ShortName, slot: Slot) -> bool {
        let name = name.number();
        if let Some(row) = self.by_name.get(&name) {
            return self.rows[*row as usize].holders.add(slot);
        }
        let row = Row { name, holders: Holders::one(slot) };
        let at = match self.free.pop() {
            Some(at) => {
                self.rows[at as usize] = row;
                at
            }
            None => {
                self.rows.push(row);
                u32::try_from(self.rows.len() - 1).expect("the owner bounds names")
            }
        };
        self.by_name.insert(name, at);
        true
    }

    /// Whether it was there.
    pub fn remove(&mut self, name: ShortName, slot: Slot) -> bool {
        let Some(&at) = self.by_name.get(&name.number()) else { return false };
        let holders = &mut self.rows[at as usize].holders;
        let was_there = holders.remove(slot);
        if holders.is_empty() {
            self.free_row(at);
        }
        was_there
    }

    /// Removes dead slots from up to `rows` rows. Whether more is to be done.
    pub fn sweep(&mut self, rows: usize) -> bool {
        if self.dying == Slots::NONE {
            (self.dying, self.dead, self.swept) = (self.dead, Slots::NONE, 0);
        }
        if self.dying == Slots::NONE {
            return false;
        }
        let end = (self.swept + rows).min(self.rows.len());
        for at in self.swept..end {
            let holders = &mut self.rows[at].holders;
            if !holders.is_empty() && holders.remove_all(&self.dying) && holders.is_empty() {
                self.free_row(at as u32);
            }
        }
        self.swept = end;
        if end == self.rows.len() {
            self.dying = Slots::NONE;
        }
        self.is_unswept()
    }

    pub fn is_unswept(&self) -> bool {
        self.dying != Slots::NONE || self.dead != Slots::NONE
    }

    /// The slots with the longest beginnings of `names`, the longest first, at most `n`. Equals come in
    /// an order that `turn` chooses: if all ask for one name, they shall not all go to one node.
    pub fn query(&self, names: &[ShortName], n: usize, turn: u64) -> Vec<(Slot, u32)> {
        let mut current = self.alive;
        let mut fallen: Vec<(u32, Slots)> = Vec::new();
        // Rows are looked up some at a time: the waits for memory overlap.
        let mut blocks = 0;
        'names: for some in names.chunks(LOOKUPS) {
            let mut rows = [None; LOOKUPS];
            for (row, name) in rows.iter_mut().zip(some) {
                *row = self.by_name.get(&name.number()).copied();
            }
            for row in &rows[..some.len()] {
                let next = match row {
                    Some(row) => self.rows[*row as usize].holders.among(&current),
                    None => Slots::NONE,
                };
                if next != current {
                    if blocks > 0 {
                        fallen.push((blocks, current.without(&next)));
                    }
                    current = next;
                    if current == Slots::NONE {
                        break 'names;
                    }
                }
                blocks += 1;
            }
        }
        if current != Slots::NONE && !names.is_empty() {
            fallen.push((names.len() as u32, current));
        }
        let longest_first = fallen.iter().rev();
        let each = longest_first
            .flat_map(|(blocks, set)| set.iter(set.at(turn)).map(move |slot| (slot, *blocks)));
        each.take(n).collect()
    }

    /// All names of a slot, in no useful order. Looks at every row: for inspection.
    pub fn names_of(&self, slot: Slot) -> impl Iterator<Item = ShortName> + '_ {
        let has = move |row: &&Row| row.holders.has(slot);
        self.rows.iter().filter(has).map(|row| ShortName::from_number(row.name))
    }

    fn free_row(&mut self, at: u32) {
        let row = &mut self.rows[at as usize];
        row.holders = Holders::NOBODY;
        self.by_name.remove(&row.name);
        self.free.push(at);
    }
}

impl Holders {
    const NOBODY: Holders = Holders::Few { len: 0, slots: [0; FEW] };

    fn one(slot: Slot) -> Self {
        let mut slots = [0; FEW];
        slots[0] = slot;
        Holders::Few { len: 1, slots }
    }

    fn few(&self) -> &[Slot] {
        match self {
            Holders::Few { len, slots } => &slots[..usize::from(*len)],
            Holders::Many(_) => &[],
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Holders::Few { len, .. } => *len == 0,
            Holders::Many(set) => **set == Slots::NONE,
        }
    }

    fn has(&self, slot: Slot) -> bool {
        match self {
            Holders::Few { .. } => self.few().contains(&slot),
            Holders::Many(set) => set.has(slot),
        }
    }

    fn add(&mut self, slot: Slot) -> bool {
        if self.has(slot) {
            return false;
        }
        match self {
            Holders::Few { len, slots } if usize::from(*len) < FEW => {
                slots[usize::from(*len)] = slot;
                *len += 1;
            }
            Holders::Few { slots, .. } => {
                let mut set = Slots::NONE;
                slots.iter().for_each(|slot| set.add(*slot));
                set.add(slot);
                *self = Holders::Many(Box::new(set));
            }
            Holders::Many(set) => set.add(slot),
        }
        true
    }

    fn remove(&mut self, slot: Slot) -> bool {
        let mut one = Slots::NONE;
        one.add(slot);
        self.remove_all(&one)
    }

    /// Whether one of them was there.
    fn remove_all(&mut self, gone: &Slots) -> bool {
        match self {
            Holders::Few { len, slots } => {
                let (before, mut kept) = (*len, 0);
                for at in 0..usize::from(before) {
                    if !gone.has(slots[at]) {
                        slots[kept] = slots[at];
                        kept += 1;
                    }
                }
                *len = kept as u8;
                *len < before
            }
            Holders::Many(set) => {
                let left = set.without(gone);
                let changes = left != **set;
                **set = left;
                // Well below the size at which it grew, so that one node cannot make it go to and fro.
                if changes && left.count() <= FEW / 2 {
                    let mut few = Holders::NOBODY;
                    left.iter(0).for_each(|slot| _ = few.add(slot));
                    *self = few;
                }
                changes
            }
        }
    }

    fn among(&self, set: &Slots) -> Slots {
        match self {
            Holders::Few { .. } => {
                let mut both = Slots::NONE;
                self.few().iter().filter(|slot| set.has(**slot)).for_each(|slot| both.add(*slot));
                both
            }
            Holders::Many(holders) => set.and(holders),
        }
    }
}

impl Slots {
    const NONE: Slots = Slots([0; SLOTS / 64]);

    fn has(&self, slot: Slot) -> bool {
        self.0[usize::from(slot) / 64] >> (slot % 64) & 1 == 1
    }

    fn add(&mut self, slot: Slot) {
        self.0[usize::from(slot) / 64] |= 1 << (slot % 64);
    }

    fn remove(&mut self, slot: Slot) {
        self.0[usize::from(slot) / 64] &= !(1 << (slot % 64));
    }

    fn and(&self, other: &Slots) -> Slots {
        Slots(std::array::from_fn(|i| self.0[i] & other.0[i]))
    }

    fn or(&self, other: &Slots) -> Slots {
        Slots(std::array::from_fn(|i| self.0[i] | other.0[i]))
    }

    fn without(&self, other: &Slots) -> Slots {
        Slots(std::array::from_fn(|i| self.0[i] & !other.0[i]))
    }

    fn count(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    fn first_missing(&self) -> Option<Slot> {
        let at = self.0.iter().position(|word| *word != u64::MAX)?;
        Some((at * 64) as Slot + self.0[at].trailing_ones() as Slot)
    }

    /// One of them, each as likely as the others if all turns are.
    fn at(&self, turn: u64) -> Slot {
        let nth = turn % self.count().max(1) as u64;
        self.iter(0).nth(nth as usize).unwrap_or(0)
    }

    /// Its slots, those from `first` on before the others.
    fn iter(&self, first: Slot) -> impl Iterator<Item = Slot> + '_ {
        let ascending = move |range: std::ops::Range<usize>| {
            range.flat_map(move |at| {
                let mut word = self.0[at];
                std::iter::from_fn(move || {
                    let bit = (word != 0).then(|| word.trailing_zeros())?;
                    word &= word - 1;
                    Some((at * 64) as Slot + bit as Slot)
                })
            })
        };
        let at = usize::from(first) / 64;
        // The word of `first` comes twice: its upper bits first, its lower ones last.
        ascending(at..SLOTS / 64)
            .filter(move |slot| *slot >= first)
            .chain(ascending(0..at + 1).filter(move |slot| *slot < first))
    }
}

/// Hashes names, which are hashes already, with a secret.
#[derive(Clone, Copy, Debug)]
struct Seed(u64);

struct NameHasher(u64);

impl BuildHasher for Seed {
    type Hasher = NameHasher;

    fn build_hasher(&self) -> NameHasher {
        NameHasher(self.0)
    }
}

impl Hasher for NameHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = mix(self.0 ^ word);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Nodes of one part, those included whose names are still being removed.
pub(super) const SLOTS: usize = 1024;
/// Names looked up before the first row is looked at.
const LOOKUPS: usize = 16;
/// Holders that a row has room for.
const FEW: usize = 7;

const _: () = assert!(size_of::<Row>() == 24);

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use protocol::random::Random;

    use super::*;

    fn name(n: u64) -> ShortName {
        ShortName::from_number(n)
    }

    fn index_of(holders: &[(u64, &[Slot])], slots: usize) -> Index {
        let mut index = Index::new(1);
        (0..slots).for_each(|slot| assert_eq!(index.take_slot(), Some(slot as Slot)));
        for (n, slots) in holders {
            slots.iter().for_each(|slot| assert!(index.insert(name(*n), *slot)));
        }
        index
    }

    #[test]
    fn the_longest_beginning_comes_first() {
        let index =
            index_of(&[(1, &[0, 1, 2, 3]), (2, &[1, 2, 3]), (3, &[2, 3, 4]), (4, &[4, 2])], 5);
        let names = [1, 2, 3, 4].map(name);
        let query = |names: &[ShortName], n| index.query(names, n, 0);
        // 4 has later blocks, but not the first.
        assert_eq!(query(&names, 9), [(2, 4), (3, 3), (1, 2), (0, 1)]);
        assert_eq!(query(&names, 2), [(2, 4), (3, 3)]);
        assert_eq!(query(&names[..3], 9), [(2, 3), (3, 3), (1, 2), (0, 1)]);
        assert_eq!(query(&names[2..], 9), [(2, 2), (4, 2), (3, 1)]);
        assert_eq!(query(&[name(9), name(1)], 9), []);
        assert_eq!(query(&[name(1), name(9)], 9), [(0, 1), (1, 1), (2, 1), (3, 1)]);
        assert_eq!(query(&[], 9).len(), 0);
    }

    #[test]
    fn equals_take_turns() {
        for all in [(0..200).collect::<Vec<Slot>>(), vec![3, 64, 199], vec![7]] {
            let index = index_of(&[(1, &all)], 200);
            for turn in [0, 1, 2, 63, 64, 130, 199, 200, u64::MAX] {
                let found = index.query(&[name(1)], 1000, turn);
                let slots: Vec<Slot> = found.iter().map(|f| f.0).collect();
                let start = (turn % all.len() as u64) as usize;
                assert_eq!(slots, [&all[start..], &all[..start]].concat(), "{turn}");
            }
        }
    }

    #[test]
    fn a_dead_slot_is_not_seen_and_not_given_out_before_it_is_swept() {
        let mut index = index_of(&[(1, &[0, 1]), (2, &[1]), (3, &[0])], 2);
        index.drop_slot(0);
        assert_eq!(index.query(&[name(1)], 9, 0), [(1, 1)]);
        assert_eq!(index.query(&[name(3)], 9, 0), []);
        assert_eq!(index.take_slot(), Some(2));
        assert!(index.sweep(2) && index.is_unswept());
        // Dies too late for the sweep that is under way.
        index.drop_slot(1);
        assert!(index.sweep(2));
        assert_eq!((index.names(), index.take_slot()), (2, Some(0)));
        assert!(index.query(&[name(3)], 9, 0).is_empty());
        assert!(!index.sweep(9) && !index.is_unswept());
        assert_eq!((index.names(), index.take_slot()), (0, Some(1)));
        assert!(!index.sweep(9));
    }

    #[test]
    fn all_slots() {
        let mut index = Index::new(1);
        for slot in 0..SLOTS {
            assert_eq!(index.take_slot(), Some(slot as Slot));
            assert!(index.insert(name(1), slot as Slot));
        }
        assert_eq!(index.take_slot(), None);
        assert_eq!(index.query(&[name(1)], 2 * SLOTS, 5).len(), SLOTS);
        index.drop_slot(77);
        assert_eq!(index.take_slot(), None);
        assert!(!index.sweep(1));
        assert_eq!(index.take_slot(), Some(77));
    }

    /// Against sets, with holders that go from few to many and back.
    #[test]
    fn equals_a_plain_model() {
        for seed in 0..20 {
            let mut random = Random::new(seed);
            let mut index = Index::new(seed);
            let mut model: BTreeMap<Slot, BTreeSet<u64>> = BTreeMap::new();
            for _ in 0..40 {
                model.insert(index.take_slot().expect("one is free"), BTreeSet::new());
            }
            for step in 0..6000 {
                let slots: Vec<Slot> = model.keys().copied().collect();
                let slot = slots[random.below(slots.len())];
                let (n, held) = (random.below(30) as u64, model.get_mut(&slot).expect("known"));
                // Tides: now most are stored, now most are removed.
                let stores = random.below(4) != 0;
                match random.below(200) {
                    0 => {
                        index.drop_slot(slot);
                        model.remove(&slot);
                        model.insert(index.take_slot().expect("one is free"), BTreeSet::new());
                    }
                    1..20 => _ = index.sweep(1 + random.below(40)),
                    _ if stores == (step / 1000 % 2 == 0) => {
                        assert_eq!(index.insert(name(n), slot), held.insert(n));
                    }
                    _ => assert_eq!(index.remove(name(n), slot), held.remove(&n)),
                }
                if step % 50 == 0 {
                    check(&index, &model, &mut random);
                }
            }
            while index.sweep(7) {}
            let names: BTreeSet<u64> = model.values().flatten().copied().collect();
            assert_eq!(index.names(), names.len());
        }
    }

    fn check(index: &Index, model: &BTreeMap<Slot, BTreeSet<u64>>, random: &mut Random) {
        let chain: Vec<u64> = (0..6).map(|_| random.below(30) as u64).collect();
        let names: Vec<ShortName> = chain.iter().copied().map(name).collect();
        let mut found = index.query(&names, SLOTS, random.next_u64());
        assert!(found.windows(2).all(|pair| pair[0].1 >= pair[1].1));
        found.sort_unstable();
        let length = |held: &BTreeSet<u64>| chain.iter().take_while(|n| held.contains(n)).count();
        let expected = model.iter().map(|(slot, held)| (*slot, length(held) as u32));
        assert_eq!(found, expected.filter(|(_, blocks)| *blocks > 0).collect::<Vec<_>>());
        for (slot, held) in model {
            let mut names: Vec<u64> = index.names_of(*slot).map(ShortName::number).collect();
            names.sort_unstable();
            assert_eq!(names, held.iter().copied().collect::<Vec<_>>());
        }
    }
}
