//! libp2p on the node's own QUIC endpoint, beside the data plane: one UDP port, and one hole in a NAT,
//! for both.
//!
//! Who is at the other end is proved by the endpoint's TLS, so that a peer id is that node's key and no
//! certificate of libp2p's is needed. Addresses are written as libp2p writes QUIC's
//! (`/ip4/192.0.2.7/udp/8421/quic-v1`), although only nodes of ours understand each other here: the ALPN
//! differs.
//!
//! Holes are punched as in the specification of DCUtR
//! (<https://github.com/libp2p/specs/blob/master/relay/DCUtR.md>): the end that dials "as a listener" sends
//! packets that are no QUIC, which make its NAT let the other's handshake in, and waits for that.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Ready;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use if_watch::IfEvent;
use if_watch::tokio::IfWatcher;
use libp2p::core::transport::{
    DialOpts, ListenerId, PortUse, Transport, TransportError, TransportEvent,
};
use libp2p::{Multiaddr, PeerId, core};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use super::address::{Address, peer_id, quic};
use super::limits::{
    DIAL_TIME, INTERFACES_MAX, PUNCH_BYTES, PUNCH_INTERVAL, PUNCH_TIME, PUNCHES_MAX,
};
use super::muxer::Muxer;
use crate::mesh::quic::{Endpoint, Link, LinkError};
use crate::mesh::random;

/// See the module. The endpoint gives the connections that come in to one of these at a time: the last
/// that was made.
pub(super) struct QuicTransport {
    endpoint: Endpoint,
    arrivals: mpsc::Receiver<Link>,
    listener: Option<Listener>,
    /// Who is awaited through a hole, by where it comes from; at most [`PUNCHES_MAX`].
    punches: BTreeMap<SocketAddr, oneshot::Sender<Link>>,
    /// What is to be told of listeners: no more than there are interfaces.
    events: VecDeque<Event>,
    waker: Option<Waker>,
}

struct Listener {
    id: ListenerId,
    at: SocketAddr,
    /// Set where it listens on every interface.
    interfaces: Option<IfWatcher>,
    announced: BTreeSet<IpAddr>,
}

/// Why there is no connection of the overlay, or no listener.
#[derive(Debug, Error)]
pub(super) enum Failed {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("this node listens at {0} and nowhere else")]
    OtherAddress(SocketAddr),
    #[error("this node listens on loopback only, and {0} is elsewhere")]
    OutOfReach(SocketAddr),
    #[error("a hole to {0} is being punched already, or too many are")]
    Punching(SocketAddr),
    #[error("nobody came from {0} through the hole")]
    NoHole(SocketAddr),
    #[error("packets to {0} cannot be sent: {1}")]
    Send(SocketAddr, std::io::Error),
    #[error("the addresses of this host cannot be read: {0}")]
    Interfaces(std::io::Error),
    #[error("the key of the other end is none of a node")]
    NoNode,
}

type Output = (PeerId, Muxer);
type Upgrade = Ready<Result<Output, Failed>>;
type Event = TransportEvent<Upgrade, Failed>;
type Dialling = BoxFuture<'static, Result<Output, Failed>>;

impl QuicTransport {
    pub(super) fn new(endpoint: Endpoint) -> QuicTransport {
        let arrivals = endpoint.overlay_links();
        QuicTransport {
            endpoint,
            arrivals,
            listener: None,
            punches: BTreeMap::new(),
            events: VecDeque::new(),
            waker: None,
        }
    }

