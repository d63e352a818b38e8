//! Spread of node records: each is written by its owner alone, everyone else only passes it on.
//!
//! Class **local**: of each owner the newest (incarnation, version) wins, and its record is dropped
//! when it departs. Owns: who has which version, what is sent to whom and when. Refuses: the content
//! (opaque bytes, see [`node_record`](crate::node_record)), signatures (a [`Check`] given to it
//! judges them), who is a member (the shell passes on what membership says).
//!
//! Fresh records go to a few random members at once and from there on, within a budget of bytes;
//! anti-entropy compares a slice of all versions with a random member now and then, so that what the
//! budget did not carry arrives later. Cost for a node is bounded by the budget, whatever the number
//! of members; what grows is the age of what it knows. In a partition each side keeps the last records
//! of those that it still holds for present.

mod spread;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use bincode::{Decode, Encode};

use crate::membership::Identity;
use crate::random::Random;
use crate::{Duration, Instant, Machine};

/// A record as it travels.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Record<I> {
    pub owner: I,
    /// Of the owner's membership when it wrote the record.
    pub incarnation: u64,
    /// Grows with each change within one incarnation.
    pub version: u32,
    /// Content and signature, at most [`PAYLOAD_BYTES_MAX`].
    pub payload: Vec<u8>,
}

impl<I> Record<I> {
    fn age(&self) -> (u64, u32) {
        (self.incarnation, self.version)
    }
}

/// What travels between two nodes, over a stream: at most [`MESSAGE_BYTES_MAX`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Message<I> {
    Records(Vec<Record<I>>),
    /// All versions that the sender has of the owners after `after` (from the lowest on, if none) up
    /// to the last one named, or to the highest if `to_end`; in ascending order.
    Digest {
        after: Option<I>,
        to_end: bool,
        versions: Vec<(I, u64, u32)>,
    },
    Want(Vec<I>),
}

/// Whether a record was written by its owner: a signature over all its fields.
pub trait Check<I> {
    fn is_genuine(&self, record: &Record<I>) -> bool;
}

/// Configuration of [`Records`].
#[derive(Clone, Debug, PartialEq)]
pub struct RecordsConfig {
    /// Unit: members that a fresh record is sent to by each node that has just learnt it. Too small:
    /// many learn it by anti-entropy only. Too large: each gets it several times. Default 3.
    pub fanout: usize,
    /// Unit: time between two bursts of fresh records. Too small: small messages. Too large: the load
    /// that routers see is old. Default 200 ms.
    pub gossip_interval: Duration,
    /// Unit: time between two comparisons with a random member; each covers [`DIGEST_ENTRIES_MAX`]
    /// owners. Too small: bytes for what all have. Too large: lost records arrive late. Default 2 s.
    pub sync_interval: Duration,
    /// Unit: bytes that this node sends a second, with as many in one burst. Records wait at it, the
    /// newest version replacing an older one. Formula: `members x bytes of a record x fanout / time
    /// between changes`. Too small: records are old in large meshes. Too large: they compete with
    /// requests. Default 256 KiB.
    pub bytes_per_s_max: u64,
}

