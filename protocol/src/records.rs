//! Who is told of this node's record when, and what the others' records are.
//!
//! Each node tells every member by itself, one after the other, and gets the member's own record in
//! return: a record comes from its owner only, over a path that has proven who that is, so it needs no
//! signature and cannot outlive its owner. Who has heard the record as it is now is told no more until
//! it changes: in an idle mesh almost nothing is sent. A round through all members takes
//! [`RecordsConfig::round`], longer where that would be more than [`RecordsConfig::exchanges_per_s_max`]:
//! what a node sends for it does not grow with the mesh, the age of what it knows does. A change that
//! matters to routing (see [`RecordsInput::Own`]) is told at once.
//!
//! Who has lost a record (after a restart, a partition) has lost the member, too, tells it its own when
//! it is back, and so hears the other's. What no one has thought of is repaired by one exchange each
//! [`RecordsConfig::refresh`].
//!
//! Owns the order and the pace of exchanges and the newest record of each member, as bytes. Refuses IO
//! and the meaning of records.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use crate::{Duration, Instant, Machine, NodeId};

/// What an operator may set, and what a wrong value does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordsConfig {
    /// Unit: time in which every member is told once. Too small: traffic for nothing. Too large:
    /// routers work with old loads. Default 500 ms.
    pub round: Duration,
    /// Unit: exchanges that this node begins in a second. Formula: `members / round`. Too small: in
    /// large meshes records are old. Too large: a mesh of n nodes answers n times as many. Default 100.
    pub exchanges_per_s_max: u32,
    /// Unit: time for an exchange; then the next member is told. Too small: distant members are never
    /// told. Too large: members that went silent slow the round. Default 2 s.
    pub exchange_timeout: Duration,
    /// Unit: time between two exchanges while every member has heard this node's record as it is, each
    /// with the next member. Too small: bytes for nothing, about 600 for an exchange. Too large: if
    /// something was lost after all, it stays lost. Default 30 s.
    pub refresh: Duration,
}

impl Default for RecordsConfig {
    fn default() -> Self {
        RecordsConfig {
            round: Duration::from_millis(500),
            exchanges_per_s_max: 100,
            exchange_timeout: Duration::from_secs(2),
            refresh: Duration::from_secs(30),
        }
    }
}

/// What the shell tells the machine.
#[derive(Clone, Debug, PartialEq)]
pub enum RecordsInput {
    /// This node's record is now this one. `urgent`: everyone must know soon (a model became ready, the
    /// node drains), not only in its turn.
    Own { record: Vec<u8>, urgent: bool },
    /// A node is a member.
    Present { node: NodeId },
    /// A node is no member any more: its record goes.
    Gone { node: NodeId },
    /// A member's record, whoever began the exchange.
    Heard { node: NodeId, record: Vec<u8> },
    /// An exchange that this node began has ended. `told`: the member has answered, so it knows this
    /// node's record; otherwise it is tried again.
    Done { node: NodeId, told: bool },
    /// [`next_deadline`](Machine::next_deadline) has come.
    Timer,
}

/// What the shell must do.
#[derive(Clone, Debug, PartialEq)]
pub enum RecordsOutput {
    /// Give this node's record to the member and get its own; then say `Heard` and `Done`.
    Exchange { with: NodeId },
    /// A member has another record than before.
    Changed { node: NodeId, record: Vec<u8> },
    /// A member's record is gone with it.
    Dropped { node: NodeId },
}

/// See the module.
#[derive(Debug)]
pub struct Records {
    config: RecordsConfig,
    own: NodeId,
    record: Vec<u8>,
    members: BTreeMap<NodeId, Member>,
    /// Who was told last: the round goes on behind it.
    last: NodeId,
    /// Members that have not heard this node's record as it is now.
    due: BTreeSet<NodeId>,
    /// Members to tell at once, for an urgent change.
    urgent_left: usize,
    /// When the last exchange began.
    told_at: Instant,
    next: Option<Instant>,
}

