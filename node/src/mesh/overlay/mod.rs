//! The overlay plane: libp2p finds peers, crosses NATs and carries small broadcasts.
//!
//! Owns the swarm of libp2p, in one task; no type of libp2p leaves this module. Refuses: failure detection
//! (membership does that), bulk and RPC (the data plane), and whoever is no member. It persists nothing and
//! promises nothing about delivery: the data plane goes on without it, and anti-entropy repairs what a
//! broadcast missed. docs/overlay.md has the whole picture.
//!
//! Every queue is bounded and nothing waits for a peer: members are a cell of which the latest value
//! counts; commands beyond [`limits::COMMANDS_MAX`] are refused; events beyond [`limits::EVENTS_MAX`] are
//! dropped and counted, and the state they told of stays readable in [`OverlayStatus`].

mod address;
mod behaviour;
pub mod limits;
mod muxer;
mod observed;
mod peers;
mod supervisor;
mod task;
mod transport;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use protocol::{MeshId, NodeId};
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub use address::{Address, BadAddress};
pub use limits::Limits;

use super::quic::Endpoint;
use crate::metrics::OverlayMetrics;

/// How an overlay is set up.
#[derive(Clone, Debug)]
pub struct OverlayConfig {
    /// Names all protocols, so that meshes never mix.
    pub mesh: MeshId,
    /// Whether to find and be found by multicast DNS on the local network. It is not authenticated and
    /// tells everybody there that this node exists.
    pub mdns: bool,
    pub reachability: Reachability,
    /// Whether other members may use this node as their relay, if it can be reached.
    pub serve_relay: bool,
    /// Who may connect, until [`OverlayHandle::set_members`] says otherwise. Empty: nobody.
    pub members: Vec<Member>,
    pub limits: Limits,
}

impl OverlayConfig {
    /// For nodes of `mesh`: finds out by itself whether it is behind a NAT, serves as a relay if not, and
    /// knows nobody.
    pub fn new(mesh: MeshId) -> OverlayConfig {
        OverlayConfig {
            mesh,
            mdns: false,
            reachability: Reachability::Probe,
            serve_relay: true,
            members: Vec::new(),
            limits: Limits::default(),
        }
    }
}

/// Whether nodes elsewhere can reach this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reachability {
    /// Members on the open internet are asked to try. Only they can tell: in a mesh that lives in one
    /// private network the answer stays unknown, and nothing depends on it.
    Probe,
    /// The operator says yes: every address it listens on is told to others, and it may be a relay.
    Public,
    /// The operator says no: it takes places on relays at once.
    Private,
}

/// A node that may connect, and where it may be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub node: NodeId,
    /// Best first; at most [`limits::ADDRESSES_PER_NODE_MAX`] are kept. May be empty: then it is
    /// found by others, or finds us.
    pub addresses: Vec<Address>,
}

/// How the packets of a connection travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Path {
    Direct,
    /// Through another member.
    Relayed,
}

/// How an address became known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Discovery {
    /// Heard on the local network. Anybody there can say anything.
    Mdns,
    /// A member told us of another.
    Kad,
    /// The node itself told us, over an authenticated connection.
    Identify,
}

/// Whether nodes elsewhere can reach this one, as far as we know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Nat {
    #[default]
    Unknown,
    Public,
    Private,
}

/// Why a member was cut off, for [`limits::PENALTY`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CutOff {
    /// A broadcast larger than [`Limits::message_bytes`].
    Oversized,
    /// More broadcasts of its own than [`Limits::messages_per_second`].
    Rate,
    /// It speaks for another mesh.
    OtherMesh,
    /// It describes itself over and over.
    Identify,
}

impl CutOff {
    /// Every reason.
    pub const ALL: [CutOff; 4] =
        [CutOff::Oversized, CutOff::Rate, CutOff::OtherMesh, CutOff::Identify];

    /// As a label of metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            CutOff::Oversized => "oversized",
            CutOff::Rate => "rate",
            CutOff::OtherMesh => "other_mesh",
            CutOff::Identify => "identify",
        }
    }
}

