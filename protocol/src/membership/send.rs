//! Datagrams out: a body, what the receiver must hear first, and as much news as fit.

use bincode::Encode;

use super::message::{Contact, Destination, Identity, MemberState, MembershipOutput};
use super::news::{TOPIC_SELF, Topic};
use super::table::Slot;
use super::wire::{
    ACCUSERS_MAX, BUCKETS, Body, DATAGRAM_BYTES_MAX, Datagram, FLAG_UNKNOWN, Update, VERSION,
};
use super::{Membership, Out};
use crate::Instant;
use crate::wire::encode;

impl<I: Identity, C: Contact> Membership<I, C> {
    /// To a peer that may be unknown here.
    pub(super) fn send_to(&mut self, to: I, body: Body<I>, out: &mut Out<I, C>) {
        self.send_body(self.table.find(&to), to, body, out);
    }

    pub(super) fn send_body(
        &mut self,
        slot: Option<Slot>,
        to: I,
        body: Body<I>,
        out: &mut Out<I, C>,
    ) {
        self.send_with(slot, to, body, Vec::new(), out);
    }

    /// `updates` first, then what is held against the receiver (Lifeguard's buddy system, also for
    /// the departed), then news.
    pub(super) fn send_with(
        &mut self,
        slot: Option<Slot>,
        to: I,
        body: Body<I>,
        mut updates: Vec<Update<I, C>>,
        out: &mut Out<I, C>,
    ) {
        if let Some(slot) = slot
            && self.table.get(slot).state != MemberState::Alive
        {
            updates.push(self.update_of(slot));
        }
        let used =
            HEADER_BYTES_MAX + body_bytes(&body) + updates.iter().map(bytes_of).sum::<usize>();
        self.add_news(slot, DATAGRAM_BYTES_MAX.saturating_sub(used), &mut updates);
        let known = slot.is_some_and(|slot| self.table.get(slot).introduced);
        let flags = if known { 0 } else { FLAG_UNKNOWN };
        self.push(Destination::Node(to), flags, body, updates, out);
    }

    pub(super) fn push(
        &mut self,
        to: Destination<I, C>,
        flags: u8,
        body: Body<I>,
        updates: Vec<Update<I, C>>,
        out: &mut Out<I, C>,
    ) {
        let incarnation = self.incarnation;
        let bytes = Datagram { version: VERSION, flags, incarnation, body, updates }.encode();
        debug_assert!(bytes.len() <= DATAGRAM_BYTES_MAX, "{} bytes", bytes.len());
        self.stats.datagrams_out += 1;
        self.stats.bytes_out += bytes.len() as u64;
        out.push(MembershipOutput::Send { to, bytes });
    }

    /// Adds the least-sent news that fit into `room` bytes.
    fn add_news(&mut self, to: Option<Slot>, mut room: usize, updates: &mut Vec<Update<I, C>>) {
        if self.news.len() == 0 {
            return;
        }
        let sends_max = self.config.sends_max(self.table.present() + 1);
        let mut misfits = 0;
        for topic in self.news.first(NEWS_PER_DATAGRAM_MAX) {
            // Its own state is no news to the receiver.
            if Some(topic) == to {
                continue;
            }
            let update = self.update_of(topic);
            let bytes = bytes_of(&update);
            if bytes <= room {
                room -= bytes;
                updates.push(update);
                self.news.sent(topic, sends_max);
            } else {
                misfits += 1;
                if misfits == MISFITS_MAX {
                    break;
                }
            }
        }
    }

    /// What is held true of a member, or of this node.
    pub(super) fn update_of(&self, topic: Topic) -> Update<I, C> {
        if topic == TOPIC_SELF {
            let (id, incarnation, version) = (self.id, self.incarnation, self.version);
            return Update::Alive { id, incarnation, version, contact: self.contact.clone() };
        }
        let member = self.table.get(topic);
        let (id, incarnation) = (member.id, member.incarnation);
        match (member.state, self.suspicions.get(topic)) {
            (MemberState::Suspect, Some(suspicion)) if suspicion.leaving => {
                Update::Left { id, incarnation }
            }
            (MemberState::Suspect, Some(suspicion)) => {
                let accusers = suspicion.accusers.iter().copied().take(ACCUSERS_MAX).collect();
                Update::Suspect { id, incarnation, accusers }
            }
            (MemberState::Dead, _) => Update::Dead { id, incarnation },
            (MemberState::Left, _) => Update::Left { id, incarnation },
            (MemberState::Alive | MemberState::Suspect, _) => {
                let (version, contact) = (member.version, member.contact.clone());
                Update::Alive { id, incarnation, version, contact }
            }
        }
    }

    /// Sees to it that fresh news leave soon, but not one by one.
    pub(super) fn gossip_soon(&mut self, now: Instant) {
        if self.timers.gossip.is_none() {
            let gap = self.timers.gossip_last + self.config.gossip_gap;
            self.timers.gossip = Some((now + GOSSIP_DELAY).max(gap));
        }
    }

    pub(super) fn run_gossip(&mut self, now: Instant, out: &mut Out<I, C>) {
        self.timers.gossip = None;
        self.timers.gossip_last = now;
        let count = self.config.gossip_fanout;
        for slot in self.table.some(count, None, &mut self.random) {
            if self.news.len() > 0 {
                let id = self.table.get(slot).id;
                self.send_body(Some(slot), id, Body::Gossip, out);
            }
        }
        if self.news.has_fresh() && self.table.present() > 0 {
            self.gossip_soon(now);
        }
    }

    pub(super) fn send_farewell(&mut self, out: &mut Out<I, C>) {
        let (id, incarnation) = (self.id, self.incarnation);
        for slot in self.table.some(FAREWELL_FANOUT, None, &mut self.random) {
            let to = Destination::Node(self.table.get(slot).id);
            self.push(to, 0, Body::Gossip, vec![Update::Left { id, incarnation }], out);
        }
    }
}

/// Bytes of an update on the wire.
pub(super) fn bytes_of<T: Encode>(update: &T) -> usize {
    encode(update).len()
}

fn body_bytes<I: Identity>(body: &Body<I>) -> usize {
    match body {
        Body::Gossip | Body::Entries => 0,
        Body::Digest { .. } => 4 * BUCKETS + 3,
        Body::PingRequest { target, .. } => 5 + bytes_of(target),
        _ => BUCKETS / 8,
    }
}

/// Version, flags, incarnation, tag of the body, number of updates.
pub(super) const HEADER_BYTES_MAX: usize = 1 + 1 + 9 + 1 + 3;
/// News looked at for one datagram; an update takes more than 33 bytes.
const NEWS_PER_DATAGRAM_MAX: usize = 40;
/// Updates that do not fit before a datagram is considered full.
const MISFITS_MAX: usize = 3;
/// Members that a leaving node tells at once.
const FAREWELL_FANOUT: usize = 16;
const GOSSIP_DELAY: crate::Duration = crate::Duration::from_millis(10);
