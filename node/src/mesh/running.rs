//! A node in its mesh, from start to stop.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use protocol::identity::Invite;
use protocol::identity::join::{Contact, Purpose};
use protocol::{MeshId, NodeId};
use thiserror::Error;

use super::connections::{Connections, Service, blocking};
use super::frames::{FrameStream, FrameWriter};
use super::identity::{Clock, Identity, IdentityError, Standing, system_clock};
use super::limits::{MeshCounters, MeshLimits};
use super::quic::{Endpoint, Link, LinkError};
use super::rpc::{CallError, CallStream, Heard, Request};
use super::traffic::Traffic;

/// What a node is told about its mesh.
pub struct MeshOptions {
    /// Where keys and state lie.
    pub data: PathBuf,
    /// Where the QUIC endpoint listens (UDP); port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where others reach it; default: `listen`.
    pub advertise: Vec<SocketAddr>,
    /// A token, for a node that belongs to no mesh yet. Without one it founds a mesh.
    pub token: Option<Invite>,
    /// Whether the overlay finds and is found by multicast DNS on the local network, which tells
    /// everybody there that this node exists.
    pub mdns: bool,
    pub limits: MeshLimits,
    pub clock: Clock,
    /// Who takes datagrams and calls.
    pub service: Arc<dyn Service>,
}

impl MeshOptions {
    /// The defaults for a node whose state lies in `data`.
    pub fn new(data: &Path, listen: SocketAddr) -> Self {
        MeshOptions {
            data: data.to_owned(),
            listen,
            advertise: Vec::new(),
            token: None,
            mdns: false,
            limits: MeshLimits::default(),
            clock: system_clock(),
            service: Arc::new(NoService),
        }
    }
}

struct NoService;

impl Service for NoService {}

/// Why a node is in no mesh. Nothing is left running.
#[derive(Debug, Error)]
pub enum MeshError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("cannot join mesh {}: {failed}", mesh.short())]
    Join { mesh: MeshId, failed: JoinFailed },
}

/// What each address said.
#[derive(Debug)]
pub struct JoinFailed(pub Vec<String>);

impl std::fmt::Display for JoinFailed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.join("; "))
    }
}

/// A running member. Cheap to clone.
#[derive(Clone)]
pub struct Mesh {
    connections: Arc<Connections>,
    address: SocketAddr,
    mdns: bool,
}

