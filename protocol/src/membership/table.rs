//! The view: every member that this node knows, present or departed.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};

use super::message::{Contact, Identity, MemberState};
use super::wire::BUCKETS;
use crate::random::{Random, mix};
use crate::{Duration, Instant};

/// Index of a slot. Stable for as long as the member is remembered.
pub(super) type Slot = u32;

#[derive(Clone, Debug)]
pub(super) struct Member<I, C> {
    pub id: I,
    pub contact: C,
    pub incarnation: u64,
    pub since: Instant,
    pub version: u32,
    /// Largest recent round trip in units of 100 µs, 0 if none was measured.
    pub rtt: u16,
    pub state: MemberState,
    pub relayed: bool,
    /// Its address and record version belong to its incarnation. Not so after a datagram that showed a
    /// higher incarnation and nothing else.
    pub introduced: bool,
}

/// Members by slot, with an index by identity, the order of probing, the list of the departed and the
/// hashes that anti-entropy compares. Bounded by `capacity`.
#[derive(Debug)]
pub(super) struct Table<I, C> {
    slots: Vec<Option<Member<I, C>>>,
    free: Vec<Slot>,
    index: HashMap<I, Slot, Seeded>,
    /// Present members; those before `cursor` have had their turn.
    order: Vec<Slot>,
    cursor: usize,
    /// What [`follower`](Table::follower) found last; None after a change that may have brought a
    /// nearer one.
    follower: Option<Slot>,
    departed: Vec<Slot>,
    buckets: [u32; BUCKETS],
    capacity: usize,
}

impl<I: Identity, C: Contact> Table<I, C> {
    pub fn new(capacity: usize, seed: u64) -> Self {
        Table {
            slots: Vec::new(),
            free: Vec::new(),
            index: HashMap::with_hasher(Seeded(seed)),
            order: Vec::new(),
            cursor: 0,
            follower: None,
            departed: Vec::new(),
            buckets: [0; BUCKETS],
            capacity,
        }
    }

    /// Makes room for that many newcomers and no more.
    pub fn reserve_exact(&mut self, members: usize) {
        self.slots.reserve_exact(members);
        self.order.reserve_exact(members);
        self.index.reserve(members);
    }

    pub fn find(&self, id: &I) -> Option<Slot> {
        self.index.get(id).copied()
    }

    pub fn get(&self, slot: Slot) -> &Member<I, C> {
        self.slots[slot as usize].as_ref().expect("slots in use are handed out only")
    }

    pub fn get_mut(&mut self, slot: Slot) -> &mut Member<I, C> {
        self.slots[slot as usize].as_mut().expect("slots in use are handed out only")
    }

    pub fn iter(&self) -> impl Iterator<Item = (Slot, &Member<I, C>)> {
        (0..).zip(&self.slots).filter_map(|(slot, member)| Some((slot, member.as_ref()?)))
    }

    /// Present members; this node is not among them.
    pub fn present(&self) -> usize {
        self.order.len()
    }

    pub fn departed(&self) -> &[Slot] {
        &self.departed
    }

    /// Whether a newcomer needs the place of a departed member.
    pub fn is_full(&self) -> bool {
        self.index.len() >= self.capacity
    }

    /// A newcomer, at a random place among those whose turn to be probed is still to come.
    pub fn insert(&mut self, member: Member<I, C>, random: &mut Random) -> Slot {
        debug_assert!(member.state.is_present() && !self.index.contains_key(&member.id));
        let id = member.id;
        self.toggle(&id, member.incarnation, member.version);
        let slot = match self.free.pop() {
            Some(slot) => {
                self.slots[slot as usize] = Some(member);
                slot
            }
            None => {
                self.slots.push(Some(member));
                (self.slots.len() - 1) as Slot
            }
        };
        self.index.insert(id, slot);
        self.enter_order(slot, random);
        slot
    }

    /// Replaces incarnation and version of a present member.
    pub fn advance(&mut self, slot: Slot, incarnation: u64, version: u32) {
        let member = self.get_mut(slot);
        debug_assert!(member.state.is_present());
        let (id, before) = (member.id, (member.incarnation, member.version));
        (member.incarnation, member.version) = (incarnation, version);
        // A suspect that refutes is back on the ring.
        self.follower = None;
        self.toggle(&id, before.0, before.1);
        self.toggle(&id, incarnation, version);
    }

    /// From present to dead or left, at that incarnation.
    pub fn depart(&mut self, slot: Slot, state: MemberState, incarnation: u64, now: Instant) {
        let member = self.get_mut(slot);
        debug_assert!(member.state.is_present() && !state.is_present());
        let (id, before, version) = (member.id, member.incarnation, member.version);
        (member.state, member.incarnation, member.since) = (state, incarnation, now);
        self.toggle(&id, before, version);
        self.leave_order(slot);
        self.departed.push(slot);
    }

