//! What a node is told at its start.

use std::net::SocketAddr;
use std::time::Duration;

use protocol::node_record::NodeRole;
use scheduler::router::{Disagg, Policy};

use crate::http::ApiKeys;
use crate::load::{Loader, OnProgress};
use crate::mesh::ControlRoutes;

/// Bounds of the HTTP server.
#[derive(Clone, Debug)]
pub struct HttpLimits {
    /// Connections served at once; more wait in the kernel's backlog. Each costs some 20 KiB and at
    /// most one request body. Too small: clients wait. Too large: memory goes to idle clients.
    pub connections_max: usize,
    /// Largest request body, in bytes. Too small: long prompts are refused (a token is about four
    /// bytes). Too large: `connections_max` times this is what hostile clients can claim.
    pub body_bytes_max: usize,
    /// Time for a body to arrive. Too small: slow links fail. Too large: idle senders hold places.
    pub body_timeout: Duration,
    /// Time for the head of a request to arrive, which also ends idle kept-alive connections.
    pub head_timeout: Duration,
    /// Silence in a stream after which a comment is sent, so that proxies keep it open.
    pub keep_alive: Duration,
    /// Time in which a client must take something of what waits for it; then its connection is closed
    /// and its request cancelled. Too small: clients that pause lose their answers. Too large: those
    /// that never read hold a connection and the memory of its socket.
    pub write_timeout: Duration,
    /// Time that a request may take, from its arrival to the end of its answer; a client may ask for
    /// less. Too small: long answers break off. Too large: forgotten requests hold blocks.
    pub request_timeout: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        HttpLimits {
            connections_max: 4096,
            body_bytes_max: 16 << 20,
            body_timeout: Duration::from_secs(30),
            head_timeout: Duration::from_secs(75),
            keep_alive: Duration::from_secs(15),
            write_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(3600),
        }
    }
}

/// A model to serve.
pub struct ModelOptions {
    /// The name that clients ask for.
    pub id: String,
    pub loader: Loader,
}

impl std::fmt::Debug for ModelOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelOptions").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Everything that a node is told.
pub struct NodeOptions {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// At least one; names are unique.
    pub models: Vec<ModelOptions>,
    /// Start without a model: in a mesh, others have some.
    pub without_models: bool,
    /// Needed to listen on anything but loopback, unless `insecure`.
    pub keys: ApiKeys,
    /// Serve everybody who can reach the address.
    pub insecure: bool,
    /// What the Unix socket offers, also under `/mesh` of the API, for whoever has one of these keys.
    pub admin: Option<(ControlRoutes, ApiKeys)>,
    pub http: HttpLimits,
    /// What the others of its mesh shall use it for.
    pub role: NodeRole,
    /// Whether others compute prompts for this node.
    pub disagg: Disagg,
    /// By what this node chooses who answers a request.
    pub policy: Policy,
    /// Time that running answers get at shutdown. Too small: answers are cut. Too large: the node
    /// hangs on in rollouts.
    pub drain_limit: Duration,
    /// Told how far loading is.
    pub on_progress: Option<OnProgress>,
}

impl NodeOptions {
    /// A node on loopback with the defaults.
    pub fn new(listen: SocketAddr, models: Vec<ModelOptions>) -> Self {
        NodeOptions {
            listen,
            models,
            without_models: false,
            keys: ApiKeys::default(),
            insecure: false,
            admin: None,
            http: HttpLimits::default(),
            role: NodeRole::default(),
            disagg: Disagg::default(),
            policy: Policy::default(),
            drain_limit: Duration::from_secs(30),
            on_progress: None,
        }
    }
}
