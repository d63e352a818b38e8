//! What goes into the machine and what comes out.

use core::net::SocketAddr;
use std::fmt::Debug;
use std::hash::Hash;

use bincode::{Decode, Encode};

use crate::NodeId;

/// What names a member: [`NodeId`] in the daemon, something smaller in the simulator.
pub trait Identity: Copy + Ord + Hash + Debug + Encode + Decode<()> {
    /// 64 well-spread bits, the same on every node.
    fn digest(&self) -> u64;
}

impl Identity for NodeId {
    fn digest(&self) -> u64 {
        // A public key is random already; mixed, so that whoever grinds keys for one bucket of the
        // views at least has to aim.
        let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|b| self.0[i + b]));
        crate::random::mix(word(0) ^ crate::random::mix(word(8)))
    }
}

/// Where a member can be reached: [`Addresses`] in the daemon.
pub trait Contact: Clone + PartialEq + Debug + Encode + Decode<()> {
    /// Whether it is within bounds. What arrives from others and is not is refused.
    fn is_valid(&self) -> bool;
}

/// Socket addresses of a node, the best first, at most [`ADDRESSES_MAX`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Addresses(Box<[SocketAddr]>);

/// Addresses that one node may announce.
pub const ADDRESSES_MAX: usize = 8;

impl Addresses {
    /// `None` if there are more than [`ADDRESSES_MAX`].
    pub fn new(addresses: impl IntoIterator<Item = SocketAddr>) -> Option<Self> {
        let contact = Addresses(addresses.into_iter().take(ADDRESSES_MAX + 1).collect());
        contact.is_valid().then_some(contact)
    }

    pub fn as_slice(&self) -> &[SocketAddr] {
        &self.0
    }
}

impl Contact for Addresses {
    fn is_valid(&self) -> bool {
        self.0.len() <= ADDRESSES_MAX
    }
}

/// What the shell tells the machine.
#[derive(Clone, Debug, PartialEq)]
pub enum MembershipInput<I, C> {
    /// Begins to probe and to answer; the first input. Seeds are tried until one answers, and one of
    /// them every half minute from then on (more rarely in a large mesh), so that meshes that were founded apart find together.
    /// Without seeds this node waits for others.
    Start { seeds: Vec<C> },
    /// Bytes from a peer whose identity the transport has proven.
    Datagram { from: I, bytes: Vec<u8> },
    /// [`next_deadline`](crate::Machine::next_deadline) has come.
    Timer,
    /// This node's addresses or its record have changed. `version` must grow.
    Announce { contact: C, version: u32 },
    /// Whether the path to a member goes through a relay: such paths get twice the time.
    Path { node: I, relayed: bool },
    /// The transport lost its path to a member: probe it now, do not wait for its turn.
    Check { node: I },
    /// Tells the others and ends. The machine answers [`MembershipOutput::Gone`] when it is done.
    Leave,
}

/// What the shell must do, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum MembershipOutput<I, C> {
    Send {
        to: Destination<I, C>,
        bytes: Vec<u8>,
    },
    /// Must be durable before anything after it is sent. The next start of this identity begins one
    /// above it.
    Persist {
        incarnation: u64,
    },
    Event(MembershipEvent<I, C>),
    /// This node has left; nothing follows.
    Gone,
}

/// Where a datagram goes.
#[derive(Clone, Debug, PartialEq)]
pub enum Destination<I, C> {
    /// A member, by [`contact`](super::Membership::contact); or a stranger that has just sent something:
    /// the way back.
    Node(I),
    /// Whoever is there.
    Seed(C),
}

/// What happened to the view of this node.
#[derive(Clone, Debug, PartialEq)]
pub enum MembershipEvent<I, C> {
    Joined {
        id: I,
        incarnation: u64,
        contact: C,
        version: u32,
    },
    Suspected {
        id: I,
        incarnation: u64,
    },
    Refuted {
        id: I,
        incarnation: u64,
    },
    Died {
        id: I,
        incarnation: u64,
    },
    Left {
        id: I,
        incarnation: u64,
    },
    /// A departed member has contacted this node directly, with a higher incarnation.
    Returned {
        id: I,
        incarnation: u64,
        contact: C,
        version: u32,
    },
    /// It has other addresses, another record, or was restarted before anyone noticed.
    Changed {
        id: I,
        incarnation: u64,
        contact: C,
        version: u32,
    },
    /// Its departure was remembered long enough.
    Forgotten {
        id: I,
    },
    /// This node was falsely accused and has answered with that incarnation.
    SelfRefuted {
        incarnation: u64,
    },
    /// This node was not run for that long; judgements that fell into it are void.
    Stalled {
        late: crate::Duration,
    },
}

/// What a member is held for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberState {
    Alive,
    Suspect,
    Dead,
    Left,
}

impl MemberState {
    /// Alive or suspect: it counts, is probed and may be routed to.
    pub fn is_present(self) -> bool {
        matches!(self, MemberState::Alive | MemberState::Suspect)
    }
}

/// One line of the view.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberView<'a, I, C> {
    pub id: I,
    pub state: MemberState,
    pub incarnation: u64,
    pub contact: &'a C,
    /// Of its node record.
    pub version: u32,
    /// When it departed, or was last seen to change.
    pub since: crate::Instant,
    /// The largest recent round trip, if one was measured.
    pub rtt: Option<crate::Duration>,
}

/// Counters since the start, and gauges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MembershipStats {
    /// Members held for present, this node included.
    pub present: usize,
    pub suspects: usize,
    pub departed: usize,
    /// 0 is well; 8 multiplies times by nine.
    pub health: u8,
    /// Pieces of news waiting.
    pub news: usize,
    pub probes_in_flight: usize,
    pub relays_in_flight: usize,
    pub verifications_waiting: usize,

    pub datagrams_in: u64,
    pub bytes_in: u64,
    pub datagrams_out: u64,
    pub bytes_out: u64,
    pub probes: u64,
    pub probes_failed: u64,
    /// Out-of-turn probes not made because enough were in flight.
    pub probes_skipped: u64,
    /// Ping requests refused because enough were in flight.
    pub relays_refused: u64,
    pub syncs: u64,
    /// Answers to a comparison not given, for want of budget.
    pub syncs_refused: u64,
    pub stalls: u64,
    pub refutations: u64,
    pub deaths: u64,
    pub returns: u64,

    /// Datagrams that could not be read.
    pub malformed: u64,
    /// Of another version of the protocol.
    pub other_version: u64,
    /// Accusations ignored because their author was wrong too often.
    pub accusations_damped: u64,
    /// Relayed incarnations too far ahead to be believed.
    pub jumps_refused: u64,
    /// Claims about departed members that only direct contact can confirm.
    pub ghosts_refused: u64,
    /// Newcomers refused because the table is full.
    pub members_refused: u64,
    /// News dropped because the queue was full.
    pub news_dropped: u64,
}