    /// From departed to alive.
    pub fn restore(&mut self, slot: Slot, incarnation: u64, now: Instant, random: &mut Random) {
        let member = self.get_mut(slot);
        debug_assert!(!member.state.is_present());
        (member.state, member.incarnation, member.since) = (MemberState::Alive, incarnation, now);
        let (id, version) = (member.id, member.version);
        self.toggle(&id, incarnation, version);
        let place = self.departed.iter().position(|s| *s == slot).expect("departed are listed");
        self.departed.swap_remove(place);
        self.enter_order(slot, random);
    }

    /// Forgets a departed member; its slot is used again.
    pub fn forget(&mut self, slot: Slot) -> I {
        let member = self.slots[slot as usize].take().expect("slots in use are handed out only");
        debug_assert!(!member.state.is_present());
        self.index.remove(&member.id);
        self.departed.retain(|s| *s != slot);
        self.free.push(slot);
        member.id
    }

    /// The departed member that has been gone for the longest, and since when.
    pub fn longest_departed(&self) -> Option<(Instant, Slot)> {
        self.departed.iter().map(|s| (self.get(*s).since, *s)).min()
    }

    /// Departed members gone for longer than that.
    pub fn departed_for(&self, age: Duration, now: Instant) -> Vec<Slot> {
        let old = |slot: &Slot| now - self.get(*slot).since > age;
        self.departed.iter().copied().filter(old).collect()
    }

    /// The next in turn to be probed: round-robin over a shuffled list, so that everyone's turn comes
    /// within one round (SWIM, Das et al. 2002, section 4.3).
    pub fn next_in_turn(&mut self, random: &mut Random) -> Option<Slot> {
        if self.cursor >= self.order.len() {
            random.shuffle(&mut self.order);
            self.cursor = 0;
        }
        let slot = *self.order.get(self.cursor)?;
        self.cursor += 1;
        Some(slot)
    }

    /// The alive member whose digest follows `digest` on the ring of all digests. The ring is walked
    /// only after something came that may be nearer, or the last answer is alive no more.
    pub fn follower(&mut self, digest: u64) -> Option<Slot> {
        let is_alive = |m: &Member<I, C>| m.state == MemberState::Alive;
        let last = self.follower.filter(|s| self.slots[*s as usize].as_ref().is_some_and(is_alive));
        if last.is_none() {
            let distance = |slot: &Slot| self.get(*slot).id.digest().wrapping_sub(digest);
            let alive = self.order.iter().filter(|slot| is_alive(self.get(**slot)));
            self.follower = alive.copied().min_by_key(distance);
        }
        self.follower
    }

    /// A random present member.
    pub fn any(&self, random: &mut Random) -> Option<Slot> {
        self.order.get(random.below(self.order.len())).copied()
    }

    /// Up to `count` different random present members, none of them `except`.
    pub fn some(&self, count: usize, except: Option<Slot>, random: &mut Random) -> Vec<Slot> {
        let mut chosen = Vec::with_capacity(count);
        // A few more draws than needed: in a small mesh most of them repeat.
        for _ in 0..4 * count + 4 {
            let Some(slot) = self.any(random) else { break };
            if chosen.len() == count {
                break;
            }
            if Some(slot) != except && !chosen.contains(&slot) {
                chosen.push(slot);
            }
        }
        chosen
    }

    pub fn buckets(&self) -> &[u32; BUCKETS] {
        &self.buckets
    }

    /// The whole view in one number.
    pub fn root(&self) -> u64 {
        self.buckets
            .iter()
            .fold(0, |root, bucket| mix(root ^ u64::from(*bucket)).wrapping_add(root))
    }

    /// Adds a present member to its bucket's hash, or takes it out again.
    pub fn toggle(&mut self, id: &I, incarnation: u64, version: u32) {
        let digest = id.digest();
        let entry = mix(digest ^ mix(incarnation ^ (u64::from(version) << 32)));
        self.buckets[bucket_of(digest)] ^= (entry >> 32) as u32;
    }

    fn enter_order(&mut self, slot: Slot, random: &mut Random) {
        self.follower = None;
        self.order.push(slot);
        let last = self.order.len() - 1;
        let place = self.cursor + random.below(last + 1 - self.cursor);
        self.order.swap(place, last);
    }

    fn leave_order(&mut self, slot: Slot) {
        let mut place = self.order.iter().position(|s| *s == slot).expect("present are in order");
        if place < self.cursor {
            self.cursor -= 1;
            self.order.swap(place, self.cursor);
            place = self.cursor;
        }
        self.order.swap_remove(place);
    }
}

/// The bucket of an identity with that digest.
pub(super) fn bucket_of(digest: u64) -> usize {
    digest as usize % BUCKETS
}

/// A hash with a seed of this node's own, so that nobody can choose identities that collide here.
/// The map is never walked.
#[derive(Clone, Copy, Debug)]
struct Seeded(u64);

impl BuildHasher for Seeded {
    type Hasher = Seeded;

    fn build_hasher(&self) -> Seeded {
        *self
    }
}

impl Hasher for Seeded {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 = mix(self.0 ^ u64::from_le_bytes(word));
        }
    }

    fn write_u32(&mut self, word: u32) {
        self.0 = mix(self.0 ^ u64::from(word));
    }

    /// The length of an array says nothing.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}