#[derive(Debug, Default)]
struct Member {
    record: Option<Vec<u8>>,
    /// An exchange that this node began is under way until then at most, or has failed and is not
    /// tried again before.
    busy_until: Option<Instant>,
}

impl Records {
    pub fn new(own: NodeId, config: RecordsConfig) -> Self {
        Records {
            config,
            own,
            record: Vec::new(),
            members: BTreeMap::new(),
            // Every node begins behind itself: not all tell the same member first.
            last: own,
            due: BTreeSet::new(),
            urgent_left: 0,
            told_at: Instant::ORIGIN,
            next: None,
        }
    }

    /// This node's record, to be given in exchanges.
    pub fn record(&self) -> &[u8] {
        &self.record
    }

    /// Members whose records are known, in the order of their ids.
    pub fn known(&self) -> impl Iterator<Item = (NodeId, &[u8])> {
        self.members.iter().filter_map(|(id, m)| Some((*id, m.record.as_deref()?)))
    }

    /// Time from one exchange to the next.
    fn pace(&self) -> Duration {
        let fastest = Duration::from_secs(1) / self.config.exchanges_per_s_max.max(1);
        if self.urgent_left > 0 {
            return fastest;
        }
        let members = u32::try_from(self.members.len()).unwrap_or(u32::MAX).max(1);
        (self.config.round / members).max(fastest)
    }

    /// Somebody is to be told, as soon as the pace allows.
    fn hurry(&mut self, now: Instant) {
        let soonest = (self.told_at + self.pace()).max(now);
        self.next = Some(self.next.map_or(soonest, |next| next.min(soonest)));
    }

    fn reschedule(&mut self, now: Instant) {
        let wait = if self.due.is_empty() { self.config.refresh } else { self.pace() };
        self.next = (!self.members.is_empty()).then(|| now + wait);
    }

    /// Begins the exchange with the next member that has none under way: one that must be told, or
    /// any if there is none.
    fn tell_next(&mut self, now: Instant, out: &mut Vec<RecordsOutput>) {
        let behind = (Bound::Excluded(self.last), Bound::Unbounded);
        let upto = (Bound::Unbounded, Bound::Included(self.last));
        let idle = |id: &NodeId| {
            let member = self.members.get(id);
            member.is_some_and(|m| m.busy_until.is_none_or(|until| until <= now))
        };
        let found = if self.due.is_empty() {
            let all = self.members.range(behind).chain(self.members.range(upto));
            all.map(|(id, _)| *id).take(LOOK_MAX).find(idle)
        } else {
            let due = self.due.range(behind).chain(self.due.range(upto));
            due.copied().take(LOOK_MAX).find(idle)
        };
        if let Some(id) = found {
            self.last = id;
            self.due.remove(&id);
            self.urgent_left = self.urgent_left.saturating_sub(1).min(self.due.len());
            self.told_at = now;
            let member = self.members.get_mut(&id).expect("found among them");
            member.busy_until = Some(now + self.config.exchange_timeout);
            out.push(RecordsOutput::Exchange { with: id });
        }
    }
}

impl Machine for Records {
    type Input = RecordsInput;
    type Output = RecordsOutput;

