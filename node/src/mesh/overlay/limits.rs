//! Every bound of the overlay, and what happens at it.

use std::time::Duration;

/// What a peer may cost. The defaults are the constants of this module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections in all. At most `connections * 1 MiB` of receive windows. Too small: a relay cannot
    /// serve its peers. Too large: memory. Beyond it a connection is refused.
    pub connections: u32,
    /// Connections of one peer: relayed, direct, both ends dialling at once, and a dial back.
    pub connections_per_peer: u32,
    /// Handshakes under way, inbound and outbound each; strangers reach no further than this.
    pub pending: u32,
    /// Peers that a node keeps connected by dialling. Too small: broadcasts go the long way and the
    /// graph may part. Too large: every message is sent that often.
    pub peers_wanted: usize,
    /// Payload of a broadcast, in bytes. Larger ones are refused where they are published; a peer that
    /// sends one is cut off.
    pub message_bytes: usize,
    /// A frame of the broadcast protocol: several messages, or control. A larger one ends its stream.
    pub frame_bytes: usize,
    /// Broadcasts of one node per second; also how many of its own a node publishes at most.
    pub messages_per_second: u32,
    /// Broadcasts that one peer may pass on per second, its own and others'. Beyond it they are ignored.
    pub forwards_per_second: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: 128,
            connections_per_peer: 4,
            pending: 64,
            peers_wanted: 12,
            message_bytes: 8 * 1024,
            frame_bytes: 64 * 1024,
            messages_per_second: 32,
            forwards_per_second: 1024,
        }
    }
}

/// Members known to the overlay. More are ignored, and counted: the mesh is then larger than one cell.
pub const MEMBERS_MAX: usize = 16_384;

/// Addresses kept of one node. The one that was heard of longest ago goes first.
pub const ADDRESSES_PER_NODE_MAX: usize = 16;

/// Addresses of ours, as others see them, that are tried out in the life of an overlay. All go into one
/// request of at most 1,024 bytes, so that more would silence it.
pub const CANDIDATES_MAX: usize = 12;

/// Events that wait for the node. Beyond it the newest is dropped and counted; the state that the
/// events tell of can be read again from the status.
pub const EVENTS_MAX: usize = 1024;

/// Commands that wait for the overlay. Beyond it the caller gets an error.
pub const COMMANDS_MAX: usize = 256;

/// How long a member that misbehaved stays away. Short: a fault of ours must heal by itself.
pub const PENALTY: Duration = Duration::from_secs(60);

/// Bursts are this many seconds of a rate. A path that stalled for as long may catch up.
pub const BURST_SECONDS: u32 = 8;

/// Descriptions of itself that a peer may send per second. Beyond it, it is cut off.
pub const IDENTIFIES_PER_SECOND: u32 = 2;

/// How often the overlay looks after its connections.
pub const TICK: Duration = Duration::from_secs(1);

/// Time for a dial, in which a handshake is sent several times. Too small: distant and busy hosts are not
/// reached. Too large: a member whose relay becomes known meanwhile waits for the address that is none.
pub const DIAL_TIME: Duration = Duration::from_secs(4);

/// Dials begun in one tick.
pub const DIALS_PER_TICK: usize = 8;

/// First and longest pause before a member is dialled again.
pub const REDIAL_MIN: Duration = Duration::from_secs(1);
pub const REDIAL_MAX: Duration = Duration::from_secs(60);

/// First and longest pause between two lookups: neighbours are asked for other nodes while fewer members
/// are connected than wanted.
pub const LOOKUP_MIN: Duration = Duration::from_secs(5);
pub const LOOKUP_MAX: Duration = Duration::from_secs(300);

/// A relayed connection beside a direct one is closed when it is this old: both ends have seen the
/// direct one by then.
pub const RELAYED_LINGER: Duration = Duration::from_secs(3);

/// Relays on which a node behind a NAT keeps a place.
pub const RELAYS_WANTED: usize = 2;

/// Pause before a relay that refused or went away is asked again.
pub const RELAY_RETRY: Duration = Duration::from_secs(30);

/// Places that a node gives to others as their relay, and connections through it at a time.
pub const RELAY_PLACES: usize = 64;
pub const RELAY_CIRCUITS: usize = 64;
pub const RELAY_CIRCUITS_PER_PEER: usize = 8;

/// Life and bytes (each way) of a connection through a relay. Only broadcasts go there, so that this is
/// hours of them where hole punching never succeeds; after it the ends connect anew.
pub const CIRCUIT_LIFE: Duration = Duration::from_secs(3600);
pub const CIRCUIT_BYTES: u64 = 64 << 20;

/// Receive window of a connection, in bytes. Frames are small; bulk has the data plane.
pub const CONNECTION_WINDOW: u32 = 1024 * 1024;

/// Streams that a peer may have open on one connection.
pub const STREAMS_PER_CONNECTION: u32 = 64;

/// Addresses of this host that are announced where it listens on all. More are not, and nobody dials them.
pub const INTERFACES_MAX: usize = 64;

/// Holes that are being punched at a time; more fail, and are tried again over the relay.
pub const PUNCHES_MAX: usize = 64;

/// Packets that open a NAT: how long, how often and how large they are sent. The other end dials at the
/// same moment, and its handshake is repeated after 1 s and 3 s.
pub const PUNCH_TIME: Duration = Duration::from_secs(5);
pub const PUNCH_INTERVAL: Duration = Duration::from_millis(50);
pub const PUNCH_BYTES: usize = 16;

/// A connection that no protocol uses is closed after this.
pub const IDLE_MAX: Duration = Duration::from_secs(3600);

/// How long a shutdown waits for its goodbyes to leave.
pub const GOODBYE_MAX: Duration = Duration::from_millis(500);

/// Pause before an overlay that panicked is built again; doubled each time, up to the second.
pub const RESTART_MIN: Duration = Duration::from_secs(1);
pub const RESTART_MAX: Duration = Duration::from_secs(60);
