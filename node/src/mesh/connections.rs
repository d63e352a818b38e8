//! Connections of members: admitted, served, counted and cut off.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use protocol::NodeId;
use protocol::carry::{self, Carrying, Parcel};
use protocol::frame::{Frame, Kind};
use protocol::identity::greeting::{GreetingError, GreetingOutput};
use protocol::identity::join::{Contact, Refusal};
use protocol::identity::{Attempts, AttemptsConfig, Certificate, InviteId, SignedRecord};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::carried::is_carried;
use super::exchange::{self, Answered, Exchange};
use super::frames::{DataStream, FrameRate, FrameReader, FrameStream, FrameWriter};
use super::identity::{Identity, Standing};
use super::limits::{MeshCounters, MeshLimits};
use super::quic::{Endpoint, Link, Plane};
use super::rpc::{CODE_METHOD, Call, CallStream, ECHO, Request, TRUST, TRUST_DIGEST};
use super::traffic::Traffic;

/// Why a connection is closed, as the peer sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CloseCode {
    Done = 0,
    /// No valid membership.
    NotAdmitted = 1,
    /// Broken frames, floods, too many faults.
    Misbehaved = 2,
    /// A bound was met.
    Limit = 3,
    /// A newer connection took its place.
    Replaced = 4,
    /// The peer's process has ended; only this side hears it.
    Gone = 5,
}

/// What happened to a peer.
#[derive(Clone, Debug)]
pub enum PeerEvent {
    /// A member is connected.
    Connected { node: NodeId, certificate: Box<Certificate>, address: std::net::SocketAddr },
    /// How packets travel on its newest connection.
    Path { node: NodeId, carried: bool },
    /// Its last connection is gone.
    Disconnected { node: NodeId },
}

/// Who takes what members send. Must not block.
pub trait Service: Send + Sync + 'static {
    /// A datagram of a member.
    fn datagram(&self, _from: NodeId, _bytes: Bytes) {}

    fn event(&self, _event: PeerEvent) {}

    /// A member asks for KV blocks: the first frame of a stream that is for nothing else.
    fn kv_control(&self, _from: NodeId, _ask: Frame, _stream: FrameStream) {}

    /// A member sends KV blocks; the first frame says to what they belong.
    fn kv_data(&self, _from: NodeId, _header: Frame, _stream: DataStream) {}

    /// A call of a member; `Err` gives it back if the method is not known.
    fn call(&self, call: Call) -> Result<BoxFuture<'static, ()>, Box<Call>> {
        Err(Box::new(call))
    }
}

/// Every connection of the node.
pub(super) struct Connections {
    pub identity: Arc<Identity>,
    pub endpoint: Endpoint,
    pub limits: Arc<MeshLimits>,
    pub counters: Arc<MeshCounters>,
    pub service: Arc<dyn Service>,
    /// Where this node can be reached.
    pub contact: Contact,
    pub stop: CancellationToken,
    pub tasks: TaskTracker,
    /// Something about authorities, revocations or tokens is new and others must hear of it.
    pub news: tokio::sync::Notify,
    /// For whom this node carries packets.
    pub carrying: Mutex<Carrying>,
    /// To whom others have carried.
    pub carried_once: Mutex<BTreeSet<NodeId>>,
    start: Instant,
    handshakes: AtomicUsize,
    table: Mutex<Table>,
}

struct Table {
    peers: BTreeMap<NodeId, Vec<Arc<Connection>>>,
    /// Of connections that have ended.
    ended: Traffic,
    banned: BTreeMap<NodeId, Instant>,
    by_address: Attempts<IpAddr>,
    by_token: Attempts<InviteId>,
}

/// A connection of an admitted member.
pub(super) struct Connection {
    pub link: Link,
    /// The newest that the peer has shown.
    certificate: Mutex<Certificate>,
    rate: Arc<FrameRate>,
    faults: AtomicU32,
    /// Set by the fault that cuts it off: others may come at the same moment, on other streams.
    is_cut_off: AtomicBool,
}

