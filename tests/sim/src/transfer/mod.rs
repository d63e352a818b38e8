//! Hand-offs of KV blocks in the world: the machines of [`cache::transfer`] on both sides, real pools,
//! pages that know who writes and who reads them, and a stand-in for the model whose tokens are wrong
//! if any byte of any page was.

mod ledger;
mod model;
mod node;
mod prefill;
mod receive;
mod scenario;
mod store;

pub use ledger::{Counts, Fate, Ledger};
pub use model::{Model, Prompt};
pub use node::{Command, KvNode, NodeSetup, Sabotage};
pub use scenario::{
    Action, EVENT_FAULTS, EventFault, EventFaultAt, HAND_OFF, Outcome, Plan, PlannedAction,
    event_faults, events_of_hand_off, undisturbed, with_faults,
};
