//! What the world asks of whatever lives in it.

use protocol::Instant;

/// A node of the world.
pub type NodeIndex = u32;

/// A membership protocol as the world sees it: ours or another.
pub trait Actor {
    /// Takes one input at that time of the node's own clock and appends what shall happen.
    fn handle(&mut self, now: Instant, stimulus: Stimulus, effects: &mut Vec<Effect>);

    /// When [`Stimulus::Timer`] is due, on the node's own clock.
    fn next_deadline(&self) -> Option<Instant>;

    /// The other nodes that it holds for present, in ascending order.
    fn present(&self) -> Vec<NodeIndex>;

    /// A number that is equal for equal views; cheaper than [`present`](Self::present).
    fn view_hash(&self) -> u64;

    /// Why one of its bounds does not hold, if so.
    fn broken_bound(&self) -> Option<String>;
}

#[derive(Clone, Debug)]
pub enum Stimulus {
    /// The first input: go and find the others through these.
    Start {
        seeds: Vec<NodeIndex>,
    },
    Datagram {
        from: NodeIndex,
        bytes: Vec<u8>,
    },
    Timer,
    Leave,
}

#[derive(Clone, Debug)]
pub enum Effect {
    Send {
        to: NodeIndex,
        bytes: Vec<u8>,
    },
    Persist {
        incarnation: u64,
    },
    See {
        sight: Sight,
        subject: NodeIndex,
    },
    /// It has left and shall not be run any more.
    Gone,
}

/// What a node believes to have happened to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sight {
    /// Its own start; the world says so, not the actor.
    Started,
    Joined,
    Suspected,
    Refuted,
    Died,
    Left,
    Returned,
    Forgotten,
}
