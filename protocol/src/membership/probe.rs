//! Probes: direct pings, pings through others, and pings for others.

use super::config::ATTEMPTS_LIMIT;
use super::message::{Contact, Identity};
use super::table::Slot;
use super::wire::{Body, Update};
use super::{Membership, Out, PROBES_MAX, RELAYS_MAX};
use crate::{Duration, Instant};

/// A probe in flight. Attempt `k` has the number `first + k` on the wire.
#[derive(Clone, Debug)]
pub(super) struct Probe {
    pub target: Slot,
    first: u32,
    attempt: u8,
    sent: [Instant; ATTEMPTS_LIMIT],
    pub deadline: Instant,
    /// Members asked in the second attempt, and those of them that said they are well.
    asked: u8,
    nacks: u8,
}

/// A ping on behalf of another.
#[derive(Clone, Debug)]
pub(super) struct Relay<I> {
    asker: I,
    asker_probe: u32,
    target: Slot,
    probe: u32,
    sent: Instant,
    pub deadline: Instant,
}

impl<I: Identity, C: Contact> Membership<I, C> {
    /// Begins to probe a present member, unless that is under way or too much is.
    pub(super) fn start_probe(&mut self, now: Instant, target: Slot, out: &mut Out<I, C>) {
        if self.probes.iter().any(|p| p.target == target) {
            return;
        }
        if self.probes.len() >= PROBES_MAX {
            self.stats.probes_skipped += 1;
            return;
        }
        self.stats.probes += 1;
        let first = self.next_probe;
        self.next_probe = first.wrapping_add(u32::from(self.config.probe_attempts));
        let sent = [now; ATTEMPTS_LIMIT];
        let probe = Probe { target, first, attempt: 0, sent, deadline: now, asked: 0, nacks: 0 };
        self.probes.push(probe);
        self.attempt(now, self.probes.len() - 1, out);
    }

    /// Sends the pings of the probe's current attempt.
    fn attempt(&mut self, now: Instant, index: usize, out: &mut Out<I, C>) {
        let Probe { target, first, attempt, .. } = self.probes[index];
        let number = first.wrapping_add(u32::from(attempt));
        let mut time = self.attempt_time(target);
        if attempt + 1 == self.config.probe_attempts {
            time *= 2;
        }
        let id = self.table.get(target).id;
        self.send_body(Some(target), id, Body::Ping { probe: number }, out);
        let mut asked = 0;
        if attempt > 0 {
            let count = self.config.indirect_probes;
            for helper in self.table.some(count, Some(target), &mut self.random) {
                let helper_id = self.table.get(helper).id;
                let body = Body::PingRequest { probe: number, target: id };
                self.send_body(Some(helper), helper_id, body, out);
                asked += 1;
            }
        }
        let probe = &mut self.probes[index];
        probe.sent[usize::from(attempt)] = now;
        probe.deadline = now + time;
        if attempt == 1 {
            probe.asked = asked;
        }
    }

    /// Moves probes whose attempt got no answer to the next one, or ends them.
    pub(super) fn run_probes(&mut self, now: Instant, out: &mut Out<I, C>) {
        let mut index = 0;
        while index < self.probes.len() {
            let probe = &mut self.probes[index];
            if probe.deadline > now {
                index += 1;
            } else if probe.attempt + 1 < self.config.probe_attempts {
                probe.attempt += 1;
                self.attempt(now, index, out);
                index += 1;
            } else {
                let probe = self.probes.swap_remove(index);
                self.probe_failed(now, &probe, out);
            }
        }
    }

    fn probe_failed(&mut self, now: Instant, probe: &Probe, out: &mut Out<I, C>) {
        self.stats.probes_failed += 1;
        // Lifeguard, section IV-A: helpers that say nothing at all speak against this node's own link.
        if probe.asked > 0 && probe.nacks * 2 < probe.asked {
            self.set_health(self.health + 1);
        }
        if self.table.get(probe.target).state.is_present() {
            self.suspect(now, probe.target, out);
        }
    }

    /// An answer to a probe or to a relayed ping, direct or not.
    pub(super) fn acked(&mut self, now: Instant, from: I, number: u32, out: &mut Out<I, C>) {
        if let Some(slot) = self.table.find(&from)
            && let Some(index) = self.relays.iter().position(|r| r.probe == number)
            && self.relays[index].target == slot
        {
            let relay = self.relays.swap_remove(index);
            self.measured(slot, now - relay.sent);
            self.send_to(relay.asker, Body::RelayedAck { probe: relay.asker_probe }, out);
            return;
        }
        let Some(index) = self.probe_of(number) else { return };
        let probe = &self.probes[index];
        let (target, sent) = (probe.target, probe.sent[number.wrapping_sub(probe.first) as usize]);
        if self.table.find(&from) == Some(target) {
            self.probes.swap_remove(index);
            self.measured(target, now - sent);
            self.set_health(self.health.saturating_sub(1));
        }
    }