    fn tell(&mut self, event: Event) {
        self.events.push_back(event);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Makes a way for `at` through our NAT and waits for it.
    fn punch(&mut self, at: SocketAddr) -> Result<Dialling, Failed> {
        self.punches.retain(|_, awaited| !awaited.is_closed());
        if self.punches.len() >= PUNCHES_MAX || self.punches.contains_key(&at) {
            return Err(Failed::Punching(at));
        }
        let (awaited, arrival) = oneshot::channel();
        self.punches.insert(at, awaited);
        let endpoint = self.endpoint.clone();
        let punching = async move {
            tokio::select! {
                link = arrival => upgrade(link.map_err(|_| Failed::NoHole(at))?),
                Err(error) = poke(&endpoint, at) => Err(Failed::Send(at, error)),
                () = tokio::time::sleep(PUNCH_TIME) => Err(Failed::NoHole(at)),
            }
        };
        Ok(punching.boxed())
    }

    /// A connection that came in: for whoever waits at a hole, else for the swarm.
    fn arrived(&mut self, link: Link) -> Option<Event> {
        let from = canonical(link.address());
        let link = match self.punches.remove(&from) {
            Some(awaited) => awaited.send(link).err()?,
            None => link,
        };
        // Nobody listens: dropped, and so closed.
        let listener = self.listener.as_ref()?;
        Some(TransportEvent::Incoming {
            listener_id: listener.id,
            upgrade: std::future::ready(upgrade(link)),
            local_addr: quic(listener.at),
            send_back_addr: quic(from),
        })
    }

    fn close_listener(&mut self, reason: Result<(), Failed>) -> Option<Event> {
        let listener_id = self.listener.take()?.id;
        Some(TransportEvent::ListenerClosed { listener_id, reason })
    }
}

impl Transport for QuicTransport {
    type Output = Output;
    type Error = Failed;
    type ListenerUpgrade = Upgrade;
    type Dial = Dialling;

