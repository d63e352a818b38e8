//! Whose prompt comes next: strict priorities, and deficit round robin between the tenants of one
//! priority (Shreedhar and Varghese, SIGCOMM 1995), charged in tokens that are really computed.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::Bound;

use protocol::{SequenceId, TenantId};

use super::sequence::{Phase, Sequence};

/// All prompts that are not wholly computed, those that wait for blocks and those that have some.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    levels: BTreeMap<Reverse<i8>, Level>,
}

/// The tenants of one priority, in the order of their names.
#[derive(Debug, Default)]
pub(super) struct Level {
    lanes: BTreeMap<TenantId, Lane>,
    /// Whose turn it is, or would be: the tenant may have left.
    turn: Option<TenantId>,
}

/// The prompts of one tenant and priority by ticket. An empty lane does not exist.
#[derive(Debug, Default)]
pub(super) struct Lane {
    pub prefilling: BTreeMap<u64, SequenceId>,
    pub waiting: BTreeMap<u64, SequenceId>,
    /// Tokens left of its turn.
    pub deficit: usize,
    /// Tickets before these have been looked at for the step of that number.
    pub prefilling_from: u64,
    pub waiting_from: u64,
    pub step: u64,
}

impl Lanes {
    pub fn insert(&mut self, sequence: &Sequence) {
        let level = self.levels.entry(Reverse(sequence.effective_priority)).or_default();
        if !level.lanes.contains_key(&sequence.tenant) {
            level.lanes.insert(sequence.tenant.clone(), Lane::default());
        }
        let lane = level.lanes.get_mut(&sequence.tenant).expect("made above");
        match sequence.phase {
            Phase::Waiting => lane.waiting.insert(sequence.ticket, sequence.id),
            Phase::Prefill => {
                lane.prefilling_from = lane.prefilling_from.min(sequence.ticket);
                lane.prefilling.insert(sequence.ticket, sequence.id)
            }
            Phase::Decode => unreachable!("a decoding sequence has no prompt left"),
        };
    }

    /// Takes out a sequence that must still have the phase and priority it was inserted with.
    pub fn remove(&mut self, sequence: &Sequence) {
        self.remove_from(sequence, sequence.phase, sequence.effective_priority);
    }

    /// Puts a sequence that had `phase` and `priority` until now where it belongs.
    pub fn move_from(&mut self, sequence: &Sequence, phase: Phase, priority: i8) {
        // In this order, so that a lane which stays the same keeps its turn.
        self.insert(sequence);
        self.remove_from(sequence, phase, priority);
    }

    fn remove_from(&mut self, sequence: &Sequence, phase: Phase, priority: i8) {
        let Some(level) = self.levels.get_mut(&Reverse(priority)) else { return };
        let Some(lane) = level.lanes.get_mut(&sequence.tenant) else { return };
        match phase {
            Phase::Waiting => lane.waiting.remove(&sequence.ticket),
            Phase::Prefill => lane.prefilling.remove(&sequence.ticket),
            Phase::Decode => None,
        };
        if lane.waiting.is_empty() && lane.prefilling.is_empty() {
            level.lanes.remove(&sequence.tenant);
        }
        if level.lanes.is_empty() {
            self.levels.remove(&Reverse(priority));
        }
    }

    /// The highest priority below `above` that has work; any if `None`.
    pub fn next_priority(&self, above: Option<i8>) -> Option<i8> {
        let from = above.map_or(Bound::Unbounded, |p| Bound::Excluded(Reverse(p)));
        self.levels.range((from, Bound::Unbounded)).next().map(|(p, _)| p.0)
    }

    pub fn level(&mut self, priority: i8) -> Option<&mut Level> {
        self.levels.get_mut(&Reverse(priority))
    }

    pub fn lane(&mut self, priority: i8, tenant: &TenantId) -> Option<&mut Lane> {
        self.level(priority)?.lanes.get_mut(tenant)
    }
}

impl Level {
    pub fn tenants(&self) -> usize {
        self.lanes.len()
    }

    /// The tenant whose turn it is: the one that kept it, or the first after.
    pub fn turn(&self) -> Option<TenantId> {
        let from = self.turn.as_ref().map_or(Bound::Unbounded, Bound::Included);
        let next = self.lanes.range((from, Bound::Unbounded)).next();
        next.or_else(|| self.lanes.iter().next()).map(|(tenant, _)| tenant.clone())
    }

    /// Passes the turn to the tenant after `tenant`.
    pub fn pass(&mut self, tenant: &TenantId) {
        let after = (Bound::Excluded(tenant), Bound::Unbounded);
        self.turn = self.lanes.range(after).next().map(|(next, _)| next.clone());
    }

    pub fn keep(&mut self, tenant: TenantId) {
        self.turn = Some(tenant);
    }
}

impl Lane {
    /// Looks at everything again if `step` is another one than last time.
    pub fn begin(&mut self, step: u64) {
        if self.step != step {
            (self.step, self.prefilling_from, self.waiting_from) = (step, 0, 0);
        }
    }

    pub fn next_prefilling(&self) -> Option<(u64, SequenceId)> {
        self.prefilling.range(self.prefilling_from..).next().map(|(&t, &id)| (t, id))
    }

    pub fn next_waiting(&self) -> Option<(u64, SequenceId)> {
        self.waiting.range(self.waiting_from..).next().map(|(&t, &id)| (t, id))
    }
}