/// What the overlay tells the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OverlayEvent {
    /// Packets are taken at this address; the port is real where 0 was asked for.
    Listening {
        address: SocketAddr,
    },
    /// Somewhere a node may be. Members are dialled without further ado; others are named only if they
    /// were heard of by multicast DNS, and who they are is not proven.
    Discovered {
        node: NodeId,
        addresses: Vec<Address>,
        how: Discovery,
    },
    /// The best path to a member is this one now; sent again when it changes.
    Connected {
        node: NodeId,
        path: Path,
        /// Where it is, if the path is direct: the data plane reaches it there, too.
        at: Option<SocketAddr>,
    },
    Disconnected {
        node: NodeId,
    },
    /// The member takes our broadcasts from now on.
    Hears {
        node: NodeId,
    },
    /// A member sees us at this address. One address is told once.
    Observed {
        address: SocketAddr,
        by: NodeId,
    },
    /// What is known of our reachability has changed.
    Reachable {
        nat: Nat,
    },
    /// Others reach us through this relay now.
    RelayHeld {
        relay: NodeId,
        address: Address,
    },
    RelayLost {
        relay: NodeId,
    },
    /// A relayed connection was to become a direct one.
    HolePunched {
        node: NodeId,
        result: Result<(), String>,
    },
    /// A broadcast of a member, signed by it. May come twice, late, or never.
    Message {
        from: NodeId,
        bytes: Bytes,
    },
    /// A member misbehaved and is kept away for a while.
    CutOff {
        node: NodeId,
        why: CutOff,
    },
    /// The overlay broke and was built anew: nobody is connected.
    Restarted,
}

/// The overlay at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OverlayStatus {
    pub listening: Vec<SocketAddr>,
    /// Where members elsewhere can reach us, relays included: what a node record should say.
    pub external: Vec<Address>,
    pub nat: Nat,
    /// Relays on which this node has a place.
    pub relays: Vec<NodeId>,
    /// Connected members, by id.
    pub peers: Vec<PeerPath>,
    pub members: usize,
    /// How often it was built anew.
    pub restarts: u64,
}

/// A connected member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerPath {
    pub node: NodeId,
    pub path: Path,
    /// Where it is, if the path is direct.
    pub at: Option<SocketAddr>,
}

/// Why an overlay did not start. Nothing is left running.
#[derive(Debug, Error)]
pub enum StartError {
    #[error(
        "SSLKEYLOGFILE is set, and the secrets of every connection would be written to it: unset it"
    )]
    KeyLog,
    #[error("the overlay cannot listen: {0}")]
    Listen(String),
    #[error("the overlay's protocols cannot be set up: {0}")]
    Protocol(String),
}

/// A broadcast that was not taken. Nothing was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PublishError {
    #[error("the broadcast has {bytes} bytes, at most {max} are allowed")]
    TooLarge { bytes: usize, max: usize },
    #[error("too many broadcasts wait: try again later")]
    Busy,
    #[error("the overlay is stopped")]
    Stopped,
}

/// The overlay as a whole.
pub struct Overlay;

impl Overlay {
    /// Starts an overlay on a node's endpoint, in a task of the current tokio runtime. Whoever accepts
    /// the endpoint's connections hands it those of its own protocol.
    ///
    /// It ends when the handle is dropped or the endpoint is closed, and the events end with it.
    pub fn start(
        config: OverlayConfig,
        endpoint: &Endpoint,
        metrics: OverlayMetrics,
    ) -> Result<(OverlayHandle, mpsc::Receiver<OverlayEvent>), StartError> {
        if std::env::var_os(KEY_LOG).is_some() {
            return Err(StartError::KeyLog);
        }
        // The copy is wiped.
        let key = libp2p::identity::Keypair::ed25519_from_bytes(endpoint.key().secret())
            .map_err(|error| StartError::Protocol(error.to_string()))?;
        let node = endpoint.key().id();
        let (members, members_seen) = watch::channel(Arc::from(config.members.as_slice()));
        let (commands, inbox) = mpsc::channel(limits::COMMANDS_MAX);
        let (events, receiver) = mpsc::channel(limits::EVENTS_MAX);
        let (status, status_seen) = watch::channel(OverlayStatus::default());
        let stop = endpoint.closed().child_token();
        let message_bytes_max = config.limits.message_bytes;
        let ends = task::Ends {
            members: members_seen,
            inbox,
            events,
            status,
            stop: stop.clone(),
            metrics,
        };
        let ground = supervisor::Ground { config, endpoint: endpoint.clone(), key, node };
        let task = supervisor::spawn(ground, ends)?;
        let handle = OverlayHandle {
            node,
            members,
            commands,
            status: status_seen,
            stop,
            task: Some(task),
            message_bytes_max,
        };
        Ok((handle, receiver))
    }
}