impl Connection {
    fn certificate(&self) -> Certificate {
        self.certificate.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Connections {
    pub fn new(
        identity: Arc<Identity>,
        endpoint: Endpoint,
        (limits, counters): (Arc<MeshLimits>, Arc<MeshCounters>),
        service: Arc<dyn Service>,
        contact: Contact,
    ) -> Arc<Self> {
        let config = AttemptsConfig {
            burst: limits.join_burst,
            refill: limits.join_refill,
            keys_max: ATTEMPT_KEYS_MAX,
        };
        let table = Table {
            peers: BTreeMap::new(),
            ended: Traffic::default(),
            banned: BTreeMap::new(),
            by_address: Attempts::new(config),
            by_token: Attempts::new(config),
        };
        let carrying = Mutex::new(Carrying::new(limits.carry));
        Arc::new(Connections {
            identity,
            endpoint,
            carrying,
            carried_once: Mutex::default(),
            limits,
            counters,
            service,
            contact,
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            news: tokio::sync::Notify::new(),
            start: Instant::now(),
            handshakes: AtomicUsize::new(0),
            table: Mutex::new(table),
        })
    }

    /// Takes connections until the endpoint closes.
    pub async fn accept_all(self: Arc<Self>) {
        loop {
            let incoming = tokio::select! {
                () = self.stop.cancelled() => return,
                incoming = self.endpoint.accept() => incoming,
            };
            let Some(incoming) = incoming else { return };
            let busy =
                self.handshakes.load(Ordering::Relaxed) >= self.limits.handshakes_before_retry;
            if busy && !incoming.remote_address_validated() && incoming.may_retry() {
                let _ = incoming.retry();
                continue;
            }
            self.handshakes.fetch_add(1, Ordering::Relaxed);
            let this = self.clone();
            self.tasks.spawn(async move {
                match this.endpoint.finish(incoming).await {
                    Ok(link) if link.plane() == Plane::Data => this.clone().receive(link).await,
                    other => {
                        this.handshakes.fetch_sub(1, Ordering::Relaxed);
                        match other {
                            // The overlay has ways of its own.
                            Ok(link) if is_carried(link.address()) => {
                                link.close(CloseCode::NotAdmitted as u32, "not over a carrier");
                            }
                            Ok(link) => this.endpoint.hand_over(link),
                            Err(_) => {}
                        }
                    }
                }
            });
        }
    }

    /// Whatever a peer that connected to this node wants: a certificate, or to be greeted.
    async fn receive(self: Arc<Self>, link: Link) {
        let begun = self.begin(&link).await;
        self.handshakes.fetch_sub(1, Ordering::Relaxed);
        match begun {
            Ok(Some(certificate)) => self.serve(link, certificate).await,
            Ok(None) => link.close(CloseCode::Done as u32, "done"),
            Err((code, why)) => {
                MeshCounters::add(&self.counters.not_admitted);
                tracing::debug!(peer = %link.peer().short(), address = %link.address(), why, "not admitted");
                link.close(code as u32, &why);
            }
        }
    }

    /// The first stream of a connection: a certificate if the peer is a member, `None` if it joined.
    async fn begin(
        self: &Arc<Self>,
        link: &Link,
    ) -> Result<Option<Certificate>, (CloseCode, String)> {
        let refuse = |code: CloseCode, why: &str| Err((code, why.to_owned()));
        if self.is_banned(link.peer()) {
            MeshCounters::add(&self.counters.refused);
            return refuse(CloseCode::Misbehaved, "cut off for a while");
        }
        let Some(standing) = self.identity.standing() else {
            return refuse(CloseCode::NotAdmitted, "this node belongs to no mesh");
        };
        let within = self.limits.handshake_timeout;
        let Ok(Ok(stream)) = tokio::time::timeout(within, link.accept()).await else {
            return refuse(CloseCode::NotAdmitted, "no greeting");
        };
        let mut exchange = Exchange::new(stream, self.limits.clone());
        let first = match exchange.reader.next_within(&exchange.rate, within).await {
            Ok(Some(frame)) => frame,
            Ok(None) => return refuse(CloseCode::NotAdmitted, "no greeting"),
            Err(error) => {
                if error.is_misbehaviour() {
                    MeshCounters::add(&self.counters.faults);
                }
                return Err((CloseCode::NotAdmitted, error.to_string()));
            }
        };
        match first.kind {
            Kind::JOIN_HELLO => {
                self.answer(exchange, link, standing, first).await?;
                Ok(None)
            }
            Kind::PEER_HELLO => {
                self.greet(&mut exchange, link, standing, Some(first)).await.map(Some)
            }
            Kind(kind) => {
                MeshCounters::add(&self.counters.faults);
                let why = format!("a frame of kind {kind} before membership was shown");
                Err((CloseCode::NotAdmitted, why))
            }
        }
    }

    async fn answer(
        self: &Arc<Self>,
        exchange: Exchange,
        link: &Link,
        standing: Standing,
        first: protocol::frame::Frame,
    ) -> Result<(), (CloseCode, String)> {
        let key = address_key(link.address().ip());
        let now = self.now();
        let attempt = self.lock().by_address.attempt(now, &key);
        if let Err(wait) = attempt {
            MeshCounters::add(&self.counters.joins_limited);
            let why = format!("too many attempts from {}: wait {} s", key, wait.as_secs() + 1);
            return Err((CloseCode::Limit, why));
        }
        let contacts = self.identity.contacts(Some(self.contact.clone()));
        let node = link.peer();
        let redeem = |record: SignedRecord| -> BoxFuture<'static, Result<(), Refusal>> {
            let this = self.clone();
            Box::pin(async move { this.redeem(record, node).await })
        };
        let identity = &self.identity;
        match exchange::answer(exchange, link, identity, standing, contacts, first, redeem).await {
            Answered::Granted(certificate) => {
                MeshCounters::add(&self.counters.granted);
                tracing::info!(node = %link.peer().short(), roles = %certificate.body.roles, "certificate granted");
                self.promote(certificate).await;
                Ok(())
            }
            Answered::Redirected => Ok(()),
            Answered::Failed(error) => {
                MeshCounters::add(&self.counters.joins_refused);
                if error.is_misbehaviour() {
                    MeshCounters::add(&self.counters.faults);
                }
                tracing::info!(node = %link.peer().short(), address = %link.address(), %error, "join refused");
                Err((CloseCode::NotAdmitted, "the join was refused".to_owned()))
            }
        }
    }

    /// Counts the use of a token, off the async threads, and lets the other authorities know.
    async fn redeem(self: &Arc<Self>, record: SignedRecord, node: NodeId) -> Result<(), Refusal> {
        let now = self.now();
        let attempt = self.lock().by_token.attempt(now, &record.body.id);
        if let Err(wait) = attempt {
            MeshCounters::add(&self.counters.joins_limited);
            return Err(Refusal::Busy { retry_s: wait.as_secs() + 1 });
        }
        let identity = self.identity.clone();
        let redeemed = blocking(move || identity.redeem(&record, node)).await;
        if matches!(redeemed, Ok(Some(_))) {
            self.news.notify_one();
        }
        redeemed.map(drop)
    }

    async fn promote(self: &Arc<Self>, certificate: Certificate) {
        let identity = self.identity.clone();
        match blocking(move || identity.promote(&certificate)).await {
            Ok(true) => self.news.notify_one(),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "no further authority could be made"),
        }
    }

