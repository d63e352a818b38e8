//! Datagrams: direct contact first, then the updates, then what is asked.

use super::message::{Contact, Identity};
use super::wire::{Body, Datagram, DatagramError, FLAG_UNKNOWN};
use super::{Membership, Out, Phase};
use crate::Instant;

/// Where an update comes from, which decides how far it is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// News, passed on from member to member.
    Gossip,
    /// The deliverer's whole state, perhaps old.
    Entries,
}

impl<I: Identity, C: Contact> Membership<I, C> {
    pub(super) fn receive(&mut self, now: Instant, from: I, bytes: &[u8], out: &mut Out<I, C>) {
        self.stats.datagrams_in += 1;
        self.stats.bytes_in += bytes.len() as u64;
        if from == self.id || self.phase != Phase::Running {
            return;
        }
        let datagram = match Datagram::<I, C>::decode(bytes) {
            Ok(datagram) => datagram,
            Err(DatagramError::Version(_)) => {
                self.stats.other_version += 1;
                return;
            }
            Err(_) => {
                self.stats.malformed += 1;
                return;
            }
        };
        let Datagram { flags, incarnation, body, updates, .. } = datagram;
        self.contacted(now, from, incarnation, out);
        let source = if body == Body::Entries { Source::Entries } else { Source::Gossip };
        let mut differs = false;
        for update in updates {
            differs |= self.learn(now, from, update, source, out);
        }
        if differs && source == Source::Entries {
            self.hunger(now);
        }
        let answered = self.answer(now, from, body, out);
        if flags & FLAG_UNKNOWN != 0 {
            self.introduce(from, out);
        }
        self.correct(from, incarnation, answered, out);
    }

    /// True if something was sent back.
    fn answer(&mut self, now: Instant, from: I, body: Body<I>, out: &mut Out<I, C>) -> bool {
        match body {
            Body::Gossip | Body::Entries => return false,
            Body::Ping { probe } => self.send_to(from, Body::Ack { probe }, out),
            Body::Ack { probe } => {
                self.acked(now, from, probe, out);
                return false;
            }
            Body::PingRequest { probe, target } => {
                self.relay(now, from, probe, target, out);
                return false;
            }
            Body::RelayedAck { probe } => {
                self.relayed_ack(probe);
                return false;
            }
            Body::Nack { probe } => {
                self.nacked(probe);
                return false;
            }
            Body::Sync { root, members } => return self.compare(now, from, root, members, out),
            Body::Digest { buckets } => return self.exchange(now, from, &buckets, out),
            Body::Want { buckets } => return self.send_entries(now, from, &buckets, out),
        }
        true
    }

    /// Tells the sender what is held true of it here, if it cannot know: it is held for departed, or it
    /// lags behind an incarnation of its own that it has forgotten with its disk.
    fn correct(&mut self, from: I, incarnation: u64, answered: bool, out: &mut Out<I, C>) {
        let Some(slot) = self.table.find(&from) else { return };
        let member = self.table.get(slot);
        if !member.state.is_present() {
            // An answer has said so already.
            if !answered {
                self.send_body(Some(slot), from, Body::Gossip, out);
            }
        } else if incarnation < member.incarnation {
            let update = self.update_of(slot);
            self.send_with(Some(slot), from, Body::Gossip, vec![update], out);
        }
    }
}
