//! Comparison of views with a random member, and other ways back together: seeds, reconnection,
//! verification.
//!
//! Two views are compared by one number; if it differs, by 256 hashes; only the buckets that differ
//! are sent, both ways, a bounded number of datagrams each time. In a mesh at rest the cost does not
//! depend on its size. Joining is the same with an empty view.

use super::message::{Contact, Destination, Identity, MemberState};
use super::news::TOPIC_SELF;
use super::send::{HEADER_BYTES_MAX, bytes_of};
use super::table::bucket_of;
use super::wire::{BUCKETS, Body, DATAGRAM_BYTES_MAX};
use super::{Membership, Out};
use crate::{Duration, Instant};

/// Datagrams of anti-entropy that may be sent now: a token bucket.
#[derive(Debug)]
pub(super) struct Budget {
    per_s: u32,
    nanos: u64,
    at: Instant,
}

impl Budget {
    pub fn new(per_s: u32) -> Self {
        Budget { per_s, nanos: SECOND_NANOS, at: Instant::ORIGIN }
    }

    fn take(&mut self, now: Instant) -> bool {
        let elapsed = (now - self.at).as_nanos().min(u128::from(SECOND_NANOS)) as u64;
        self.nanos = (self.nanos + elapsed).min(SECOND_NANOS);
        self.at = now;
        let cost = SECOND_NANOS / u64::from(self.per_s);
        let granted = self.nanos >= cost;
        if granted {
            self.nanos -= cost;
        }
        granted
    }
}

impl<I: Identity, C: Contact> Membership<I, C> {
    pub(super) fn run_sync(&mut self, now: Instant, out: &mut Out<I, C>) {
        self.timers.sync = self.after(self.timers.sync, self.config.sync_interval, now);
        for slot in self.table.departed_for(self.config.departed_retention, now) {
            self.forget(slot, out);
        }
        if let Some(slot) = self.table.any(&mut self.random) {
            let to = Destination::Node(self.table.get(slot).id);
            self.begin_sync(to, out);
        }
    }

    /// Views differ somewhere: compare again soon, less and less so while that does not change this
    /// view. Members that cannot reach each other may differ for good.
    pub(super) fn hunger(&mut self, now: Instant) {
        let (root, wait) = (self.table.root(), self.hunger.1);
        let wait = match root == self.hunger.0 {
            true => (wait * 2).min(self.config.sync_interval),
            false => self.config.sync_hungry_interval,
        };
        self.hunger = (root, wait);
        let spread = 0.75 + self.random.unit() / 2.0;
        self.timers.sync = self.timers.sync.min(now + wait.mul_f64(spread));
    }

    fn begin_sync(&mut self, to: Destination<I, C>, out: &mut Out<I, C>) {
        self.stats.syncs += 1;
        let members = self.present() as u32;
        let body = Body::Sync { root: self.table.root(), members };
        let me = self.update_of(TOPIC_SELF);
        self.push(to, 0, body, vec![me], out);
    }

    /// Seeds: until one has answered, more and more slowly; then a random one every half minute, in a
    /// large mesh so much more rarely that all of them together do not trouble a seed more.
    pub(super) fn run_seeds(&mut self, now: Instant, out: &mut Out<I, C>) {
        let alone = self.table.present() == 0;
        let (wait, count) = if alone {
            let wait = self.timers.seed_backoff;
            self.timers.seed_backoff = (wait * 2).min(SEED_BACKOFF_MAX);
            (wait, SEEDS_AT_ONCE)
        } else {
            self.timers.seed_backoff = super::SEED_BACKOFF_MIN;
            let crowd = u32::try_from(self.present() / SEED_CROWD).unwrap_or(u32::MAX).max(1);
            (SEED_INTERVAL * crowd, 1)
        };
        self.timers.seed = now + wait.mul_f64(0.75 + self.random.unit() / 2.0);
        let first = self.random.below(self.seeds.len());
        for index in 0..count.min(self.seeds.len()) {
            let seed = self.seeds[(first + index) % self.seeds.len()].clone();
            if seed != self.contact {
                self.begin_sync(Destination::Seed(seed), out);
            }
        }
    }

    /// Answers a comparison. True if something was sent.
    pub(super) fn compare(
        &mut self,
        now: Instant,
        from: I,
        root: u64,
        members: u32,
        out: &mut Out<I, C>,
    ) -> bool {
        if root == self.table.root() {
            return false;
        }
        if !self.sync_budget.take(now) {
            self.stats.syncs_refused += 1;
            return false;
        }
        if (members as usize) * NEWCOMER_RATIO < self.present() {
            // A newcomer: some members to begin with, different ones for each, so that thousands can
            // join by one seed and go on among themselves.
            let start = self.random.below(BUCKETS);
            self.send_entries_from(now, from, start, &[255; BUCKETS / 8], NEWCOMER_DATAGRAMS, out);
        }
        let buckets = self.table.buckets().iter().flat_map(|b| b.to_le_bytes()).collect();
        self.push(Destination::Node(from), 0, Body::Digest { buckets }, Vec::new(), out);
        true
    }

