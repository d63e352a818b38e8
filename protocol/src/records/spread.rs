//! Messages between nodes: bursts of fresh records, comparisons, answers.

use std::ops::Bound;

use super::{
    Check, DIGEST_ENTRIES_MAX, MESSAGE_BYTES_MAX, Message, Record, Records, RecordsOutput,
};
use crate::Instant;
use crate::membership::Identity;
use crate::wire::{decode, encode};

type Out<I> = Vec<RecordsOutput<I>>;

impl<I: Identity, V: Check<I>> Records<I, V> {
    pub(super) fn receive(&mut self, now: Instant, from: I, bytes: &[u8], out: &mut Out<I>) {
        self.stats.messages_in += 1;
        self.stats.bytes_in += bytes.len() as u64;
        if bytes.len() > MESSAGE_BYTES_MAX {
            self.stats.malformed += 1;
            return;
        }
        match decode::<Message<I>, DECODE_BYTES_MAX>(bytes) {
            Ok(Message::Records(records)) => {
                records.into_iter().for_each(|record| self.accept(record, out));
            }
            Ok(Message::Digest { after, to_end, versions }) if is_sorted(after, &versions) => {
                self.compare(now, from, after, to_end, &versions, out);
            }
            Ok(Message::Want(owners)) if owners.len() <= DIGEST_ENTRIES_MAX => {
                self.send_records(now, from, owners, out);
            }
            _ => self.stats.malformed += 1,
        }
    }

    pub(super) fn run_timers(&mut self, now: Instant, out: &mut Out<I>) {
        if self.next_gossip <= now && !self.fresh.is_empty() {
            self.next_gossip = now + self.config.gossip_interval;
            self.gossip(now, out);
        }
        if self.next_sync <= now {
            self.next_sync = now + self.config.sync_interval;
            if let Some(peer) = self.any_member() {
                self.send_digest(now, peer, out);
            }
        }
    }

    /// Fresh records to a few, each record once to each of them.
    fn gossip(&mut self, now: Instant, out: &mut Out<I>) {
        let mut room = MESSAGE_BYTES_MAX - SLACK_BYTES;
        let mut records = Vec::new();
        for owner in &self.fresh {
            let record = &self.records[owner];
            let bytes = bytes_of(record);
            if bytes > room {
                break;
            }
            room -= bytes;
            records.push(record.clone());
        }
        let owners: Vec<_> = records.iter().map(|record| record.owner).collect();
        let bytes = encode(&Message::Records(records));
        let mut peers: Vec<I> = Vec::new();
        for _ in 0..self.config.fanout * 2 {
            let Some(peer) = self.any_member() else { break };
            if peers.len() < self.config.fanout && !peers.contains(&peer) {
                peers.push(peer);
            }
        }
        let mut sent = false;
        for peer in peers {
            sent |= self.send(now, peer, bytes.clone(), out);
        }
        if sent {
            owners.iter().for_each(|owner| {
                self.fresh.remove(owner);
            });
        }
    }

    fn send_digest(&mut self, now: Instant, peer: I, out: &mut Out<I>) {
        let after = self.cursor;
        let version = |record: &Record<I>| (record.owner, record.incarnation, record.version);
        let slice = self.records.range(beyond(after)).take(DIGEST_ENTRIES_MAX);
        let versions: Vec<_> = slice.map(|(_, record)| version(record)).collect();
        let to_end = versions.len() < DIGEST_ENTRIES_MAX;
        self.cursor = versions.last().map(|(owner, ..)| *owner).filter(|_| !to_end);
        self.send(now, peer, encode(&Message::Digest { after, to_end, versions }), out);
    }

    /// Sends what is newer here, asks for what is newer there.
    fn compare(
        &mut self,
        now: Instant,
        from: I,
        after: Option<I>,
        to_end: bool,
        versions: &[(I, u64, u32)],
        out: &mut Out<I>,
    ) {
        let last = versions.last().map(|(owner, ..)| *owner);
        let theirs = |owner: &I| {
            let place = versions.binary_search_by_key(owner, |(owner, ..)| *owner).ok()?;
            Some((versions[place].1, versions[place].2))
        };
        let slice = self.records.range(beyond(after));
        let newer = slice.take_while(|(owner, _)| to_end || Some(**owner) <= last);
        let newer = newer.filter(|(owner, record)| theirs(owner).is_none_or(|v| v < record.age()));
        let newer: Vec<_> = newer.map(|(owner, _)| *owner).take(DIGEST_ENTRIES_MAX).collect();
        let older = |(owner, incarnation, version): &&(I, u64, u32)| {
            let mine = self.records.get(owner).map(Record::age);
            self.members.contains(owner) && mine.is_none_or(|mine| mine < (*incarnation, *version))
        };
        let wanted: Vec<_> = versions.iter().filter(older).map(|(owner, ..)| *owner).collect();
        if !newer.is_empty() {
            self.send_records(now, from, newer, out);
        }
        if !wanted.is_empty() {
            self.send(now, from, encode(&Message::Want(wanted)), out);
        }
    }

    /// As many of them as the budget allows, in messages of bounded size.
    fn send_records(&mut self, now: Instant, to: I, owners: Vec<I>, out: &mut Out<I>) {
        let mut batch = Vec::new();
        let mut room = MESSAGE_BYTES_MAX - SLACK_BYTES;
        for owner in owners {
            let Some(record) = self.records.get(&owner) else { continue };
            let bytes = bytes_of(record);
            if bytes > room {
                let full = std::mem::take(&mut batch);
                if !self.send(now, to, encode(&Message::Records(full)), out) {
                    return;
                }
                room = MESSAGE_BYTES_MAX - SLACK_BYTES;
            }
            room -= bytes;
            batch.push(self.records[&owner].clone());
        }
        if !batch.is_empty() {
            self.send(now, to, encode(&Message::Records(batch)), out);
        }
    }

    /// False if the budget is used up.
    fn send(&mut self, now: Instant, to: I, bytes: Vec<u8>, out: &mut Out<I>) -> bool {
        let max = self.config.bytes_per_s_max;
        let elapsed = (now - self.budget_at).as_nanos().min(1_000_000_000) as u64;
        let earned = (u128::from(max) * u128::from(elapsed) / 1_000_000_000) as u64;
        if earned > 0 {
            self.budget = (self.budget + earned).min(max);
            self.budget_at = now;
        }
        if self.budget < bytes.len() as u64 {
            self.stats.deferred += 1;
            return false;
        }
        self.budget -= bytes.len() as u64;
        self.stats.messages_out += 1;
        self.stats.bytes_out += bytes.len() as u64;
        out.push(RecordsOutput::Send { to, bytes });
        true
    }

    fn any_member(&mut self) -> Option<I> {
        let place = self.random.below(self.members.len());
        self.members.iter().nth(place).copied()
    }
}

fn bytes_of<I: Identity>(record: &Record<I>) -> usize {
    encode(record).len()
}

/// Everything above that owner.
fn beyond<I>(after: Option<I>) -> (Bound<I>, Bound<I>) {
    (after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded)
}

fn is_sorted<I: Ord>(after: Option<I>, versions: &[(I, u64, u32)]) -> bool {
    versions.len() <= DIGEST_ENTRIES_MAX
        && versions.is_sorted_by(|a, b| a.0 < b.0)
        && versions.first().is_none_or(|(owner, ..)| after.is_none_or(|after| *owner > after))
}

/// Tag and length of a message.
const SLACK_BYTES: usize = 16;
/// Memory that a message may claim while it is decoded.
const DECODE_BYTES_MAX: usize = 128 << 10;