    fn handle(&mut self, now: Instant, input: RecordsInput, out: &mut Vec<RecordsOutput>) {
        match input {
            RecordsInput::Own { record, urgent } => {
                let changed = self.record != record;
                self.record = record;
                if !changed || self.members.is_empty() {
                    return;
                }
                self.due = self.members.keys().copied().collect();
                if urgent {
                    self.urgent_left = self.due.len();
                }
                self.hurry(now);
            }
            RecordsInput::Present { node } => {
                if node == self.own || self.members.len() >= MEMBERS_MAX {
                    return;
                }
                if let Entry::Vacant(entry) = self.members.entry(node) {
                    entry.insert(Member::default());
                    self.due.insert(node);
                    self.hurry(now);
                }
            }
            RecordsInput::Gone { node } => {
                if self.members.remove(&node).is_some_and(|member| member.record.is_some()) {
                    out.push(RecordsOutput::Dropped { node });
                }
                self.due.remove(&node);
                self.urgent_left = self.urgent_left.min(self.due.len());
                if self.members.is_empty() {
                    self.next = None;
                }
            }
            RecordsInput::Heard { node, record } => {
                // Of who is no member nothing is kept: it would never be dropped.
                let Some(member) = self.members.get_mut(&node) else { return };
                if member.record.as_ref() != Some(&record) {
                    member.record = Some(record.clone());
                    out.push(RecordsOutput::Changed { node, record });
                }
            }
            RecordsInput::Done { node, told: true } => {
                if let Some(member) = self.members.get_mut(&node) {
                    member.busy_until = None;
                }
            }
            RecordsInput::Done { node, told: false } => {
                if self.members.contains_key(&node) {
                    self.due.insert(node);
                    self.hurry(now);
                }
            }
            RecordsInput::Timer => {
                if self.next.is_some_and(|next| next <= now) {
                    self.tell_next(now, out);
                    self.reschedule(now);
                }
            }
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.next
    }
}

/// Members whose records are kept; of more nothing is known here but that they are members.
pub const MEMBERS_MAX: usize = 16_384;

/// Members looked at for one that is idle; with more silent ones the turn is lost.
const LOOK_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    const fn node(n: u8) -> NodeId {
        NodeId([n; 32])
    }

    fn at(ms: u64) -> Instant {
        Instant::from_millis(ms)
    }

    /// Runs the machine until `end` and gives who was told when. Exchanges end at once and well, but for
    /// those with `silent`.
    fn run(records: &mut Records, from: u64, end: u64, silent: Option<NodeId>) -> Vec<(u64, u8)> {
        let mut told = Vec::new();
        let mut now = at(from);
        while let Some(next) = records.next_deadline().filter(|next| *next <= at(end)) {
            now = now.max(next);
            let mut out = Vec::new();
            records.handle(now, RecordsInput::Timer, &mut out);
            for output in out {
                let RecordsOutput::Exchange { with } = output else { panic!("{output:?}") };
                told.push((now.as_nanos() / 1_000_000, with.0[0]));
                let done = RecordsInput::Done { node: with, told: Some(with) != silent };
                records.handle(now, done, &mut Vec::new());
            }
        }
        told
    }

    fn with_members(own: u8, members: impl IntoIterator<Item = u8>) -> Records {
        let mut records = Records::new(node(own), RecordsConfig::default());
        for n in members {
            records.handle(at(0), RecordsInput::Present { node: node(n) }, &mut Vec::new());
        }
        records
    }

    /// Another record at that time.
    fn change(records: &mut Records, at_ms: u64, urgent: bool) {
        let record = at_ms.to_le_bytes().to_vec();
        let own = RecordsInput::Own { record, urgent };
        records.handle(at(at_ms), own, &mut Vec::new());
    }

    #[test]
    fn everyone_is_told_once_then_almost_nothing() {
        let mut records = with_members(3, [1, 2, 3, 4, 5]);
        let told = run(&mut records, 0, 99_000, None);
        let first = told.iter().take(4).map(|(_, who)| *who).collect::<Vec<_>>();
        assert_eq!(first, [4, 5, 1, 2]);
        assert!(told[3].0 <= 500, "{told:?}");
        // From then on one of them each half minute, in turn.
        let rest = told.iter().skip(4).map(|(_, who)| *who).collect::<Vec<_>>();
        assert_eq!(rest, [4, 5, 1], "{told:?}");
        // A member that comes is told at once, and nobody else.
        records.handle(at(99_100), RecordsInput::Present { node: node(9) }, &mut Vec::new());
        assert_eq!(run(&mut records, 99_100, 101_000, None), [(99_100, 9)]);
    }