    /// Answers the hashes of a peer: asks for the buckets that differ, and sends the own ones.
    pub(super) fn exchange(
        &mut self,
        now: Instant,
        from: I,
        theirs: &[u8],
        out: &mut Out<I, C>,
    ) -> bool {
        let mut buckets = [0; BUCKETS / 8];
        for (index, (mine, theirs)) in self.table.buckets().iter().zip(theirs.chunks(4)).enumerate()
        {
            if mine.to_le_bytes() != theirs {
                buckets[index / 8] |= 1 << (index % 8);
            }
        }
        if buckets == [0; BUCKETS / 8] {
            return false;
        }
        self.hunger(now);
        if !self.sync_budget.take(now) {
            self.stats.syncs_refused += 1;
            return false;
        }
        self.push(Destination::Node(from), 0, Body::Want { buckets }, Vec::new(), out);
        self.send_entries(now, from, &buckets, out);
        true
    }

    /// Sends the entries of these buckets. True if something was sent.
    pub(super) fn send_entries(
        &mut self,
        now: Instant,
        to: I,
        buckets: &[u8; BUCKETS / 8],
        out: &mut Out<I, C>,
    ) -> bool {
        let start = self.random.below(BUCKETS);
        self.send_entries_from(now, to, start, buckets, self.config.sync_datagrams_max, out)
    }

    /// From bucket `start` on, around, until `datagrams_max` are full: what did not fit has its chance
    /// the next time, when what was sent does not differ any more.
    fn send_entries_from(
        &mut self,
        now: Instant,
        to: I,
        start: usize,
        buckets: &[u8; BUCKETS / 8],
        datagrams_max: usize,
        out: &mut Out<I, C>,
    ) -> bool {
        let mut topics = Vec::new();
        let mut add = |id: &I, topic| {
            let bucket = bucket_of(id.digest());
            if buckets[bucket / 8] & (1 << (bucket % 8)) != 0 {
                topics.push(((bucket + BUCKETS - start) % BUCKETS, topic));
            }
        };
        add(&self.id, TOPIC_SELF);
        for (slot, member) in self.table.iter() {
            if member.id != to {
                add(&member.id, slot);
            }
        }
        topics.sort_unstable();
        let mut topics = topics.into_iter().map(|(_, topic)| topic).peekable();
        for sent in 0..datagrams_max {
            if topics.peek().is_none() || !self.sync_budget.take(now) {
                return sent > 0;
            }
            let mut updates = Vec::new();
            let mut room = DATAGRAM_BYTES_MAX - HEADER_BYTES_MAX;
            while let Some(topic) = topics.peek() {
                let update = self.update_of(*topic);
                let bytes = bytes_of(&update);
                if bytes > room {
                    break;
                }
                room -= bytes;
                updates.push(update);
                topics.next();
            }
            self.push(Destination::Node(to), 0, Body::Entries, updates, out);
        }
        true
    }

    /// Tries a random member that is held for dead: after a partition, this is how the sides meet.
    pub(super) fn reconnect(&mut self, out: &mut Out<I, C>) {
        let departed = self.table.departed();
        let Some(slot) = departed.get(self.random.below(departed.len())).copied() else { return };
        if self.table.get(slot).state == MemberState::Dead {
            self.ping_once(slot, None, out);
        }
    }

    pub(super) fn run_verifications(&mut self, now: Instant, out: &mut Out<I, C>) {
        let per_run = self.config.verifications_per_s_max / VERIFY_RUNS_PER_S;
        for _ in 0..per_run {
            let Some((slot, claim)) = self.verifications.pop_first() else { break };
            self.ping_once(slot, claim, out);
        }
        self.timers.verify = (!self.verifications.is_empty())
            .then(|| now + Duration::from_secs(1) / VERIFY_RUNS_PER_S);
    }
}

const SECOND_NANOS: u64 = 1_000_000_000;
const SEEDS_AT_ONCE: usize = 3;
const SEED_BACKOFF_MAX: Duration = Duration::from_secs(5);
const SEED_INTERVAL: Duration = Duration::from_secs(30);
/// Members of which one tries a seed each [`SEED_INTERVAL`].
const SEED_CROWD: usize = 32;
/// Who knows less than one in this many is a newcomer.
const NEWCOMER_RATIO: usize = 4;
const NEWCOMER_DATAGRAMS: usize = 2;
const VERIFY_RUNS_PER_S: u32 = 20;
