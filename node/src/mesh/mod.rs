//! The shell of a node towards other nodes: keys and certificates on disk, one QUIC endpoint, the join
//! exchange and the connections of members.
//!
//! [`Identity`] is what the node knows of its mesh, durable. [`Mesh`] is the running endpoint: it serves
//! nothing but the join exchange to who has shown no membership certificate, and hands the datagrams and
//! calls of members to a [`Service`]. What is true about identity is decided in `protocol::identity`.

mod answer;
mod apis;
mod carried;
mod carrier;
mod connections;
mod control;
mod copies;
mod exchange;
mod explain;
mod frames;
mod identity;
mod key_file;
mod knock;
mod kv_secret;
mod limits;
mod members;
pub mod overlay;
mod quic;
mod reach;
mod roster;
mod rpc;
mod running;
mod samples;
mod store;
mod tls;
mod traffic;
mod udp;
mod upkeep;

pub(crate) use apis::Api;
pub use connections::{CloseCode, PeerEvent, Service};
pub use control::{CONTROL_SOCKET, ControlRoutes, ControlServer};
pub(crate) use copies::{Copy, SharedJournal};
pub use frames::{DataStream, FrameStream};
pub(crate) use frames::{FrameReader, FrameWriter};
pub use identity::{Clock, Identity, IdentityError, Standing, system_clock};
pub use key_file::KeyFileError;
pub(crate) use knock::{QUIET_MAX, QUIET_MIN};
pub use kv_secret::kv_secret;
pub use limits::{MeshCounters, MeshLimits};
pub use members::{MemberLine, MembersError};
pub use quic::{ALPN, Endpoint, Link, LinkError, OVERLAY_ALPN, Plane};
pub use roster::{PeerLine, Roster};
pub use rpc::{CODE_FAILED, CODE_TAKEN_OVER, Call, CallError, CallStream, ECHO, Heard, Request};
pub use running::{JoinFailed, Mesh, MeshError, MeshOptions};
pub use store::StoreError;

/// Random bytes of the operating system.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rustls::crypto::aws_lc_rs::default_provider()
        .secure_random
        .fill(&mut bytes)
        .expect("the operating system gives random bytes");
    bytes
}
