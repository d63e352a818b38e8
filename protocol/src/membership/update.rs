//! What is believed of whom: joins, suspicions, refutations, departures, returns.

use super::message::{Contact, Identity, MemberState, MembershipEvent, MembershipOutput};
use super::news::{TOPIC_SELF, Topic};
use super::receive::Source;
use super::table::Slot;
use super::wire::{Body, INCARNATION_MAX, Update};
use super::{Membership, Out, VERIFICATIONS_MAX, newcomer};
use crate::Instant;

impl<I: Identity, C: Contact> Membership<I, C> {
    /// A datagram came from that member itself, with its incarnation.
    pub(super) fn contacted(
        &mut self,
        now: Instant,
        from: I,
        incarnation: u64,
        out: &mut Out<I, C>,
    ) {
        let Some(slot) = self.table.find(&from) else { return };
        let member = self.table.get(slot);
        if incarnation <= member.incarnation {
            return;
        }
        if member.state.is_present() {
            self.raise(now, slot, incarnation, out);
            self.tell(now, slot);
        } else {
            self.restore(now, slot, incarnation, None, out);
        }
    }

    /// Takes in one update. True if it changed the view.
    pub(super) fn learn(
        &mut self,
        now: Instant,
        from: I,
        update: Update<I, C>,
        source: Source,
        out: &mut Out<I, C>,
    ) -> bool {
        if update.id() == self.id {
            self.hear_of_self(now, from, &update, out);
            return false;
        }
        let slot = self.table.find(&update.id());
        if let Some(slot) = slot
            && update.id() != from
            && update.incarnation() > self.table.get(slot).incarnation + JUMP_MAX
        {
            self.stats.jumps_refused += 1;
            self.verify(now, slot, None);
            return false;
        }
        match (update, slot) {
            (Update::Alive { id, incarnation, version, contact }, slot) => {
                if !contact.is_valid() {
                    self.stats.malformed += 1;
                    return false;
                }
                let news = source == Source::Gossip;
                match slot {
                    Some(slot) => {
                        let direct = id == from;
                        let alive = (incarnation, version, contact);
                        self.hear_alive(now, slot, direct, alive, news, out)
                    }
                    None => {
                        let member = newcomer(now, id, contact, incarnation, version);
                        self.join(now, member, news || id == from, out)
                    }
                }
            }
            (_, None) => false,
            (Update::Suspect { incarnation, accusers, .. }, Some(slot)) => {
                self.hear_suspect(now, from, slot, incarnation, &accusers, out);
                false
            }
            (Update::Dead { incarnation, .. }, Some(slot)) => {
                self.hear_dead(now, from, slot, incarnation, source, out)
            }
            (Update::Left { id, incarnation }, Some(slot)) => {
                self.hear_left(now, slot, incarnation, id == from, source, out)
            }
        }
    }

    fn join(
        &mut self,
        now: Instant,
        member: super::table::Member<I, C>,
        news: bool,
        out: &mut Out<I, C>,
    ) -> bool {
        if self.table.is_full() {
            let Some((_, oldest)) = self.table.longest_departed() else {
                self.stats.members_refused += 1;
                return false;
            };
            self.forget(oldest, out);
        }
        let super::table::Member { id, incarnation, version, .. } = member;
        let contact = member.contact.clone();
        let slot = self.table.insert(member, &mut self.random);
        out.push(event(MembershipEvent::Joined { id, incarnation, contact, version }));
        if news {
            self.tell(now, slot);
        }
        true
    }

    fn hear_alive(
        &mut self,
        now: Instant,
        slot: Slot,
        direct: bool,
        (incarnation, version, contact): (u64, u32, C),
        news: bool,
        out: &mut Out<I, C>,
    ) -> bool {
        let member = self.table.get(slot);
        if member.state.is_present() {
            let introduces = incarnation == member.incarnation && !member.introduced;
            if !introduces && (incarnation, version) <= (member.incarnation, member.version) {
                return false;
            }
            self.renew(now, slot, incarnation, version, contact, out);
            if news {
                self.tell(now, slot);
            }
            return true;
        }
        if incarnation > member.incarnation {
            if direct {
                self.restore(now, slot, incarnation, Some((version, contact)), out);
                return true;
            }
            // Nobody brings back another: it must show itself. No ghosts.
            self.stats.ghosts_refused += 1;
            self.verify(now, slot, None);
        }
        false
    }

    /// A present member has shown a higher incarnation or a newer record.
    fn renew(
        &mut self,
        now: Instant,
        slot: Slot,
        incarnation: u64,
        version: u32,
        contact: C,
        out: &mut Out<I, C>,
    ) {
        let refuted = incarnation > self.table.get(slot).incarnation;
        self.table.advance(slot, incarnation, version);
        let member = self.table.get_mut(slot);
        (member.contact, member.introduced) = (contact.clone(), true);
        let id = member.id;
        if refuted && member.state == MemberState::Suspect {
            member.state = MemberState::Alive;
            member.since = now;
            if let Some(suspicion) = self.suspicions.end(slot) {
                for accuser in suspicion.first_hand {
                    self.damping.refuted(now, accuser);
                }
            }
            out.push(event(MembershipEvent::Refuted { id, incarnation }));
        } else {
            out.push(event(MembershipEvent::Changed { id, incarnation, contact, version }));
        }
    }