    #[test]
    fn a_record_that_changes_is_told_in_rounds() {
        let mut records = with_members(3, [1, 2, 3, 4, 5]);
        run(&mut records, 0, 1_000, None);
        let mut told = Vec::new();
        for ms in (1_000..6_000).step_by(250) {
            change(&mut records, ms, false);
            told.extend(run(&mut records, ms, ms + 249, None));
        }
        for member in [1, 2, 4, 5] {
            let times = told.iter().filter(|(_, who)| *who == member).count();
            assert!((9..=11).contains(&times), "{member}: {told:?}");
        }
        // The last one has come to all.
        let rest = run(&mut records, 6_000, 7_000, None);
        assert!(rest.len() <= 4, "{rest:?}");
    }

    #[test]
    fn the_pace_does_not_grow_with_the_mesh() {
        for members in [100u8, 200, 250] {
            let mut records = with_members(0, 1..=members);
            let mut told = 0;
            for ms in (0..10_000).step_by(250) {
                change(&mut records, ms + 1, false);
                told += run(&mut records, ms, ms + 249, None).len();
            }
            assert!((980..=1001).contains(&told), "{members}: {told} in ten seconds");
        }
    }

    #[test]
    fn a_silent_member_does_not_hold_up_the_others() {
        let mut records = with_members(0, [1, 2, 3]);
        let mut told = Vec::new();
        for ms in (0..10_000).step_by(250) {
            change(&mut records, ms + 1, false);
            told.extend(run(&mut records, ms, ms + 249, Some(node(2))));
        }
        let count = |n| told.iter().filter(|(_, who)| *who == n).count();
        assert!(count(1) > 15 && count(3) > 15, "{told:?}");
        assert!((4..=6).contains(&count(2)), "again after each timeout only: {told:?}");
        // It is told in the end, when it answers.
        let late = run(&mut records, 10_000, 13_000, None);
        assert_eq!(late.iter().filter(|(_, who)| *who == 2).count(), 1, "{late:?}");
    }

    #[test]
    fn an_urgent_change_is_told_at_once() {
        let mut records = with_members(0, [1, 2, 3]);
        run(&mut records, 0, 2_000, None);
        change(&mut records, 2_001, true);
        let told = run(&mut records, 2_001, 2_040, None);
        let mut who: Vec<u8> = told.iter().map(|(_, who)| *who).collect();
        who.sort_unstable();
        assert_eq!(who, [1, 2, 3], "{told:?}");
        // The same again is no change.
        let same = RecordsInput::Own { record: 2_001u64.to_le_bytes().to_vec(), urgent: true };
        records.handle(at(2_041), same, &mut Vec::new());
        assert_eq!(run(&mut records, 2_041, 2_600, None), []);
    }

    #[test]
    fn records_live_as_long_as_their_owners() {
        let mut records = with_members(0, [1, 2]);
        let mut out = Vec::new();
        let heard = |n, record: &[u8]| RecordsInput::Heard { node: node(n), record: record.into() };
        records.handle(at(1), heard(1, b"a"), &mut out);
        records.handle(at(2), heard(1, b"a"), &mut out);
        records.handle(at(3), heard(1, b"b"), &mut out);
        records.handle(at(4), heard(9, b"x"), &mut out);
        let changed =
            |record: &[u8]| RecordsOutput::Changed { node: node(1), record: record.into() };
        assert_eq!(out, [changed(b"a"), changed(b"b")]);
        assert_eq!(records.known().collect::<Vec<_>>(), [(node(1), &b"b"[..])]);
        out.clear();
        for n in [1, 2, 9] {
            records.handle(at(5), RecordsInput::Gone { node: node(n) }, &mut out);
        }
        assert_eq!(out, [RecordsOutput::Dropped { node: node(1) }]);
        assert_eq!(records.next_deadline(), None);
    }
}
