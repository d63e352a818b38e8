//! What happens next: events in order of time, and of their making where times are equal.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::actor::NodeIndex;

/// Something that will happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// The packet in that slot arrives.
    Deliver(u32),
    /// A node's timer is due.
    Wake(NodeIndex),
    /// A node runs again after a stall.
    Resume(NodeIndex),
    /// The fault with that number in the plan.
    Fault(u32),
}

/// Events by virtual nanoseconds.
#[derive(Debug, Default)]
pub struct Queue {
    heap: BinaryHeap<Reverse<(u64, u64, Event)>>,
    made: u64,
}

impl Queue {
    pub fn push(&mut self, at: u64, event: Event) {
        self.heap.push(Reverse((at, self.made, event)));
        self.made += 1;
    }

    /// The next event no later than `until`.
    pub fn pop(&mut self, until: u64) -> Option<(u64, Event)> {
        let Reverse((at, _, _)) = self.heap.peek()?;
        if *at > until {
            return None;
        }
        let Reverse((at, _, event)) = self.heap.pop()?;
        Some((at, event))
    }
}