    /// A departed member has contacted this node with a higher incarnation.
    fn restore(
        &mut self,
        now: Instant,
        slot: Slot,
        incarnation: u64,
        news: Option<(u32, C)>,
        out: &mut Out<I, C>,
    ) {
        let member = self.table.get_mut(slot);
        member.introduced = news.is_some();
        if let Some((version, contact)) = news {
            (member.version, member.contact) = (version, contact);
        }
        let (id, version, contact) = (member.id, member.version, member.contact.clone());
        self.table.restore(slot, incarnation, now, &mut self.random);
        self.verifications.remove(&slot);
        self.stats.returns += 1;
        out.push(event(MembershipEvent::Returned { id, incarnation, contact, version }));
        self.tell(now, slot);
    }

    fn hear_suspect(
        &mut self,
        now: Instant,
        from: I,
        slot: Slot,
        incarnation: u64,
        accusers: &[I],
        out: &mut Out<I, C>,
    ) {
        let member = self.table.get(slot);
        if !member.state.is_present() {
            // Elsewhere it is still present, so it may have come back.
            if incarnation > member.incarnation {
                self.verify(now, slot, None);
            }
            return;
        }
        if incarnation < member.incarnation || from == member.id {
            return;
        }
        self.catch_up(now, slot, incarnation, out);
        for accuser in accusers {
            // Invented accusers count for nothing.
            if *accuser == self.id || self.table.find(accuser).is_some_and(|s| s != slot) {
                self.accuse(now, slot, *accuser, *accuser == from, out);
            }
        }
    }

    fn hear_dead(
        &mut self,
        now: Instant,
        from: I,
        slot: Slot,
        incarnation: u64,
        source: Source,
        out: &mut Out<I, C>,
    ) -> bool {
        let member = self.table.get(slot);
        if !member.state.is_present() || incarnation < member.incarnation || from == member.id {
            return false;
        }
        if source == Source::Entries {
            // An old belief of the deliverer, say from the other side of a partition. The member
            // shall hear of it and answer with a higher incarnation; if it is gone, probes will tell.
            self.verify(now, slot, Some(incarnation));
            return true;
        }
        self.catch_up(now, slot, incarnation, out);
        self.accuse(now, slot, from, true, out);
        let believed = self.suspicions.get(slot).is_some_and(|suspicion| {
            // Two others agree, or this node has seen it for itself.
            suspicion.own || suspicion.accusers.len() >= 2 && suspicion.accusers.contains(&from)
        });
        if believed {
            self.depart(now, slot, MemberState::Dead, incarnation, out);
        }
        believed
    }

    fn hear_left(
        &mut self,
        now: Instant,
        slot: Slot,
        incarnation: u64,
        direct: bool,
        source: Source,
        out: &mut Out<I, C>,
    ) -> bool {
        let member = self.table.get(slot);
        if !member.state.is_present() || incarnation < member.incarnation {
            return false;
        }
        if direct {
            self.depart(now, slot, MemberState::Left, incarnation, out);
        } else if source == Source::Entries {
            self.verify(now, slot, Some(incarnation));
        } else if !self.suspicions.get(slot).is_some_and(|s| s.leaving) {
            // Anyone can say so of anyone: it gets the time to contradict.
            self.catch_up(now, slot, incarnation, out);
            self.enter_suspicion(now, slot, self.id);
            self.suspicions.mark(slot, |suspicion| suspicion.leaving = true);
            self.suspicions.schedule(slot, &self.config, self.table.present() + 1);
            self.tell(now, slot);
        }
        true
    }

    /// Others know a higher incarnation of a present member than this node.
    fn catch_up(&mut self, now: Instant, slot: Slot, incarnation: u64, out: &mut Out<I, C>) {
        if incarnation > self.table.get(slot).incarnation {
            self.raise(now, slot, incarnation, out);
        }
    }

    /// A present member has a higher incarnation; whether also another address is not known yet.
    fn raise(&mut self, now: Instant, slot: Slot, incarnation: u64, out: &mut Out<I, C>) {
        let member = self.table.get(slot);
        let (version, contact) = (member.version, member.contact.clone());
        self.renew(now, slot, incarnation, version, contact, out);
        self.table.get_mut(slot).introduced = false;
    }

    /// This node's own probe of a member has failed.
    pub(super) fn suspect(&mut self, now: Instant, slot: Slot, out: &mut Out<I, C>) {
        let first = self.suspicions.get(slot).is_none();
        self.accuse(now, slot, self.id, false, out);
        self.suspicions.mark(slot, |suspicion| suspicion.own = true);
        if !first {
            return;
        }
        // Buddy system: the suspect first; then a few who shall see for themselves.
        let id = self.table.get(slot).id;
        self.send_body(Some(slot), id, Body::Gossip, out);
        let count = self.config.alarm_fanout;
        let alarm = self.update_of(slot);
        for witness in self.table.some(count, Some(slot), &mut self.random) {
            let id = self.table.get(witness).id;
            self.send_with(Some(witness), id, Body::Gossip, vec![alarm.clone()], out);
        }
    }