impl Mesh {
    /// Opens the state, founds or joins a mesh if there is none, and listens.
    ///
    /// # Errors
    /// If the state cannot be used, the address is taken, or no node lets this one in.
    pub async fn start(options: MeshOptions) -> Result<Mesh, MeshError> {
        let MeshOptions { data, listen, advertise, token, mdns, limits, clock, service } = options;
        let mut identity = Identity::open(&data, clock)?;
        let belongs = identity.standing().map(|s| s.trust.mesh());
        match (belongs, &token) {
            (Some(mesh), Some(token)) if token.mesh() != mesh => {
                return Err(IdentityError::OtherMesh(mesh).into());
            }
            (None, None) => {
                let mesh = identity.found(&data)?;
                tracing::info!(mesh = %mesh.short(), "mesh founded");
            }
            _ => {}
        }
        let identity = Arc::new(identity);
        let limits = Arc::new(limits);
        let counters = Arc::new(MeshCounters::default());
        let endpoint = Endpoint::bind(identity.key(), listen, limits.clone(), counters.clone())?;
        let address = endpoint.address()?;
        let addresses = if advertise.is_empty() { vec![address] } else { advertise };
        let contact = Contact { node: identity.id(), addresses };
        let connections =
            Connections::new(identity, endpoint, (limits, counters), service, contact);
        if let (None, Some(token)) = (belongs, token)
            && let Err(failed) = join(&connections, token).await
        {
            connections.endpoint.close("not joined").await;
            return Err(failed);
        }
        // An authority whose certificate expired while it was off renews it before it meets anybody.
        let renewing = connections.identity.clone();
        blocking(move || renewing.renew_self()).await?;
        connections.tasks.spawn(connections.clone().accept_all());
        if let Some(leaving) = connections.endpoint.leaving() {
            connections.tasks.spawn(connections.clone().send_carried(leaving));
        }
        connections.tasks.spawn(connections.clone().keep_up());
        connections.tasks.spawn(connections.clone().stay_connected());
        Ok(Mesh { connections, address, mdns })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where others are told to reach it.
    pub fn contact(&self) -> &Contact {
        &self.connections.contact
    }

    pub fn node(&self) -> NodeId {
        self.connections.identity.id()
    }

    /// The one port of the node, which the overlay shares.
    pub fn endpoint(&self) -> &Endpoint {
        &self.connections.endpoint
    }

    pub(super) fn mdns(&self) -> bool {
        self.mdns
    }

    pub fn identity(&self) -> &Arc<Identity> {
        &self.connections.identity
    }

    pub fn standing(&self) -> Option<Standing> {
        self.connections.identity.standing()
    }

    pub fn counters(&self) -> &MeshCounters {
        &self.connections.counters
    }

    /// What connections with members have put on the wire.
    pub(super) fn traffic(&self) -> Traffic {
        self.connections.traffic()
    }

    /// Members that are connected: node, address, round-trip time.
    pub fn peers(&self) -> Vec<(NodeId, SocketAddr, Duration)> {
        let all = self.connections.all();
        all.iter().map(|c| (c.link.peer(), c.link.address(), c.link.rtt())).collect()
    }

    /// A connected member whose connection leads to one of these addresses.
    pub fn peer_at(&self, addresses: &[SocketAddr]) -> Option<NodeId> {
        let mut all = self.connections.all().into_iter();
        let found = all.find(|c| !c.link.is_closed() && addresses.contains(&c.link.address()))?;
        Some(found.link.peer())
    }

    /// The newest connection to a member, to measure its path.
    pub fn link(&self, to: NodeId) -> Option<Link> {
        self.connections.to(to).map(|c| c.link.clone())
    }

    /// Over whom an address is reached, if over another member.
    pub fn carrier(&self, address: SocketAddr) -> Option<NodeId> {
        self.connections.endpoint.carried().carrier(address)
    }

    /// All connections to a member at an address.
    pub fn links_at(&self, node: NodeId, address: SocketAddr) -> Vec<Link> {
        let links = self.connections.of(node).into_iter().map(|c| c.link.clone());
        links.filter(|link| link.address() == address).collect()
    }

    /// Whether a member is connected, and not over a carrier.
    pub fn is_direct(&self, node: NodeId) -> bool {
        self.connections.is_direct(node)
    }

    /// Connects to a member at an address, unless it is connected without a carrier.
    ///
    /// # Errors
    /// Why not, in words.
    pub async fn connect(
        &self,
        address: SocketAddr,
        node: Option<NodeId>,
    ) -> Result<NodeId, String> {
        match node.filter(|&n| self.connections.is_direct(n)) {
            Some(node) => Ok(node),
            None => self.connections.connect(address, node).await,
        }
    }

    /// Whether somebody has carried between this node and a member since the start.
    pub(super) fn was_carried(&self, node: NodeId) -> bool {
        self.connections.was_carried(node)
    }

    /// Connects to a member over another one that both reach, unless it is connected.
    ///
    /// # Errors
    /// Why nobody carries, in words.
    pub async fn connect_carried(&self, node: NodeId) -> Result<(), String> {
        self.connections.connect_carried(node).await
    }

    /// Sends a datagram if the member is connected and has room; never waits. Says whether it was sent.
    pub fn send_datagram(&self, to: NodeId, bytes: Bytes) -> bool {
        let sent = self.connections.to(to).is_some_and(|c| c.link.send_datagram(bytes));
        if !sent {
            MeshCounters::add(&self.connections.counters.datagrams_dropped);
        }
        sent
    }

    /// Opens a call to a connected member.
    pub async fn open(&self, to: NodeId, request: &Request) -> Result<CallStream, CallError> {
        self.connections.call(to, request).await
    }

    /// Opens a stream to a connected member for the frames of a KV transfer.
    pub(crate) async fn open_frames(&self, to: NodeId) -> Result<FrameStream, CallError> {
        self.connections.open_frames(to).await
    }

    /// Opens a one-way stream to a connected member for KV blocks.
    pub(crate) async fn open_data(
        &self,
        to: NodeId,
        streams: usize,
    ) -> Result<Vec<FrameWriter>, CallError> {
        self.connections.open_data(to, streams).await
    }

    /// Calls a connected member and waits for its reply.
    pub async fn call(
        &self,
        to: NodeId,
        method: &str,
        body: Vec<u8>,
        within: Duration,
    ) -> Result<Vec<u8>, CallError> {
        let request = Request::new(method, within, body);
        let mut stream = self.open(to, &request).await?;
        stream.finish();
        match stream.next(within).await? {
            Heard::Reply(body) => Ok(body),
            Heard::Part(_) | Heard::End => Err(CallError::Unexpected { node: to, kind: 0 }),
        }
    }

    /// Lets others know at once of what changed through [`Mesh::identity`], and disconnects who was
    /// revoked.
    pub fn tell_news(&self) {
        self.connections.enforce();
        self.connections.news.notify_one();
    }

    /// Renews what is due now instead of at the next look.
    pub async fn renew(&self) {
        self.connections.renew().await;
    }

    /// Leaves the mesh: gives up authority, if another node has it, tells the others, and forgets the
    /// mesh. The endpoint closes.
    ///
    /// # Errors
    /// If the state cannot be written; the node is still a member then.
    pub async fn leave(&self) -> Result<(), IdentityError> {
        let identity = self.connections.identity.clone();
        let gave_up = blocking(move || {
            let id = identity.id();
            let others = identity.standing().is_some_and(|s| s.trust.authorities().len() > 1);
            match identity.is_authority() && others {
                true => identity.change_authorities(&[], &[id]).map(|()| true),
                false => Ok(false),
            }
        });
        if gave_up.await? {
            self.tell_news();
            tokio::time::sleep(LEAVE_WAIT).await;
        }
        let identity = self.connections.identity.clone();
        blocking(move || identity.leave()).await?;
        self.stop("left").await;
        Ok(())
    }

    /// Ends every connection and task.
    pub async fn shutdown(&self) {
        self.stop("shutting down").await;
    }

    async fn stop(&self, reason: &str) {
        self.connections.stop.cancel();
        self.connections.tasks.close();
        self.connections.endpoint.close(reason).await;
        let _ = tokio::time::timeout(STOP_TIMEOUT, self.connections.tasks.wait()).await;
    }
}

async fn join(connections: &Arc<Connections>, token: Invite) -> Result<(), MeshError> {
    let mesh = token.mesh();
    // Who listens at a seed is not known yet.
    let unknown = NodeId([0; 32]);
    let seeds = token.seeds.iter();
    let seeds: Vec<_> = seeds.map(|&a| Contact { node: unknown, addresses: vec![a] }).collect();
    let purpose = Purpose::Invite(token);
    let joined = connections.obtain(&purpose, seeds, JOIN_TIMEOUT).await;
    joined.map_err(|tried| MeshError::Join { mesh, failed: JoinFailed(tried) })
}

/// Time to find a node that lets this one in.
const JOIN_TIMEOUT: Duration = Duration::from_secs(60);
/// Time for the others to hear that an authority leaves.
const LEAVE_WAIT: Duration = Duration::from_millis(500);
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
