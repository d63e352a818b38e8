//! The one QUIC endpoint of a node (quinn), and connections on which both keys are proved.
//!
//! Two planes share it, told apart by ALPN: the data plane, and the overlay, which takes its connections
//! from [`Endpoint::overlay_links`]. One UDP port thus serves both, and what opens a NAT for one opens
//! it for the other.
//!
//! The seam: nothing of quinn but its streams leaves this module and `frames`.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use protocol::NodeId;
use protocol::identity::NodeKey;
use protocol::identity::join::{ChannelBinding, EXPORTER_LABEL};
use protocol::transfer::KV_STREAMS_MAX;
use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use quinn::{
    AckFrequencyConfig, ConnectionId, ConnectionIdGenerator, IdleTimeout, TransportConfig, VarInt,
};
use rustls::pki_types::CertificateDer;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::carried::{Carried, Leaving};
use super::limits::{MeshCounters, MeshLimits};
use super::random;
use super::tls::{self, Tls};
use super::udp::Socket;

pub use super::tls::{ALPN, OVERLAY_ALPN};

/// A UDP socket that speaks QUIC as this node.
#[derive(Clone)]
pub struct Endpoint {
    quinn: quinn::Endpoint,
    /// Quinn's socket once more, for packets that are no QUIC.
    socket: Arc<UdpSocket>,
    key: Arc<NodeKey>,
    overlay_client: quinn::ClientConfig,
    /// Who takes connections of the overlay; without one they are closed.
    overlay: Arc<Mutex<Option<mpsc::Sender<Link>>>>,
    carried: Arc<Carried>,
    /// What leaves by carriers, until somebody takes it.
    leaving: Arc<Mutex<Option<mpsc::Receiver<Leaving>>>>,
    closed: CancellationToken,
    limits: Arc<MeshLimits>,
    counters: Arc<MeshCounters>,
}

/// A connection to a node whose key is proved and whose membership is not.
#[derive(Clone, Debug)]
pub struct Link {
    connection: quinn::Connection,
    peer: NodeId,
    plane: Plane,
    binding: ChannelBinding,
}

/// What is spoken on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plane {
    Data,
    Overlay,
}

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum LinkError {
    #[error("cannot listen on {address}")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("the TLS configuration cannot be made")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("{address} cannot be dialled: {what}")]
    Dial { address: SocketAddr, what: String },
    #[error("no connection to {address}: {source}")]
    Handshake { address: SocketAddr, source: quinn::ConnectionError },
    #[error("no answer from {address} within {} s: is a node there, and UDP let through?", .after.as_secs())]
    Timeout { address: SocketAddr, after: Duration },
    #[error("{address} is node {}, not {}", found.short(), wanted.short())]
    OtherNode { address: SocketAddr, wanted: NodeId, found: NodeId },
    #[error("the endpoint is closed")]
    Closed,
}

