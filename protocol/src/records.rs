//! Who is told of this node's record when, and what the others' records are.
//!
//! Each node tells every member by itself, one after the other, and gets the member's own record in
//! return: a record comes from its owner only, over a path that has proven who that is, so it needs no
//! signature and cannot outlive its owner. A round through all members takes
//! [`RecordsConfig::round`], longer where that would be more than [`RecordsConfig::exchanges_per_s_max`]:
//! what a node sends for it does not grow with the mesh, the age of what it knows does. A change that
//! matters to routing (see [`RecordsInput::Own`]) begins a new round at once.
//!
//! Owns the order and the pace of exchanges and the newest record of each member, as bytes. Refuses IO
//! and the meaning of records.

use std::collections::BTreeMap;
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
}

impl Default for RecordsConfig {
    fn default() -> Self {
        RecordsConfig {
            round: Duration::from_millis(500),
            exchanges_per_s_max: 100,
            exchange_timeout: Duration::from_secs(2),
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
    /// An exchange that this node began has ended, well or not.
    Done { node: NodeId },
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
    /// Members to tell at once, for an urgent change.
    urgent_left: usize,
    next: Option<Instant>,
}

#[derive(Debug, Default)]
struct Member {
    record: Option<Vec<u8>>,
    /// An exchange that this node began is under way until then at most.
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
            urgent_left: 0,
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

    fn reschedule(&mut self, now: Instant) {
        self.next = (!self.members.is_empty()).then(|| now + self.pace());
    }

    /// Begins the exchange with the next member that has none under way.
    fn tell_next(&mut self, now: Instant, out: &mut Vec<RecordsOutput>) {
        let behind = (Bound::Excluded(self.last), Bound::Unbounded);
        let upto = (Bound::Unbounded, Bound::Included(self.last));
        let ids = self.members.range(behind).chain(self.members.range(upto));
        let idle = |member: &Member| member.busy_until.is_none_or(|until| until <= now);
        let found = ids.take(LOOK_MAX).find(|(_, member)| idle(member)).map(|(id, _)| *id);
        if let Some(id) = found {
            self.last = id;
            self.urgent_left = self.urgent_left.saturating_sub(1);
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
                if urgent && changed {
                    self.urgent_left = self.members.len();
                    self.next = (!self.members.is_empty()).then_some(now);
                }
            }
            RecordsInput::Present { node } => {
                if node == self.own || self.members.len() >= MEMBERS_MAX {
                    return;
                }
                self.members.entry(node).or_default();
                if self.next.is_none() {
                    self.next = Some(now);
                }
            }
            RecordsInput::Gone { node } => {
                if self.members.remove(&node).is_some_and(|member| member.record.is_some()) {
                    out.push(RecordsOutput::Dropped { node });
                }
                self.urgent_left = self.urgent_left.min(self.members.len());
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
            RecordsInput::Done { node } => {
                if let Some(member) = self.members.get_mut(&node) {
                    member.busy_until = None;
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

    /// Runs the machine until `end` and gives who was told when. Exchanges end at once, but for those
    /// with `silent`.
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
                if Some(with) != silent {
                    records.handle(now, RecordsInput::Done { node: with }, &mut Vec::new());
                }
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

    #[test]
    fn everyone_is_told_in_each_round() {
        let mut records = with_members(3, [1, 2, 3, 4, 5]);
        let expect = [(0, 4), (125, 5), (250, 1), (375, 2), (500, 4)];
        assert_eq!(run(&mut records, 0, 500, None), expect);
    }

    #[test]
    fn the_pace_does_not_grow_with_the_mesh() {
        for members in [100u8, 200, 250] {
            let mut records = with_members(0, 1..=members);
            let told = run(&mut records, 0, 9_999, None).len();
            assert!((990..=1000).contains(&told), "{members}: {told} in ten seconds");
        }
    }

    #[test]
    fn a_silent_member_does_not_hold_up_the_others() {
        let mut records = with_members(0, [1, 2, 3]);
        let told = run(&mut records, 0, 10_000, Some(node(2)));
        let count = |n| told.iter().filter(|(_, who)| *who == n).count();
        assert!(count(1) > 25 && count(3) > 25, "{told:?}");
        assert!((4..=6).contains(&count(2)), "again after each timeout only: {told:?}");
    }

    #[test]
    fn an_urgent_change_begins_a_round_at_once() {
        let mut records = with_members(0, [1, 2, 3]);
        run(&mut records, 0, 1_000, None);
        let own = |record: u8, urgent| RecordsInput::Own { record: vec![record], urgent };
        records.handle(at(1_001), own(1, true), &mut Vec::new());
        let told = run(&mut records, 1_001, 1_040, None);
        let mut who: Vec<u8> = told.iter().map(|(_, who)| *who).collect();
        who.sort_unstable();
        assert_eq!(who, [1, 2, 3], "{told:?}");
        // The same again is no change.
        records.handle(at(1_041), own(1, true), &mut Vec::new());
        assert_eq!(run(&mut records, 1_041, 1_060, None), []);
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