    /// A helper says that the target has answered it.
    pub(super) fn relayed_ack(&mut self, number: u32) {
        if let Some(index) = self.probe_of(number).filter(|i| self.probes[*i].asked > 0) {
            self.probes.swap_remove(index);
            self.set_health(self.health.saturating_sub(1));
        }
    }

    /// A helper is well, but has not reached the target yet.
    pub(super) fn nacked(&mut self, number: u32) {
        if let Some(index) = self.probe_of(number) {
            let probe = &mut self.probes[index];
            if number == probe.first.wrapping_add(1) {
                probe.nacks = probe.nacks.saturating_add(1).min(probe.asked);
            }
        }
    }

    fn probe_of(&self, number: u32) -> Option<usize> {
        let ours = |p: &Probe| number.wrapping_sub(p.first) <= u32::from(p.attempt);
        self.probes.iter().position(ours)
    }

    /// Pings `target` for `asker`, and says so if no answer comes in time.
    pub(super) fn relay(
        &mut self,
        now: Instant,
        asker: I,
        asker_probe: u32,
        target: I,
        out: &mut Out<I, C>,
    ) {
        let known = self.table.find(&target).filter(|s| self.table.get(*s).state.is_present());
        let (Some(slot), true) = (known, self.relays.len() < RELAYS_MAX) else {
            self.stats.relays_refused += 1;
            self.send_to(asker, Body::Nack { probe: asker_probe }, out);
            return;
        };
        let probe = self.next_probe;
        self.next_probe = probe.wrapping_add(1);
        // Lifeguard: the nack must be there before the asker's own time is over.
        let deadline = now + self.attempt_time(slot) / u32::from(self.health + 1);
        let relay = Relay { asker, asker_probe, target: slot, probe, sent: now, deadline };
        self.relays.push(relay);
        self.send_body(Some(slot), target, Body::Ping { probe }, out);
    }

    pub(super) fn run_relays(&mut self, now: Instant, out: &mut Out<I, C>) {
        let mut index = 0;
        while index < self.relays.len() {
            if self.relays[index].deadline > now {
                index += 1;
                continue;
            }
            let relay = self.relays.swap_remove(index);
            self.send_to(relay.asker, Body::Nack { probe: relay.asker_probe }, out);
        }
    }

    /// Ends what is in flight for a member that departed.
    pub(super) fn drop_probes(&mut self, target: Slot) {
        self.probes.retain(|p| p.target != target);
        self.relays.retain(|r| r.target != target);
    }

    /// Time for one attempt: by the member's own round trips where known, multiplied by health, twice
    /// that over a relay.
    fn attempt_time(&self, target: Slot) -> Duration {
        let member = self.table.get(target);
        let rtt = match member.rtt {
            0 => self.rtt_peak,
            units => RTT_UNIT * u32::from(units),
        };
        let least = self.config.probe_timeout_min;
        let time = (rtt * 3 / 2 + least / 2).clamp(least, self.config.probe_timeout_max.max(least));
        time * (u32::from(self.health) + 1) * if member.relayed { 2 } else { 1 }
    }

    /// Peaks count at once and fade by an eighth with each smaller round trip.
    fn measured(&mut self, slot: Slot, rtt: Duration) {
        self.rtt_peak = rtt.max(self.rtt_peak - self.rtt_peak.saturating_sub(rtt) / 8);
        let units = (rtt.as_nanos() / RTT_UNIT.as_nanos()).clamp(1, u128::from(u16::MAX)) as u16;
        let member = self.table.get_mut(slot);
        member.rtt = units.max(member.rtt - member.rtt.saturating_sub(units) / 8);
    }

    /// One ping without consequences if it stays unanswered; any answer is direct contact.
    pub(super) fn ping_once(&mut self, slot: Slot, claim: Option<u64>, out: &mut Out<I, C>) {
        let probe = self.next_probe;
        self.next_probe = probe.wrapping_add(1);
        let id = self.table.get(slot).id;
        let claim = claim.map(|incarnation| Update::Dead { id, incarnation });
        self.send_with(Some(slot), id, Body::Ping { probe }, claim.into_iter().collect(), out);
    }
}

pub(super) const RTT_UNIT: Duration = Duration::from_micros(100);