    async fn greet(
        self: &Arc<Self>,
        exchange: &mut Exchange,
        link: &Link,
        standing: Standing,
        first: Option<protocol::frame::Frame>,
    ) -> Result<Certificate, (CloseCode, String)> {
        let learn = |output: GreetingOutput| -> BoxFuture<'static, ()> {
            let this = self.clone();
            Box::pin(async move { this.learn(output).await })
        };
        exchange::greet(exchange, link, &self.identity, standing, first, learn).await.map_err(
            |error| {
                if matches!(error, GreetingError::Violation(_)) {
                    MeshCounters::add(&self.counters.faults);
                }
                (CloseCode::NotAdmitted, error.to_string())
            },
        )
    }

    /// Takes over what a peer knew and this node did not.
    async fn learn(&self, output: GreetingOutput) {
        let (chain, events) = match output {
            GreetingOutput::Chain(chain) => (Some(chain), Vec::new()),
            GreetingOutput::Revocations(events) => (None, events),
            _ => return,
        };
        let identity = self.identity.clone();
        match blocking(move || identity.merge(chain, events)).await {
            Ok(true) => {
                self.enforce();
                self.news.notify_one();
            }
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "what a member knows could not be taken over"),
        }
    }

    /// Dials a member and greets it. It is served until it is gone.
    pub async fn connect(
        self: &Arc<Self>,
        address: std::net::SocketAddr,
        node: Option<NodeId>,
    ) -> Result<NodeId, String> {
        let link = self.endpoint.dial(address, node).await.map_err(|e| chain_text(&e))?;
        let peer = link.peer();
        if peer == self.identity.id() {
            link.close(CloseCode::Done as u32, "this is me");
            return Err(format!("{address} is this node itself"));
        }
        let Some(standing) = self.identity.standing() else {
            return Err("this node belongs to no mesh".to_owned());
        };
        let opened = tokio::time::timeout(self.limits.stream_timeout, link.open()).await;
        let Ok(Ok(stream)) = opened else {
            return Err(format!("{address} accepts no stream"));
        };
        let mut exchange = Exchange::new(stream, self.limits.clone());
        match self.greet(&mut exchange, &link, standing, None).await {
            Ok(certificate) => {
                let this = self.clone();
                let (admitted, is_admitted) = tokio::sync::oneshot::channel();
                self.tasks.spawn(async move {
                    let connection = this.admit(&link, certificate);
                    let _ = admitted.send(());
                    this.run(connection).await;
                });
                let _ = is_admitted.await;
                Ok(peer)
            }
            Err((code, why)) => {
                MeshCounters::add(&self.counters.not_admitted);
                link.close(code as u32, &why);
                Err(why)
            }
        }
    }

    async fn serve(self: Arc<Self>, link: Link, certificate: Certificate) {
        let connection = self.admit(&link, certificate);
        self.run(connection).await;
    }

    /// Puts a connection into the table; the oldest of the same peer makes room.
    fn admit(self: &Arc<Self>, link: &Link, certificate: Certificate) -> Arc<Connection> {
        MeshCounters::add(&self.counters.admitted);
        let node = link.peer();
        let rate = Arc::new(FrameRate::new(self.limits.frames_per_second_max));
        let connection = Arc::new(Connection {
            link: link.clone(),
            certificate: Mutex::new(certificate.clone()),
            rate,
            faults: AtomicU32::new(0),
            is_cut_off: AtomicBool::new(false),
        });
        link.allow_streams(self.limits.streams_per_peer);
        let mut table = self.lock();
        let of_peer = table.peers.entry(node).or_default();
        let is_first = of_peer.is_empty();
        of_peer.push(connection.clone());
        // They leave the table when they have ended.
        let surplus = of_peer.len().saturating_sub(self.limits.connections_per_peer.max(1));
        for old in &of_peer[..surplus] {
            old.link.close(CloseCode::Replaced as u32, "replaced by a newer one");
        }
        drop(table);
        if is_first {
            let (certificate, address) = (Box::new(certificate), link.address());
            self.service.event(PeerEvent::Connected { node, certificate, address });
        }
        self.retire_carried(&connection);
        self.service.event(PeerEvent::Path { node, carried: !self.is_direct(node) });
        connection
    }

    /// Serves a member's streams and datagrams until the connection ends.
    async fn run(self: &Arc<Self>, connection: Arc<Connection>) {
        let node = connection.link.peer();
        // What was revoked while the greeting ran.
        self.enforce();
        self.remember(&connection).await;
        loop {
            tokio::select! {
                () = self.stop.cancelled() => break,
                () = connection.link.closed() => break,
                stream = connection.link.accept() => {
                    let Ok(stream) = stream else { break };
                    let (this, connection) = (self.clone(), connection.clone());
                    // As many as quinn lets the peer open: `streams_per_peer`.
                    self.tasks.spawn(async move { this.stream(&connection, stream).await });
                }
                stream = connection.link.accept_data() => {
                    let Ok(stream) = stream else { break };
                    let (this, connection) = (self.clone(), connection.clone());
                    // As many as quinn lets the peer open.
                    self.tasks.spawn(async move { this.data_stream(&connection, stream).await });
                }
                datagram = connection.link.datagram() => {
                    let Ok(datagram) = datagram else { break };
                    match Parcel::is_one(&datagram) {
                        true => self.parcel(&connection, &datagram),
                        false => self.service.datagram(node, datagram),
                    }
                }
            }
        }
        let mut table = self.lock();
        table.ended += Traffic::of(&connection.link);
        let gone = match table.peers.get_mut(&node) {
            Some(of_peer) => {
                of_peer.retain(|c| !Arc::ptr_eq(c, &connection));
                of_peer.is_empty()
            }
            None => false,
        };
        if gone {
            table.peers.remove(&node);
        }
        drop(table);
        if !self.is_direct(node) {
            self.carrier_gone(node);
        }
        if gone {
            self.service.event(PeerEvent::Disconnected { node });
        }
    }

    /// Keeps where a member is for the next start, and lets an authority know which tokens are used.
    async fn remember(self: &Arc<Self>, connection: &Connection) {
        let (node, address) = (connection.link.peer(), connection.link.address());
        let identity = self.identity.clone();
        // A way over a carrier is an address to this process only.
        if !is_carried(address)
            && let Err(error) = blocking(move || identity.learn_contact(node, address)).await
        {
            tracing::warn!(%error, "the address of a member cannot be stored");
        }
        let Some(Standing { trust, .. }) = self.identity.standing() else { return };
        if trust.is_authority(node) && trust.is_authority(self.identity.id()) {
            let this = self.clone();
            self.tasks.spawn(async move {
                if let Err(error) = this.tell(node).await {
                    tracing::debug!(%error, "an authority could not be told of used tokens");
                }
            });
        }
    }

    /// One stream of a member: one call.
    async fn stream(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        (send, receive): (quinn::SendStream, quinn::RecvStream),
    ) {
        let limits = &self.limits;
        let mut reader = FrameReader::new(receive, limits.frame_bytes_max);
        let writer = FrameWriter::new(send);
        let frame = loop {
            match reader.next_within(&connection.rate, limits.stream_timeout).await {
                Ok(Some(frame)) if frame.kind.is_optional() => continue,
                Ok(Some(frame)) => break frame,
                // Opened and left: no fault.
                Ok(None) => return,
                Err(error) => return self.fault(connection, &error, error.is_misbehaviour()),
            }
        };
        MeshCounters::add(&self.counters.frames);
        if frame.kind == Kind::KV_ASK {
            let (rate, stream_timeout) = (connection.rate.clone(), limits.stream_timeout);
            let stream = FrameStream { reader, writer, rate, stream_timeout };
            return self.service.kv_control(connection.link.peer(), frame, stream);
        }
        if frame.kind != Kind::RPC_REQUEST {
            let why = format!("a stream that begins with a frame of kind {}", frame.kind.0);
            return self.fault(connection, &why, false);
        }
        let request = match protocol::wire::decode::<Request, REQUEST_BYTES_MAX>(&frame.body) {
            Ok(request) => request,
            Err(error) => return self.fault(connection, &error, true),
        };
        let stream = CallStream {
            peer: connection.link.peer(),
            reader,
            writer,
            rate: connection.rate.clone(),
            stream_timeout: limits.stream_timeout,
        };
        let call = Call { from: connection.link.peer(), request, stream };
        let handled = match call.request.method.as_str() {
            ECHO => {
                let Call { request, stream, .. } = call;
                stream.reply(request.body).await.map_err(Some)
            }
            TRUST => self.trust(call).await.map_err(Some),
            TRUST_DIGEST => self.compare_trust(connection.certificate(), call).await.map_err(Some),
            carry::METHOD => self.asked_to_carry(call).await.map_err(Some),
            _ => match self.service.call(call) {
                Ok(handling) => {
                    handling.await;
                    Ok(())
                }
                Err(call) => {
                    let _ = call.stream.refuse(CODE_METHOD, "this method is not known here").await;
                    Err(None)
                }
            },
        };
        match handled {
            Ok(()) => {}
            Err(Some(error)) => self.fault(connection, &error, false),
            Err(None) => self.fault(connection, &"unknown method", false),
        }
    }

    /// One stream of a member's KV blocks.
    async fn data_stream(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        receive: quinn::RecvStream,
    ) {
        let mut reader = FrameReader::new(receive, self.limits.frame_bytes_max);
        match reader.next_within(&connection.rate, self.limits.stream_timeout).await {
            Ok(Some(header)) => {
                MeshCounters::add(&self.counters.frames);
                let stream = DataStream { reader, rate: connection.rate.clone() };
                self.service.kv_data(connection.link.peer(), header, stream);
            }
            Ok(None) => {}
            Err(error) => self.fault(connection, &error, error.is_misbehaviour()),
        }
    }

    /// Counts what a member does wrong; cuts it off when it is too much, or at once.
    fn fault(&self, connection: &Connection, why: &dyn std::fmt::Display, at_once: bool) {
        if connection.link.is_closed() {
            return;
        }
        MeshCounters::add(&self.counters.faults);
        let faults = connection.faults.fetch_add(1, Ordering::Relaxed) + 1;
        if !at_once && faults < self.limits.faults_max {
            return;
        }
        if connection.is_cut_off.swap(true, Ordering::Relaxed) {
            return;
        }
        let node = connection.link.peer();
        MeshCounters::add(&self.counters.cut_off);
        tracing::info!(peer = %node.short(), why = %why, faults, "cut off");
        connection.link.close(CloseCode::Misbehaved as u32, "misbehaved");
        let mut table = self.lock();
        let now = Instant::now();
        table.banned.retain(|_, until| *until > now);
        if table.banned.len() < BANNED_MAX {
            table.banned.insert(node, now + self.limits.ban);
        }
    }

    fn is_banned(&self, node: NodeId) -> bool {
        self.lock().banned.get(&node).is_some_and(|until| *until > Instant::now())
    }

    /// Closes the connections of those who are no members any more: revoked, or not renewed.
    pub fn enforce(&self) {
        let Some(Standing { trust, .. }) = self.identity.standing() else { return };
        let now = self.identity.now();
        for connection in self.every() {
            let node = connection.link.peer();
            if let Err(error) = trust.check(&connection.certificate(), node, now) {
                tracing::info!(peer = %node.short(), %error, "disconnected");
                connection.link.close(CloseCode::NotAdmitted as u32, &error.to_string());
            }
        }
    }

    /// Takes the renewed certificate of a connected member.
    pub fn renewed(&self, node: NodeId, certificate: &Certificate) {
        for connection in self.every().iter().filter(|c| c.link.peer() == node) {
            let mut known = connection.certificate.lock().unwrap_or_else(PoisonError::into_inner);
            if certificate.body.expires > known.body.expires {
                *known = certificate.clone();
            }
        }
    }

    pub fn every(&self) -> Vec<Arc<Connection>> {
        self.lock().peers.values().flatten().cloned().collect()
    }

    /// Of all connections since the start.
    pub fn traffic(&self) -> Traffic {
        let table = self.lock();
        let mut all = table.ended;
        for connection in table.peers.values().flatten() {
            all += Traffic::of(&connection.link);
        }
        all
    }

    /// Every connection to a member.
    pub fn of(&self, node: NodeId) -> Vec<Arc<Connection>> {
        self.lock().peers.get(&node).cloned().unwrap_or_default()
    }

    /// The newest connection to a member, without a carrier if there is one.
    pub fn to(&self, node: NodeId) -> Option<Arc<Connection>> {
        let table = self.lock();
        let open = table.peers.get(&node)?.iter().filter(|c| !c.link.is_closed());
        open.max_by_key(|c| !is_carried(c.link.address())).cloned()
    }

    /// The newest connection to a member that nobody carries.
    pub fn direct(&self, node: NodeId) -> Option<Arc<Connection>> {
        self.to(node).filter(|c| !is_carried(c.link.address()))
    }

    /// One connection of each member.
    pub fn all(&self) -> Vec<Arc<Connection>> {
        let table = self.lock();
        table.peers.values().filter_map(|of_peer| of_peer.last().cloned()).collect()
    }

    /// Opens a call.
    pub async fn call(
        &self,
        node: NodeId,
        request: &Request,
    ) -> Result<CallStream, super::CallError> {
        use super::CallError;
        let connection = self.to(node).ok_or(CallError::NotConnected(node))?;
        let within = self.limits.stream_timeout;
        let opened = tokio::time::timeout(within, connection.link.open()).await;
        let (send, receive) = match opened {
            Ok(Ok(stream)) => stream,
            Ok(Err(_)) => return Err(CallError::NotConnected(node)),
            Err(_) => return Err(CallError::Deadline { node, after: within }),
        };
        let mut stream = CallStream {
            peer: node,
            reader: FrameReader::new(receive, self.limits.frame_bytes_max),
            writer: FrameWriter::new(send),
            rate: connection.rate.clone(),
            stream_timeout: within,
        };
        stream.send(protocol::frame::Frame::new(Kind::RPC_REQUEST, request)).await?;
        Ok(stream)
    }

    /// Opens a stream for frames of KV transfers.
    pub async fn open_frames(&self, node: NodeId) -> Result<FrameStream, super::CallError> {
        use super::CallError;
        let connection = self.to(node).ok_or(CallError::NotConnected(node))?;
        let within = self.limits.stream_timeout;
        let opened = tokio::time::timeout(within, connection.link.open()).await;
        let late = CallError::Deadline { node, after: within };
        let (send, receive) =
            opened.map_err(|_| late)?.map_err(|_| CallError::NotConnected(node))?;
        Ok(FrameStream {
            reader: FrameReader::new(receive, self.limits.frame_bytes_max),
            writer: FrameWriter::new(send),
            rate: connection.rate.clone(),
            stream_timeout: within,
        })
    }

    /// Opens one-way streams for KV blocks: one, and up to `streams` if the peer allows more of them at
    /// once. Waiting for those would leave two transfers with half of what each waits for.
    pub async fn open_data(
        &self,
        node: NodeId,
        streams: usize,
    ) -> Result<Vec<FrameWriter>, super::CallError> {
        use super::CallError;
        let connection = self.to(node).ok_or(CallError::NotConnected(node))?;
        let first = connection.link.open_data().await;
        let first = first.map_err(|_| CallError::NotConnected(node))?;
        let others = (1..streams).map_while(|_| connection.link.open_data_now());
        Ok([first].into_iter().chain(others).map(FrameWriter::new).collect())
    }

    pub fn now(&self) -> protocol::Instant {
        protocol::Instant::ORIGIN + self.start.elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs what writes to the disk.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("work on the identity does not panic")
}

/// Hosts behind one IPv6 prefix are one: they have 2^64 addresses each.
fn address_key(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            IpAddr::from([a, b, c, d, 0, 0, 0, 0])
        }
        v4 => v4,
    }
}

/// An error with its sources, in one line.
pub(super) fn chain_text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Addresses and tokens whose attempts are counted at once.
const ATTEMPT_KEYS_MAX: usize = 4096;
/// Peers that are cut off at once; beyond that they are cut off connection by connection.
const BANNED_MAX: usize = 1024;
/// Memory that a request may claim while it is decoded.
const REQUEST_BYTES_MAX: usize = 4 << 20;

/// Time in which a call about trust is answered.
pub(super) const TRUST_DEADLINE: Duration = Duration::from_secs(10);