    fn accuse(
        &mut self,
        now: Instant,
        slot: Slot,
        accuser: I,
        first_hand: bool,
        out: &mut Out<I, C>,
    ) {
        if first_hand && self.damping.is_damped(now, &accuser) {
            self.stats.accusations_damped += 1;
            return;
        }
        let was_suspect = self.table.get(slot).state == MemberState::Suspect;
        if !self.enter_suspicion(now, slot, accuser) {
            return;
        }
        let mut accusers = 0;
        self.suspicions.mark(slot, |suspicion| {
            accusers = suspicion.accusers.len();
            if first_hand {
                suspicion.first_hand.push(accuser);
            }
        });
        self.suspicions.schedule(slot, &self.config, self.table.present() + 1);
        if !was_suspect {
            let member = self.table.get(slot);
            let (id, incarnation) = (member.id, member.incarnation);
            out.push(event(MembershipEvent::Suspected { id, incarnation }));
        }
        self.tell(now, slot);
        // Who hears it from the accuser itself looks for itself, until enough have.
        if first_hand && accusers <= self.config.confirmations_expected {
            self.start_probe(now, slot, out);
        }
    }

    fn enter_suspicion(&mut self, now: Instant, slot: Slot, accuser: I) -> bool {
        let member = self.table.get_mut(slot);
        if member.state == MemberState::Alive {
            (member.state, member.since) = (MemberState::Suspect, now);
        }
        self.suspicions.accuse(now, slot, accuser)
    }

    /// A present member is held for dead or left from now on.
    pub(super) fn depart(
        &mut self,
        now: Instant,
        slot: Slot,
        state: MemberState,
        incarnation: u64,
        out: &mut Out<I, C>,
    ) {
        self.suspicions.end(slot);
        self.drop_probes(slot);
        self.verifications.remove(&slot);
        self.table.depart(slot, state, incarnation, now);
        let id = self.table.get(slot).id;
        out.push(event(if state == MemberState::Left {
            MembershipEvent::Left { id, incarnation }
        } else {
            self.stats.deaths += 1;
            MembershipEvent::Died { id, incarnation }
        }));
        self.tell(now, slot);
    }

    pub(super) fn forget(&mut self, slot: Slot, out: &mut Out<I, C>) {
        self.news.remove(slot);
        self.verifications.remove(&slot);
        let id = self.table.forget(slot);
        out.push(event(MembershipEvent::Forgotten { id }));
    }

    /// Someone says something about this node. What is not so is answered, at once and to the teller,
    /// with a higher incarnation where needed.
    fn hear_of_self(&mut self, now: Instant, from: I, update: &Update<I, C>, out: &mut Out<I, C>) {
        let claimed = update.incarnation();
        if let Update::Alive { version, .. } = update {
            if (claimed, *version) <= (self.incarnation, self.version) {
                return;
            }
        } else if claimed >= self.incarnation {
            self.set_health(self.health + 1);
        }
        if claimed >= self.incarnation {
            // A forged claim must not use up the incarnations in one step.
            let next = (claimed + 1).min(self.incarnation + JUMP_MAX).min(INCARNATION_MAX);
            self.table.toggle(&self.id, self.incarnation, self.version);
            self.incarnation = next;
            self.table.toggle(&self.id, self.incarnation, self.version);
            self.stats.refutations += 1;
            out.push(MembershipOutput::Persist { incarnation: next });
            out.push(event(MembershipEvent::SelfRefuted { incarnation: next }));
            self.tell(now, TOPIC_SELF);
        }
        self.introduce(from, out);
    }

    /// Sends this node's own entry to a peer.
    pub(super) fn introduce(&mut self, to: I, out: &mut Out<I, C>) {
        let me = self.update_of(TOPIC_SELF);
        self.send_with(self.table.find(&to), to, Body::Gossip, vec![me], out);
    }

    /// Queues news and sees to it that they leave soon.
    pub(super) fn tell(&mut self, now: Instant, topic: Topic) {
        if self.news.push(topic) {
            self.stats.news_dropped += 1;
        }
        self.gossip_soon(now);
    }

    /// Queues a ping to a member of which others say what only direct contact can show.
    fn verify(&mut self, now: Instant, slot: Slot, claim: Option<u64>) {
        if self.verifications.len() >= VERIFICATIONS_MAX {
            return;
        }
        let entry = self.verifications.entry(slot).or_insert(claim);
        *entry = (*entry).max(claim);
        self.timers.verify.get_or_insert(now);
    }
}

fn event<I, C>(event: MembershipEvent<I, C>) -> MembershipOutput<I, C> {
    MembershipOutput::Event(event)
}

/// Incarnations by which a relayed claim may exceed what is known. A node's incarnation grows by one
/// with each false accusation.
const JUMP_MAX: u64 = 1 << 20;