impl Default for RecordsConfig {
    fn default() -> Self {
        RecordsConfig {
            fanout: 3,
            gossip_interval: Duration::from_millis(200),
            sync_interval: Duration::from_secs(2),
            bytes_per_s_max: 256 << 10,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum RecordsInput<I> {
    /// This node's own record, new or changed. The machine numbers its versions; the payload is
    /// signed for exactly the version that [`Records::next_version`] names.
    Publish {
        incarnation: u64,
        payload: Vec<u8>,
    },
    /// Membership: it is there, or there again.
    Present(I),
    /// Membership: it is dead, left or forgotten.
    Departed(I),
    /// A message from a member whose identity the transport has proven.
    Message {
        from: I,
        bytes: Vec<u8>,
    },
    Timer,
}

#[derive(Clone, Debug, PartialEq)]
pub enum RecordsOutput<I> {
    Send {
        to: I,
        bytes: Vec<u8>,
    },
    /// A newer record of that owner is there.
    Changed(I),
    /// Its record is gone with it.
    Dropped(I),
}

/// Counters since the start, and gauges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecordsStats {
    pub records: usize,
    /// Records waiting to be passed on.
    pub fresh: usize,
    pub messages_in: u64,
    pub bytes_in: u64,
    pub messages_out: u64,
    pub bytes_out: u64,
    pub accepted: u64,
    /// Older than, or as old as, what was there.
    pub stale: u64,
    /// Messages that could not be read.
    pub malformed: u64,
    /// Records whose signature is not their owner's.
    pub forged: u64,
    /// Records of owners that are no members.
    pub strangers: u64,
    /// Messages not sent for want of budget.
    pub deferred: u64,
}

/// All records that one node knows, its own included. At most one for each present member.
#[derive(Debug)]
pub struct Records<I, V> {
    config: RecordsConfig,
    id: I,
    check: V,
    random: Random,
    members: BTreeSet<I>,
    records: BTreeMap<I, Record<I>>,
    /// Owners whose record is to be passed on.
    fresh: BTreeSet<I>,
    /// After which owner the next comparison begins.
    cursor: Option<I>,
    next_gossip: Instant,
    next_sync: Instant,
    budget: u64,
    budget_at: Instant,
    stats: RecordsStats,
}

impl<I: Identity, V: Check<I>> Records<I, V> {
    /// Of a node that knows nobody yet.
    pub fn new(config: RecordsConfig, id: I, check: V, now: Instant, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let share = random.unit();
        Records {
            id,
            check,
            random,
            members: BTreeSet::new(),
            records: BTreeMap::new(),
            fresh: BTreeSet::new(),
            cursor: None,
            next_gossip: now + config.gossip_interval.mul_f64(share),
            next_sync: now + config.sync_interval.mul_f64(share),
            budget: config.bytes_per_s_max,
            budget_at: now,
            config,
            stats: RecordsStats::default(),
        }
    }

    /// The newest record of an owner.
    pub fn record(&self, owner: &I) -> Option<&Record<I>> {
        self.records.get(owner)
    }

    /// All records in order of owners.
    pub fn iter(&self) -> impl Iterator<Item = &Record<I>> {
        self.records.values()
    }

    /// The version that the next [`RecordsInput::Publish`] in this incarnation will have.
    pub fn next_version(&self, incarnation: u64) -> u32 {
        match self.records.get(&self.id) {
            Some(own) if own.incarnation == incarnation => own.version.saturating_add(1),
            _ => 0,
        }
    }

    pub fn stats(&self) -> RecordsStats {
        RecordsStats { records: self.records.len(), fresh: self.fresh.len(), ..self.stats }
    }

    fn publish(&mut self, incarnation: u64, payload: Vec<u8>) {
        let version = self.next_version(incarnation);
        let record = Record { owner: self.id, incarnation, version, payload };
        self.records.insert(self.id, record);
        self.fresh.insert(self.id);
    }

    fn departed(&mut self, id: I, out: &mut Vec<RecordsOutput<I>>) {
        self.members.remove(&id);
        self.fresh.remove(&id);
        if id != self.id && self.records.remove(&id).is_some() {
            out.push(RecordsOutput::Dropped(id));
        }
    }

    /// Takes in a record if it is genuine and newer than what is there.
    fn accept(&mut self, record: Record<I>, out: &mut Vec<RecordsOutput<I>>) {
        if record.owner == self.id {
            // Only this node writes it; after a restart its higher incarnation wins.
            self.stats.stale += 1;
        } else if !self.members.contains(&record.owner) {
            self.stats.strangers += 1;
        } else if self.records.get(&record.owner).is_some_and(|r| r.age() >= record.age()) {
            self.stats.stale += 1;
        } else if record.payload.len() > PAYLOAD_BYTES_MAX || !self.check.is_genuine(&record) {
            self.stats.forged += 1;
        } else {
            self.stats.accepted += 1;
            let owner = record.owner;
            self.records.insert(owner, record);
            self.fresh.insert(owner);
            out.push(RecordsOutput::Changed(owner));
        }
    }
}

impl<I: Identity, V: Check<I>> Machine for Records<I, V> {
    type Input = RecordsInput<I>;
    type Output = RecordsOutput<I>;

    fn handle(&mut self, now: Instant, input: RecordsInput<I>, out: &mut Vec<RecordsOutput<I>>) {
        match input {
            RecordsInput::Publish { incarnation, payload } => self.publish(incarnation, payload),
            RecordsInput::Present(id) => {
                if id != self.id {
                    self.members.insert(id);
                }
            }
            RecordsInput::Departed(id) => self.departed(id, out),
            RecordsInput::Message { from, bytes } => self.receive(now, from, &bytes, out),
            RecordsInput::Timer => self.run_timers(now, out),
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        // Without anyone to talk to there is nothing to do.
        (!self.members.is_empty()).then(|| match self.fresh.is_empty() {
            true => self.next_sync,
            false => self.next_sync.min(self.next_gossip),
        })
    }
}

/// Content and signature of one record.
pub const PAYLOAD_BYTES_MAX: usize = 2048;
/// One message.
pub const MESSAGE_BYTES_MAX: usize = 16 << 10;
/// Versions in one comparison.
pub const DIGEST_ENTRIES_MAX: usize = 256;
