//! Who is suspected, by whom, and until when.

use std::collections::{BTreeMap, BTreeSet};

use super::config::MembershipConfig;
use super::table::Slot;
use super::wire::ACCUSERS_MAX;
use crate::{Duration, Instant};

/// One suspect.
#[derive(Clone, Debug)]
pub(super) struct Suspicion<I> {
    started: Instant,
    deadline: Instant,
    /// At most [`ACCUSERS_MAX`], each once.
    pub accusers: Vec<I>,
    /// Those of them that told this node themselves.
    pub first_hand: Vec<I>,
    /// This node's own probe has failed, too.
    pub own: bool,
    /// It is said to have left; nobody contradicted yet.
    pub leaving: bool,
}

/// All suspects of this node, with their deadlines in order. As many as present members at most.
#[derive(Debug)]
pub(super) struct Suspicions<I> {
    by_slot: BTreeMap<Slot, Suspicion<I>>,
    due: BTreeSet<(Instant, Slot)>,
}

impl<I: Copy + PartialEq> Suspicions<I> {
    pub fn new() -> Self {
        Suspicions { by_slot: BTreeMap::new(), due: BTreeSet::new() }
    }

    pub fn len(&self) -> usize {
        self.by_slot.len()
    }

    pub fn get(&self, slot: Slot) -> Option<&Suspicion<I>> {
        self.by_slot.get(&slot)
    }

    /// Adds an accuser to the suspicion of a slot, which begins with the first. False if nothing new
    /// was learnt.
    pub fn accuse(&mut self, now: Instant, slot: Slot, accuser: I) -> bool {
        let suspicion = self.by_slot.entry(slot).or_insert_with(|| Suspicion {
            started: now,
            deadline: Instant::from_nanos(u64::MAX),
            accusers: Vec::new(),
            first_hand: Vec::new(),
            own: false,
            leaving: false,
        });
        let new = !suspicion.accusers.contains(&accuser) && suspicion.accusers.len() < ACCUSERS_MAX;
        if new {
            suspicion.accusers.push(accuser);
        }
        new
    }

    /// Marks what this node knows of a suspicion beyond its accusers.
    pub fn mark(&mut self, slot: Slot, change: impl FnOnce(&mut Suspicion<I>)) {
        if let Some(suspicion) = self.by_slot.get_mut(&slot) {
            change(suspicion);
        }
    }

    /// Sets the deadline by the number of accusers.
    pub fn schedule(&mut self, slot: Slot, config: &MembershipConfig, members: usize) {
        let Some(suspicion) = self.by_slot.get_mut(&slot) else { return };
        let time = if suspicion.leaving {
            config.suspicion_min(members)
        } else {
            config.suspicion_time(members, suspicion.accusers.len().saturating_sub(1))
        };
        self.due.remove(&(suspicion.deadline, slot));
        suspicion.deadline = suspicion.started + time;
        self.due.insert((suspicion.deadline, slot));
    }

    pub fn end(&mut self, slot: Slot) -> Option<Suspicion<I>> {
        let suspicion = self.by_slot.remove(&slot)?;
        self.due.remove(&(suspicion.deadline, slot));
        Some(suspicion)
    }

    pub fn next_deadline(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// A suspect whose time is over.
    pub fn overdue(&self, now: Instant) -> Option<Slot> {
        self.due.first().filter(|(at, _)| *at <= now).map(|(_, slot)| *slot)
    }

    /// Gives every suspect that much more time: this node could not hear them.
    pub fn postpone(&mut self, late: Duration) {
        self.due.clear();
        for (slot, suspicion) in &mut self.by_slot {
            suspicion.started = suspicion.started + late;
            suspicion.deadline = suspicion.deadline + late;
            self.due.insert((suspicion.deadline, *slot));
        }
    }

    pub fn clear(&mut self) {
        self.by_slot.clear();
        self.due.clear();
    }
}