impl Endpoint {
    /// Binds the socket; port 0 takes a free one.
    pub fn bind(
        key: &NodeKey,
        address: SocketAddr,
        limits: Arc<MeshLimits>,
        counters: Arc<MeshCounters>,
    ) -> Result<Endpoint, LinkError> {
        let listen = |source| LinkError::Listen { address, source };
        let Tls { server, client: client_tls, overlay } = Tls::new(key).map_err(LinkError::Tls)?;
        let server = QuicServerConfig::try_from(server).map_err(|e| LinkError::Tls(e.into()))?;
        let transport = Arc::new(transport(&limits));
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
        server.transport_config(transport.clone());
        server.max_incoming(limits.connections_max);
        let client = |tls: rustls::ClientConfig| {
            let client = QuicClientConfig::try_from(tls).map_err(|e| LinkError::Tls(e.into()))?;
            let mut client = quinn::ClientConfig::new(Arc::new(client));
            client.transport_config(transport.clone());
            Ok::<_, LinkError>(client)
        };
        let socket = UdpSocket::bind(address).map_err(listen)?;
        let again = socket.try_clone().map_err(listen)?;
        let is_ipv6 = socket.local_addr().map_err(listen)?.is_ipv6();
        let (carried, leaving) = Carried::new(is_ipv6);
        let carried = Arc::new(carried);
        let both = Socket::new(socket).map_err(listen)?.with_carried(carried.clone());
        let mut quinn = quinn_endpoint(both, Some(server)).map_err(listen)?;
        quinn.set_default_client_config(client(client_tls)?);
        Ok(Endpoint {
            quinn,
            socket: Arc::new(again),
            key: Arc::new(key.clone()),
            overlay_client: client(overlay)?,
            overlay: Arc::default(),
            carried,
            leaving: Arc::new(Mutex::new(Some(leaving))),
            closed: CancellationToken::new(),
            limits,
            counters,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> Result<SocketAddr, LinkError> {
        self.quinn.local_addr().map_err(|_| LinkError::Closed)
    }

    /// The key whose possession it proves.
    pub(super) fn key(&self) -> &NodeKey {
        &self.key
    }

    /// Ways over carriers, which are addresses to this endpoint.
    pub(super) fn carried(&self) -> &Carried {
        &self.carried
    }

    /// What leaves by carriers, for the first who asks.
    pub(super) fn leaving(&self) -> Option<mpsc::Receiver<Leaving>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Cancelled when it is closed.
    pub(super) fn closed(&self) -> &CancellationToken {
        &self.closed
    }

    /// Connects, and refuses whoever is not `wanted` if that is known.
    pub async fn dial(
        &self,
        address: SocketAddr,
        wanted: Option<NodeId>,
    ) -> Result<Link, LinkError> {
        let connecting = self
            .quinn
            .connect(address, tls::SERVER_NAME)
            .map_err(|e| LinkError::Dial { address, what: e.to_string() })?;
        let link = self.establish(connecting, address).await?;
        match wanted {
            Some(wanted) if wanted != link.peer => {
                let found = link.peer;
                link.close(0, "another node was expected here");
                Err(LinkError::OtherNode { address, wanted, found })
            }
            _ => Ok(link),
        }
    }

    /// Connects the overlay. `fresh` leaves from another port, so that the answer does not come through
    /// a hole that this one's packets have made.
    pub(super) async fn dial_overlay(
        &self,
        address: SocketAddr,
        fresh: bool,
    ) -> Result<Link, LinkError> {
        let failed =
            |what: &dyn std::fmt::Display| LinkError::Dial { address, what: what.to_string() };
        let quinn = match fresh {
            false => self.quinn.clone(),
            true => {
                let any = SocketAddr::new(self.address()?.ip(), 0);
                let socket = UdpSocket::bind(any).map_err(|e| failed(&e))?;
                let socket = Socket::new(socket).map_err(|e| failed(&e))?;
                quinn_endpoint(socket, None).map_err(|e| failed(&e))?
            }
        };
        let client = self.overlay_client.clone();
        let connecting =
            quinn.connect_with(client, address, tls::SERVER_NAME).map_err(|e| failed(&e))?;
        self.establish(connecting, address).await
    }

    /// From now on connections of the overlay that come in go to this receiver, and no longer to an
    /// earlier one. At most [`OVERLAY_LINKS_MAX`] wait; more are closed.
    pub(super) fn overlay_links(&self) -> mpsc::Receiver<Link> {
        let (sender, receiver) = mpsc::channel(OVERLAY_LINKS_MAX);
        *self.overlay.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        receiver
    }

    /// Gives a connection of the overlay to whoever takes them.
    pub(super) fn hand_over(&self, link: Link) {
        let taker = self.overlay.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let refused = match taker {
            Some(taker) => taker.try_send(link).err().map(|error| match error {
                mpsc::error::TrySendError::Full(link) => (link, "too many wait"),
                mpsc::error::TrySendError::Closed(link) => (link, "no overlay runs here"),
            }),
            None => Some((link, "no overlay runs here")),
        };
        if let Some((link, why)) = refused {
            MeshCounters::add(&self.counters.refused);
            link.close(0, why);
        }
    }

    /// Takes connections of the overlay and closes all others, until the endpoint is closed: for a
    /// process that is nothing but an overlay.
    pub async fn serve_overlay(self) {
        while let Some(incoming) = self.accept().await {
            let this = self.clone();
            // As many as there may be connections.
            tokio::spawn(async move {
                match this.finish(incoming).await {
                    Ok(link) if link.plane == Plane::Overlay => this.hand_over(link),
                    Ok(link) => link.close(0, "only the overlay runs here"),
                    Err(error) => tracing::debug!(%error, "no connection"),
                }
            });
        }
    }

    /// Sends one packet that is no QUIC, which a full socket drops.
    pub(super) fn poke(&self, address: SocketAddr, bytes: &[u8]) -> std::io::Result<()> {
        // A socket of IPv6 reaches IPv4 under its mapped addresses.
        let address = match (self.socket.local_addr()?.ip(), address.ip()) {
            (IpAddr::V6(_), IpAddr::V4(v4)) => (v4.to_ipv6_mapped(), address.port()).into(),
            _ => address,
        };
        match self.socket.send_to(bytes, address) {
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    /// The next connection that may begin; `None` once the endpoint is closed.
    pub(super) async fn accept(&self) -> Option<quinn::Incoming> {
        loop {
            let Some(incoming) = self.quinn.accept().await else {
                // Nothing comes any more, for the overlay neither.
                *self.overlay.lock().unwrap_or_else(PoisonError::into_inner) = None;
                return None;
            };
            if self.quinn.open_connections() >= self.limits.connections_max {
                MeshCounters::add(&self.counters.refused);
                incoming.refuse();
                continue;
            }
            return Some(incoming);
        }
    }

    /// Finishes the handshake of a connection that came in.
    pub(super) async fn finish(&self, incoming: quinn::Incoming) -> Result<Link, LinkError> {
        let address = incoming.remote_address();
        let connecting =
            incoming.accept().map_err(|source| LinkError::Handshake { address, source })?;
        self.establish(connecting, address).await
    }

    /// Closes every connection and the socket.
    pub async fn close(&self, reason: &str) {
        self.closed.cancel();
        self.quinn.close(VarInt::from_u32(0), reason.as_bytes());
        // What was said last may still be on its way.
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, self.quinn.wait_idle()).await;
    }

    async fn establish(
        &self,
        connecting: quinn::Connecting,
        address: SocketAddr,
    ) -> Result<Link, LinkError> {
        let after = self.limits.handshake_timeout;
        let connected = tokio::time::timeout(after, connecting).await;
        let made = match connected {
            Err(_) => Err(LinkError::Timeout { address, after }),
            Ok(Err(source)) => Err(LinkError::Handshake { address, source }),
            Ok(Ok(connection)) => Ok(connection),
        };
        let counters = &self.counters;
        let counter =
            if made.is_ok() { &counters.connections } else { &counters.handshakes_failed };
        MeshCounters::add(counter);
        let connection = made?;
        let no_key = || LinkError::Dial { address, what: "it proved no key".to_owned() };
        let identity = connection.peer_identity().ok_or_else(no_key)?;
        let chain = identity.downcast::<Vec<CertificateDer<'static>>>().map_err(|_| no_key())?;
        let peer = chain.first().and_then(tls::node_of).ok_or_else(no_key)?;
        let protocol = connection
            .handshake_data()
            .and_then(|data| data.downcast::<HandshakeData>().ok()?.protocol);
        let plane = match protocol.as_deref() {
            Some(OVERLAY_ALPN) => Plane::Overlay,
            // TLS lets nothing else through.
            _ => Plane::Data,
        };
        let mut binding = [0; 32];
        connection
            .export_keying_material(&mut binding, EXPORTER_LABEL, &[])
            .map_err(|_| no_key())?;
        Ok(Link { connection, peer, plane, binding: ChannelBinding(binding) })
    }
}

impl Link {
    /// Who is there, proved by TLS.
    pub fn peer(&self) -> NodeId {
        self.peer
    }

    pub fn plane(&self) -> Plane {
        self.plane
    }

    pub fn binding(&self) -> ChannelBinding {
        self.binding
    }

    pub fn address(&self) -> SocketAddr {
        self.connection.remote_address()
    }

    /// Bytes of all streams together that the peer may send before they are read.
    pub(super) fn allow_bytes(&self, bytes: u32) {
        self.connection.set_receive_window(VarInt::from_u32(bytes));
    }

    pub fn rtt(&self) -> Duration {
        self.connection.rtt()
    }

    /// Opens a stream; waits while the peer allows no more.
    pub async fn open(&self) -> Result<(quinn::SendStream, quinn::RecvStream), LinkError> {
        self.connection.open_bi().await.map_err(|source| self.lost(source))
    }

    pub(super) async fn accept(&self) -> Result<(quinn::SendStream, quinn::RecvStream), LinkError> {
        self.connection.accept_bi().await.map_err(|source| self.lost(source))
    }

    /// Opens a stream to the peer; waits while it allows no more.
    pub(super) async fn open_data(&self) -> Result<quinn::SendStream, LinkError> {
        self.connection.open_uni().await.map_err(|source| self.lost(source))
    }

    /// Opens one more to the peer, if it allows one at once.
    pub(super) fn open_data_now(&self) -> Option<quinn::SendStream> {
        self.connection.open_uni().now_or_never()?.ok()
    }

    pub(super) async fn accept_data(&self) -> Result<quinn::RecvStream, LinkError> {
        self.connection.accept_uni().await.map_err(|source| self.lost(source))
    }

    pub(super) async fn datagram(&self) -> Result<Bytes, LinkError> {
        self.connection.read_datagram().await.map_err(|source| self.lost(source))
    }

    /// Sends a datagram if there is room for it; never waits.
    pub fn send_datagram(&self, bytes: Bytes) -> bool {
        let room = self.connection.datagram_send_buffer_space();
        bytes.len() <= room && self.connection.send_datagram(bytes).is_ok()
    }

    pub(super) fn stats(&self) -> quinn::ConnectionStats {
        self.connection.stats()
    }

    /// Bytes that fit into one datagram; `None` if the peer takes none.
    pub(super) fn datagram_room(&self) -> Option<usize> {
        self.connection.max_datagram_size()
    }

    /// As [`send_datagram`](Self::send_datagram), but leaves half of the room to others.
    pub(super) fn send_bulk(&self, bytes: Bytes) -> bool {
        let room = self.connection.datagram_send_buffer_space();
        bytes.len() + DATAGRAM_BUFFER_BYTES / 2 <= room
            && self.connection.send_datagram(bytes).is_ok()
    }

    /// Lets the peer open streams, once it is admitted.
    pub(super) fn allow_streams(&self, streams: u32) {
        self.connection.set_max_concurrent_bi_streams(VarInt::from_u32(streams));
        self.connection.set_max_concurrent_uni_streams(VarInt::from_u32(DATA_STREAMS_MAX));
    }

    /// Ends the connection and all streams on it; the peer is told the code and the reason.
    pub fn close(&self, code: u32, reason: &str) {
        self.connection.close(VarInt::from_u32(code), reason.as_bytes());
    }

    pub(super) fn is_closed(&self) -> bool {
        self.connection.close_reason().is_some()
    }

    /// Ends when the connection does.
    pub(super) async fn closed(&self) {
        self.connection.closed().await;
    }

    fn lost(&self, source: quinn::ConnectionError) -> LinkError {
        LinkError::Handshake { address: self.address(), source }
    }
}

/// Random names of connections, shorter than quinn's own.
struct ConnectionIds;

impl ConnectionIdGenerator for ConnectionIds {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(&random::<CONNECTION_ID_BYTES>())
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

fn quinn_endpoint(
    socket: Socket,
    server: Option<quinn::ServerConfig>,
) -> std::io::Result<quinn::Endpoint> {
    let mut config = quinn::EndpointConfig::default();
    config.cid_generator(|| Box::new(ConnectionIds));
    let runtime = Arc::new(quinn::TokioRuntime);
    quinn::Endpoint::new_with_abstract_socket(config, server, Arc::new(socket), runtime)
}

/// Before a peer is admitted it may open one stream, for the greeting or a join. The receive window of
/// a connection bounds what a peer can make this node buffer.
fn transport(limits: &MeshLimits) -> TransportConfig {
    let mut transport = TransportConfig::default();
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(PACKETS_WITHOUT_ACK_MAX));
    let idle =
        IdleTimeout::try_from(limits.idle_timeout).unwrap_or(VarInt::from_u32(30_000).into());
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .send_window(u64::from(CONNECTION_WINDOW_BYTES))
        .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER_BYTES))
        .datagram_send_buffer_size(DATAGRAM_BUFFER_BYTES)
        .initial_rtt(INITIAL_RTT)
        .ack_frequency_config(Some(acks))
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(limits.idle_timeout * 2 / 3));
    transport
}

/// Bytes in flight on a stream: 1 Gbit/s at 16 ms. KV blocks go on several where the path is longer or
/// faster, up to `KV_STREAMS_MAX`: 1 Gbit/s at 130 ms, 10 Gbit/s at 13 ms.
pub(super) const STREAM_WINDOW_BYTES: u32 = 2 << 20;
/// Every data stream may be full and calls still go on: else a transfer whose pages are busy would hold
/// up the tokens of other requests. The same for what waits to be sent. With it a member can make this
/// node hold 56 MiB.
const CONNECTION_WINDOW_BYTES: u32 = (4 << 20) + DATA_STREAMS_MAX * STREAM_WINDOW_BYTES;
/// Streams of KV blocks that a peer may have open at once; more wait at the sender. Too small: transfers
/// queue behind one that fills a long path. Too large: times `STREAM_WINDOW_BYTES` is what a peer can make this node hold.
const DATA_STREAMS_MAX: u32 = KV_STREAMS_MAX as u32 + 4;
/// A few hundred datagrams.
const DATAGRAM_BUFFER_BYTES: usize = 256 << 10;
/// Round trip that is assumed before one is measured. Three of it pass before the first packet is sent
/// again, then twice that, and so on. RFC 9002 has 333 ms, with which a few lost packets end a handshake.
/// Too small: packets are sent twice on long paths. Too large: lossy paths fail.
const INITIAL_RTT: Duration = Duration::from_millis(100);
/// Names a connection in every packet. Too small: they run out, or a late packet of an old connection meets a
/// new one (which does not understand it). Too large: each packet of an idle mesh pays.
const CONNECTION_ID_BYTES: usize = 4;
/// Packets that the other side may take without acknowledging them at once; then after 25 ms at the
/// latest. Too small: streams of tokens pay a packet back for each second token, before they pass it on.
/// Too large: whoever may send only a few packets at first (ten, RFC 9002) waits for those 25 ms.
const PACKETS_WITHOUT_ACK_MAX: u32 = 4;
/// Connections of the overlay that wait for it; more are closed and their diallers come again.
const OVERLAY_LINKS_MAX: usize = 64;
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