/// Speaks to a running overlay. Dropping it stops the overlay without goodbyes.
pub struct OverlayHandle {
    node: NodeId,
    members: watch::Sender<Arc<[Member]>>,
    commands: mpsc::Sender<task::Command>,
    status: watch::Receiver<OverlayStatus>,
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
    message_bytes_max: usize,
}

impl OverlayHandle {
    /// The node that this overlay speaks for.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Says who may connect. Whoever is not listed is disconnected; who is new is dialled if there are too
    /// few connections. The latest list counts; the node itself may be in it.
    pub fn set_members(&self, members: Vec<Member>) {
        self.members.send_replace(members.into());
    }

    /// Asks for a connection to a member now, whatever failed before. False if too many commands wait or
    /// the overlay is stopped. It comes, if it comes, as [`OverlayEvent::Connected`].
    pub fn dial(&self, node: NodeId) -> bool {
        self.commands.try_send(task::Command::Dial(node)).is_ok()
    }

    /// Broadcasts to all members, without any promise. Dropped, and counted, where no member listens or
    /// the node's own rate is spent.
    pub fn publish(&self, bytes: Bytes) -> Result<(), PublishError> {
        let max = self.message_bytes_max;
        if bytes.len() > max {
            return Err(PublishError::TooLarge { bytes: bytes.len(), max });
        }
        self.commands.try_send(task::Command::Publish(bytes)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => PublishError::Busy,
            mpsc::error::TrySendError::Closed(_) => PublishError::Stopped,
        })
    }

    /// Says that others reach this node at `address`: a forwarded port, for instance. False as in
    /// [`OverlayHandle::dial`].
    pub fn add_external(&self, address: SocketAddr) -> bool {
        self.commands.try_send(task::Command::AddExternal(address)).is_ok()
    }

    /// The overlay at this moment; waits for nobody.
    pub fn status(&self) -> OverlayStatus {
        self.status.borrow().clone()
    }

    /// Follows the status.
    pub fn watch(&self) -> watch::Receiver<OverlayStatus> {
        self.status.clone()
    }

    /// Closes every connection and ends; takes at most [`limits::GOODBYE_MAX`] and a little.
    pub async fn shutdown(mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            let limit = limits::GOODBYE_MAX + Duration::from_secs(1);
            let abort = task.abort_handle();
            if tokio::time::timeout(limit, task).await.is_err() {
                abort.abort();
            }
        }
    }
}

impl Drop for OverlayHandle {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

/// The variable that makes libp2p's TLS write the secrets of its connections to a file.
pub const KEY_LOG: &str = "SSLKEYLOGFILE";

/// Makes sure that no secrets are written to a file: replaces this process by itself, without
/// [`KEY_LOG`] in its environment. For the first line of `main`; does nothing where it is not set.
///
/// A variable cannot be removed from a running process without `unsafe`, since other threads may read the
/// environment at that moment.
pub fn clear_key_log() -> std::io::Result<()> {
    use std::os::unix::process::CommandExt;

    if std::env::var_os(KEY_LOG).is_none() {
        return Ok(());
    }
    let mut arguments = std::env::args_os();
    let mut command = std::process::Command::new(std::env::current_exe()?);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    Err(command.args(arguments).env_remove(KEY_LOG).exec())
}