    /// Announces where the endpoint listens, which is the only address that can be asked for.
    fn listen_on(
        &mut self,
        id: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<Failed>> {
        let Some(Address::Direct(at)) = Address::of(&address) else {
            return Err(TransportError::MultiaddrNotSupported(address));
        };
        let ours = self.endpoint.address().map_err(|e| TransportError::Other(e.into()))?;
        if at != ours || self.listener.is_some() {
            return Err(TransportError::Other(Failed::OtherAddress(ours)));
        }
        let interfaces = match at.ip().is_unspecified() {
            true => {
                Some(IfWatcher::new().map_err(|e| TransportError::Other(Failed::Interfaces(e)))?)
            }
            false => None,
        };
        let everywhere = interfaces.is_some();
        self.listener = Some(Listener { id, at, interfaces, announced: BTreeSet::new() });
        if !everywhere {
            self.tell(TransportEvent::NewAddress { listener_id: id, listen_addr: quic(at) });
        }
        Ok(())
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        if self.listener.as_ref().is_none_or(|listener| listener.id != id) {
            return false;
        }
        if let Some(closed) = self.close_listener(Ok(())) {
            self.tell(closed);
        }
        true
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        options: DialOpts,
    ) -> Result<Dialling, TransportError<Failed>> {
        let at = match Address::of(&address) {
            Some(Address::Direct(at)) if at.port() != 0 && !at.ip().is_unspecified() => at,
            _ => return Err(TransportError::MultiaddrNotSupported(address)),
        };
        let ours = self.endpoint.address().map_err(|e| TransportError::Other(e.into()))?;
        if ours.ip().is_loopback() && !at.ip().is_loopback() {
            return Err(TransportError::Other(Failed::OutOfReach(at)));
        }
        if options.role == core::Endpoint::Listener {
            return self.punch(at).map_err(TransportError::Other);
        }
        let endpoint = self.endpoint.clone();
        let fresh = options.port_use == PortUse::New;
        let dialling = async move {
            let dialled = tokio::time::timeout(DIAL_TIME, endpoint.dial_overlay(at, fresh)).await;
            let timeout = LinkError::Timeout { address: at, after: DIAL_TIME };
            upgrade(dialled.unwrap_or(Err(timeout))?)
        };
        Ok(dialling.boxed())
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Event> {
        if let Some(event) = self.events.pop_front() {
            return Poll::Ready(event);
        }
        if let Some(listener) = &mut self.listener
            && let Poll::Ready(event) = listener.poll(cx)
        {
            return Poll::Ready(event);
        }
        loop {
            let event = match self.arrivals.poll_recv(cx) {
                Poll::Ready(Some(link)) => self.arrived(link),
                Poll::Ready(None) => match self.close_listener(Err(LinkError::Closed.into())) {
                    Some(closed) => Some(closed),
                    None => break,
                },
                Poll::Pending => break,
            };
            if let Some(event) = event {
                return Poll::Ready(event);
            }
        }
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Listener {
    /// What has changed about the addresses of this host.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        let listener_id = self.id;
        while let Some(interfaces) = &mut self.interfaces {
            let event = std::task::ready!(interfaces.poll_if_event(cx));
            let address = |ip| quic(SocketAddr::new(ip, self.at.port()));
            match event {
                Ok(IfEvent::Up(net)) if self.serves(net.addr()) => {
                    if self.announced.len() < INTERFACES_MAX && self.announced.insert(net.addr()) {
                        let listen_addr = address(net.addr());
                        return Poll::Ready(TransportEvent::NewAddress {
                            listener_id,
                            listen_addr,
                        });
                    }
                }
                Ok(IfEvent::Down(net)) => {
                    if self.announced.remove(&net.addr()) {
                        let listen_addr = address(net.addr());
                        return Poll::Ready(TransportEvent::AddressExpired {
                            listener_id,
                            listen_addr,
                        });
                    }
                }
                Ok(IfEvent::Up(_)) => {}
                Err(error) => {
                    // The addresses stay as they were.
                    self.interfaces = None;
                    let error = Failed::Interfaces(error);
                    return Poll::Ready(TransportEvent::ListenerError { listener_id, error });
                }
            }
        }
        Poll::Pending
    }

    /// Whether packets to an address of this host come to the socket: to one of IPv6 both kinds do.
    fn serves(&self, ip: IpAddr) -> bool {
        self.at.is_ipv6() || ip.is_ipv4()
    }
}

fn upgrade(link: Link) -> Result<Output, Failed> {
    let peer = peer_id(link.peer()).ok_or(Failed::NoNode)?;
    Ok((peer, Muxer::new(link)))
}

/// Sends until it is dropped, or nothing can be sent.
async fn poke(endpoint: &Endpoint, at: SocketAddr) -> std::io::Result<()> {
    loop {
        // So short that no QUIC endpoint answers, and without the bit that every QUIC packet has set
        // (RFC 9000, section 17).
        let mut bytes: [u8; PUNCH_BYTES] = random();
        bytes[0] &= 0x3f;
        endpoint.poke(at, &bytes)?;
        tokio::time::sleep(PUNCH_INTERVAL).await;
    }
}

/// A socket of IPv6 sees hosts of IPv4 under mapped addresses.
fn canonical(at: SocketAddr) -> SocketAddr {
    SocketAddr::new(at.ip().to_canonical(), at.port())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use libp2p::core::muxing::StreamMuxerExt;
    use libp2p::futures::{AsyncReadExt, AsyncWriteExt};
    use protocol::identity::NodeKey;

    use super::*;
    use crate::mesh::{MeshCounters, MeshLimits};

    const SOON: Duration = Duration::from_secs(20);
    const DIAL: DialOpts = DialOpts { role: core::Endpoint::Dialer, port_use: PortUse::Reuse };
    const PUNCH: DialOpts = DialOpts { role: core::Endpoint::Listener, port_use: PortUse::Reuse };

    fn endpoint(seed: u8, at: &str) -> Endpoint {
        let limits =
            MeshLimits { handshake_timeout: Duration::from_millis(400), ..MeshLimits::default() };
        let key = NodeKey::from_secret([seed; 32]);
        let counters = Arc::<MeshCounters>::default();
        let endpoint =
            Endpoint::bind(&key, at.parse().unwrap(), Arc::new(limits), counters).unwrap();
        tokio::spawn(endpoint.clone().serve_overlay());
        endpoint
    }

    /// A transport that listens on loopback, and where.
    async fn listening(seed: u8) -> (QuicTransport, SocketAddr) {
        let endpoint = endpoint(seed, "127.0.0.1:0");
        let at = endpoint.address().unwrap();
        let mut transport = QuicTransport::new(endpoint);
        transport.listen_on(ListenerId::next(), quic(at)).unwrap();
        match next(&mut transport).await {
            TransportEvent::NewAddress { listen_addr, .. } => assert_eq!(listen_addr, quic(at)),
            other => panic!("{other:?}"),
        }
        (transport, at)
    }

    async fn next(transport: &mut QuicTransport) -> Event {
        let event = std::future::poll_fn(|cx| Pin::new(&mut *transport).poll(cx));
        tokio::time::timeout(SOON, event).await.expect("the transport says something")
    }

    async fn arrival(transport: &mut QuicTransport) -> (Output, Multiaddr) {
        match next(transport).await {
            TransportEvent::Incoming { upgrade, send_back_addr, .. } => {
                (upgrade.await.unwrap(), send_back_addr)
            }
            other => panic!("{other:?}"),
        }
    }

    fn id(seed: u8) -> PeerId {
        peer_id(NodeKey::from_secret([seed; 32]).id()).unwrap()
    }

    #[tokio::test]
    async fn both_ends_know_who_is_there_and_streams_go_both_ways() {
        let (mut a, at_a) = listening(1).await;
        let (mut b, at_b) = listening(2).await;
        let dialling = a.dial(quic(at_b), DIAL).unwrap();
        let (dialled, (arrived, from)) = tokio::join!(dialling, arrival(&mut b));
        let ((peer_b, mut muxer_a), (peer_a, mut muxer_b)) = (dialled.unwrap(), arrived);
        assert_eq!((peer_a, peer_b), (id(1), id(2)));
        assert_eq!(from, quic(at_a), "it leaves from the port it listens on");

        let out = std::future::poll_fn(|cx| muxer_a.poll_outbound_unpin(cx));
        let mut out = tokio::time::timeout(SOON, out).await.unwrap().unwrap();
        out.write_all(b"over").await.unwrap();
        out.close().await.unwrap();
        out.close().await.unwrap();
        let incoming = std::future::poll_fn(|cx| muxer_b.poll_inbound_unpin(cx));
        let mut incoming = tokio::time::timeout(SOON, incoming).await.unwrap().unwrap();
        let mut heard = Vec::new();
        incoming.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"over");
        incoming.write_all(b"and back").await.unwrap();
        incoming.close().await.unwrap();
        heard.clear();
        out.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"and back");

        // Whoever drops its end closes the connection, and the other sees it.
        drop(muxer_a);
        let ended = std::future::poll_fn(|cx| muxer_b.poll_inbound_unpin(cx));
        assert!(tokio::time::timeout(SOON, ended).await.unwrap().is_err());
        let closed = std::future::poll_fn(|cx| muxer_b.poll_close_unpin(cx));
        tokio::time::timeout(SOON, closed).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_fresh_port_is_another_one() {
        let (mut a, at_a) = listening(1).await;
        let (mut b, at_b) = listening(2).await;
        let fresh = DialOpts { port_use: PortUse::New, ..DIAL };
        let dialling = a.dial(quic(at_b), fresh).unwrap();
        let (dialled, (_, from)) = tokio::join!(dialling, arrival(&mut b));
        assert_eq!(dialled.unwrap().0, id(2));
        assert_ne!(from, quic(at_a));
    }

    #[tokio::test]
    async fn a_punched_hole_is_taken_by_who_was_awaited() {
        let (mut a, at_a) = listening(1).await;
        let (mut b, at_b) = listening(2).await;
        let awaiting = a.punch(at_b).unwrap();
        // The same hole is not punched twice at a time.
        assert!(matches!(a.punch(at_b), Err(Failed::Punching(_))));
        let dialling = b.dial(quic(at_a), DIAL).unwrap();
        let polled = std::future::poll_fn(|cx| Pin::new(&mut a).poll(cx));
        let (came, dialled) = tokio::select! {
            both = async { tokio::join!(awaiting, dialling) } => both,
            event = polled => panic!("{event:?}"),
        };
        assert_eq!((came.unwrap().0, dialled.unwrap().0), (id(2), id(1)));
    }

    #[tokio::test]
    async fn who_is_not_there_costs_a_bounded_time() {
        let (mut a, _) = listening(1).await;
        // Bound, and silent.
        let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let at = nobody.local_addr().unwrap();
        let began = Instant::now();
        for (options, limit) in [(DIAL, Duration::from_secs(4)), (PUNCH, PUNCH_TIME * 3)] {
            let dialling = a.dial(quic(at), options).unwrap();
            let failed = tokio::time::timeout(limit, dialling).await.expect("it ends");
            assert!(failed.is_err(), "after {:?}", began.elapsed());
        }
        // Packets that open a hole are small and no QUIC.
        nobody.set_read_timeout(Some(SOON)).unwrap();
        let mut buffer = [0; 2048];
        let poked = (0..1000).any(|_| {
            let bytes = nobody.recv(&mut buffer).unwrap();
            bytes == PUNCH_BYTES && buffer[0] & 0x40 == 0
        });
        assert!(poked);
    }

    #[tokio::test]
    async fn addresses_that_lead_nowhere_are_refused_at_once() {
        let (mut a, at) = listening(1).await;
        for (address, supported) in [
            ("/ip4/127.0.0.1/tcp/1", false),
            ("/ip4/127.0.0.1/udp/0/quic-v1", false),
            ("/ip4/0.0.0.0/udp/1/quic-v1", false),
            ("/ip4/192.0.2.1/udp/1/quic-v1", true),
        ] {
            let refused = a.dial(address.parse().unwrap(), DIAL).map(|_| ()).unwrap_err();
            let is_unsupported = matches!(refused, TransportError::MultiaddrNotSupported(_));
            assert_eq!(is_unsupported, !supported, "{address}");
        }
        let id = ListenerId::next();
        assert!(a.listen_on(id, quic(at)).is_err(), "it listens already");
        let other = SocketAddr::new(at.ip(), 1);
        assert!(QuicTransport::new(a.endpoint.clone()).listen_on(id, quic(other)).is_err());
    }

    #[tokio::test]
    async fn closing_the_endpoint_ends_the_listener() {
        let (mut a, at) = listening(1).await;
        let endpoint = a.endpoint.clone();
        endpoint.close("over").await;
        match next(&mut a).await {
            TransportEvent::ListenerClosed { reason, .. } => assert!(reason.is_err()),
            other => panic!("{other:?}"),
        }
        drop((a, endpoint));
        let freed = async {
            // The tasks of the endpoint let go of the socket a moment later.
            while std::net::UdpSocket::bind(at).is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(SOON, freed).await.expect("the port is free again");
    }

    #[tokio::test]
    async fn on_all_interfaces_their_addresses_are_announced() {
        let endpoint = endpoint(1, "0.0.0.0:0");
        let at = endpoint.address().unwrap();
        let mut transport = QuicTransport::new(endpoint);
        transport.listen_on(ListenerId::next(), quic(at)).unwrap();
        let loopback = SocketAddr::from(([127, 0, 0, 1], at.port()));
        // Every host has this one, in whatever order they come.
        loop {
            match next(&mut transport).await {
                TransportEvent::NewAddress { listen_addr, .. } if listen_addr == quic(loopback) => {
                    return;
                }
                TransportEvent::NewAddress { listen_addr, .. } => {
                    let Some(Address::Direct(other)) = Address::of(&listen_addr) else {
                        panic!("{listen_addr}");
                    };
                    assert!(other.port() == at.port() && !other.ip().is_unspecified());
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
