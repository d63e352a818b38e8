//! The shell around the swarm: one task that turns members, commands and the swarm's events into calls of
//! [`Peers`] and of libp2p, and what comes of them into events. It waits for nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use libp2p::core::ConnectedPoint;
use libp2p::core::transport::ListenerId;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionDenied, ConnectionId, DialError, ListenError, SwarmEvent};
use libp2p::{
    Multiaddr, PeerId, Swarm, allow_block_list, connection_limits, dcutr, gossipsub, identify, kad,
    mdns, relay,
};
use libp2p_autonat::v1 as autonat;
use protocol::{Instant, NodeId};
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::address::{self, Address, makes_sense, node_id, peer_id};
use super::behaviour::{self, Behaviour, BehaviourEvent};
use super::limits::{
    ADDRESSES_PER_NODE_MAX, CANDIDATES_MAX, GOODBYE_MAX, LOOKUP_MAX, LOOKUP_MIN, RELAY_RETRY,
    RELAYS_WANTED, TICK,
};
use super::peers::{self, Bucket, Ignored, Peers, Verdict};
use super::supervisor::Listening;
use super::{
    CutOff, Discovery, Member, Nat, OverlayConfig, OverlayEvent, OverlayStatus, Path, Reachability,
};
use crate::metrics::OverlayMetrics;

/// What the node asks of the overlay.
#[derive(Debug)]
pub(super) enum Command {
    Dial(NodeId),
    Publish(Bytes),
    AddExternal(SocketAddr),
    /// A fault of the kind that libp2p had.
    #[cfg(test)]
    Break,
}

/// The overlay's ends of its channels; they outlive a task that broke.
pub(super) struct Ends {
    pub members: watch::Receiver<Arc<[Member]>>,
    pub inbox: mpsc::Receiver<Command>,
    pub events: mpsc::Sender<OverlayEvent>,
    pub status: watch::Sender<OverlayStatus>,
    pub stop: CancellationToken,
    pub metrics: OverlayMetrics,
}

/// Why a task ended.
pub(super) enum End {
    Stopped,
    /// A socket is gone.
    Deaf(String),
}

/// A swarm with everything that is remembered beside it.
pub(super) struct Task<'a> {
    ends: &'a mut Ends,
    swarm: Swarm<Behaviour>,
    listener: ListenerId,
    peers: Peers,
    began: tokio::time::Instant,
    protocol: String,
    topic: gossipsub::TopicHash,
    reachability: Reachability,
    serve_relay: bool,
    nat: Nat,
    listening: BTreeSet<SocketAddr>,
    /// Addresses that members saw us at, at most [`CANDIDATES_MAX`]: each is told once.
    observed: BTreeSet<SocketAddr>,
    places: BTreeMap<NodeId, Place>,
    /// Relays that are left alone for a while; no more than there are members.
    relays_later: BTreeMap<NodeId, Instant>,
    /// Connections that others have through us.
    circuits: u32,
    publishes: Bucket,
    lookup_at: Instant,
    lookup_pause: Duration,
    restarts: u64,
    /// Whether the status is to be published.
    changed: bool,
    /// Events of this turn. They leave after the status: who has seen one finds it there.
    outbox: Vec<OverlayEvent>,
}

/// A place on a relay.
struct Place {
    listener: ListenerId,
    held: bool,
}

impl<'a> Task<'a> {
    pub(super) fn new(
        config: &OverlayConfig,
        node: NodeId,
        listening: Listening,
        ends: &'a mut Ends,
        restarts: u64,
    ) -> Task<'a> {
        let Listening { mut swarm, listener } = listening;
        swarm.behaviour_mut().relay.set_status(Some(relay::Status::Disable));
        // Below what others allow us, so that their clocks and ours need not agree.
        let rate = config.limits.messages_per_second * 3 / 4;
        Task {
            ends,
            swarm,
            listener,
            peers: Peers::new(node, config.limits.clone()),
            began: tokio::time::Instant::now(),
            protocol: behaviour::name(config.mesh, "overlay"),
            topic: behaviour::topic(config.mesh).hash(),
            reachability: config.reachability,
            serve_relay: config.serve_relay,
            nat: match config.reachability {
                Reachability::Probe => Nat::Unknown,
                Reachability::Public => Nat::Public,
                Reachability::Private => Nat::Private,
            },
            listening: BTreeSet::new(),
            observed: BTreeSet::new(),
            places: BTreeMap::new(),
            relays_later: BTreeMap::new(),
            circuits: 0,
            publishes: Bucket::new(Instant::ORIGIN, rate),
            lookup_at: Instant::ORIGIN + LOOKUP_MAX,
            lookup_pause: LOOKUP_MIN,
            restarts,
            changed: true,
            outbox: Vec::new(),
        }
    }

    /// Runs until it is stopped or deaf.
    pub(super) async fn run(mut self) -> End {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.set_members();
        if self.restarts > 0 {
            self.tell(OverlayEvent::Restarted);
        }
        loop {
            if std::mem::take(&mut self.changed) {
                self.publish_status();
            }
            self.send_events();
            tokio::select! {
                () = self.ends.stop.cancelled() => break,
                changed = self.ends.members.changed() => match changed {
                    Ok(()) => self.set_members(),
                    Err(_) => break,
                },
                command = self.ends.inbox.recv() => match command {
                    Some(command) => self.command(command),
                    None => break,
                },
                _ = tick.tick() => self.tick(),
                event = self.swarm.select_next_some() => {
                    if let Some(end) = self.on_swarm(event) {
                        return end;
                    }
                }
            }
        }
        self.say_goodbye().await;
        End::Stopped
    }

    fn now(&self) -> Instant {
        Instant::ORIGIN + self.began.elapsed()
    }

    fn tell(&mut self, event: OverlayEvent) {
        self.outbox.push(event);
    }

    /// Never waits: an event that finds no room is dropped.
    fn send_events(&mut self) {
        for event in self.outbox.drain(..) {
            if let Err(mpsc::error::TrySendError::Full(event)) = self.ends.events.try_send(event) {
                tracing::debug!(?event, "the node is behind: an overlay event is dropped");
                self.ends.metrics.events_dropped.increment(1);
            }
        }
    }

    fn set_members(&mut self) {
        let members = self.ends.members.borrow_and_update().clone();
        let changes = self.peers.set_members(self.now(), &members);
        if changes.ignored > 0 {
            tracing::error!(
                ignored = changes.ignored,
                "the mesh has more members than one overlay can hold: some will find nobody"
            );
        }
        for (node, connected) in changes.removed {
            if connected {
                self.tell(OverlayEvent::Disconnected { node });
            }
            if let Some(peer) = peer_id(node) {
                // Closes its connections, too.
                self.swarm.behaviour_mut().allowed.disallow_peer(peer);
                self.swarm.behaviour_mut().kad.remove_peer(&peer);
            }
            self.relays_later.remove(&node);
            if self.places.contains_key(&node) {
                self.leave_relay(node);
            }
        }
        if !changes.added.is_empty() {
            self.look_up_soon();
        }
        for node in changes.added {
            match peer_id(node) {
                Some(peer) => _ = self.swarm.behaviour_mut().allowed.allow_peer(peer),
                None => tracing::warn!(%node, "a member's id is nobody's key"),
            }
        }
        self.changed = true;
        self.dial_due();
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Dial(node) => {
                if self.peers.want(self.now(), node) {
                    self.dial_due();
                }
            }
            Command::Publish(bytes) => self.publish(bytes),
            Command::AddExternal(at) => self.add_external(address::quic(at)),
            #[cfg(test)]
            Command::Break => panic!("asked to"),
        }
    }

    fn add_external(&mut self, address: Multiaddr) {
        self.swarm.add_external_address(address);
        // The swarm tells only its protocols of what it was told itself.
        self.on_external();
    }

    fn publish(&mut self, bytes: Bytes) {
        let outcome = if !self.publishes.take(self.now()) {
            &self.ends.metrics.publishes_limited
        } else {
            match self.swarm.behaviour_mut().gossip.publish(self.topic.clone(), bytes) {
                Ok(_) => &self.ends.metrics.publishes_sent,
                Err(gossipsub::PublishError::NoPeersSubscribedToTopic) => {
                    &self.ends.metrics.publishes_unheard
                }
                Err(error) => {
                    tracing::debug!(%error, "a broadcast is not sent");
                    &self.ends.metrics.publishes_failed
                }
            }
        };
        outcome.increment(1);
    }

    fn tick(&mut self) {
        let now = self.now();
        for node in self.peers.pardoned(now) {
            if let Some(peer) = peer_id(node) {
                self.swarm.behaviour_mut().allowed.allow_peer(peer);
            }
        }
        self.dial_due();
        for connection in self.peers.replaced(now) {
            self.swarm.close_connection(connection);
        }
        self.relays_later.retain(|_, until| *until > now);
        self.take_places();
        if self.lookup_at <= now {
            self.lookup_at = now + self.lookup_pause;
            self.lookup_pause = (self.lookup_pause * 2).min(LOOKUP_MAX);
            // A lookup makes connections of its own: not more of them than help.
            if self.peers.is_lonely() {
                self.look_up();
            }
        }
    }

    fn dial_due(&mut self) {
        let now = self.now();
        for (node, addresses) in self.peers.dials(now) {
            let Some(peer) = peer_id(node) else { continue };
            let addresses = addresses.iter().filter_map(|a| a.multiaddr(node)).collect();
            let dial = DialOpts::peer_id(peer)
                .condition(PeerCondition::DisconnectedAndNotDialing)
                .addresses(addresses)
                .build();
            match self.swarm.dial(dial) {
                // Somebody else dials it already; how that ends is told, too.
                Ok(()) | Err(DialError::DialPeerConditionFalse(_)) => {}
                Err(error) => self.dial_failed(node, &error),
            }
        }
    }

    fn dial_failed(&mut self, node: NodeId, error: &DialError) {
        tracing::debug!(%node, %error, "a dial failed");
        self.ends.metrics.dials_failed.increment(1);
        if let DialError::WrongPeerId { address, .. } = error
            && let Some(address) = Address::of(address)
        {
            self.peers.unlearn(node, &address);
        }
        if self.peers.path(node).is_none() {
            self.peers.dial_failed(self.now(), node);
        }
    }

    fn look_up_soon(&mut self) {
        self.lookup_at = self.lookup_at.min(self.now() + TICK);
        self.lookup_pause = LOOKUP_MIN;
    }

    /// Asks the neighbours for nodes near us and near anywhere.
    fn look_up(&mut self) {
        let own = *self.swarm.local_peer_id();
        let kad = &mut self.swarm.behaviour_mut().kad;
        kad.get_closest_peers(own);
        kad.get_closest_peers(PeerId::random());
    }

    /// Takes places on relays where others cannot reach us directly.
    fn take_places(&mut self) {
        let reached = self.listening.iter().any(|at| peers::is_global(at.ip()));
        let unsure = self.nat == Nat::Unknown && !reached;
        if self.nat != Nat::Private && !unsure {
            return;
        }
        for (relay, at) in self.peers.relays() {
            if self.places.len() >= RELAYS_WANTED {
                return;
            }
            // Nobody may be able to tell us that we are unreachable; a relay of the open internet, seen
            // from a private network, says enough.
            let useful = self.nat == Nat::Private || peers::is_global(at.ip());
            let later = self.relays_later.contains_key(&relay);
            if useful && !later && !self.places.contains_key(&relay) {
                self.take_place(relay, at);
            }
        }
    }

    fn take_place(&mut self, relay: NodeId, at: SocketAddr) {
        let Some(circuit) = address::circuit(relay, at) else { return };
        match self.swarm.listen_on(circuit) {
            Ok(listener) => _ = self.places.insert(relay, Place { listener, held: false }),
            Err(error) => {
                tracing::debug!(%relay, %error, "a relay cannot be asked");
                self.relays_later.insert(relay, self.now() + RELAY_RETRY);
            }
        }
    }

    fn leave_relay(&mut self, relay: NodeId) {
        let Some(place) = self.places.remove(&relay) else { return };
        self.relays_later.insert(relay, self.now() + RELAY_RETRY);
        if place.held {
            self.tell(OverlayEvent::RelayLost { relay });
        }
        self.changed = true;
    }

    fn cut_off(&mut self, node: NodeId, why: CutOff) {
        let now = self.now();
        if !self.peers.misbehaved(now, node) {
            return;
        }
        tracing::warn!(%node, why = why.as_str(), "a member misbehaves and is kept away for a while");
        self.ends.metrics.cut_off(why).increment(1);
        if let Some(peer) = peer_id(node) {
            self.swarm.behaviour_mut().allowed.disallow_peer(peer);
            self.swarm.behaviour_mut().kad.remove_peer(&peer);
        }
        self.tell(OverlayEvent::CutOff { node, why });
    }

    fn learn(&mut self, node: NodeId, addresses: Vec<Address>, how: Discovery) {
        if addresses.is_empty() || node_id(self.swarm.local_peer_id()) == Some(node) {
            return;
        }
        let new = match how {
            Discovery::Identify => self.peers.learn(node, &addresses),
            Discovery::Kad | Discovery::Mdns => self.peers.hear(node, &addresses),
        };
        if how == Discovery::Identify
            && let Some(peer) = peer_id(node)
        {
            // The routing table keeps every address it is given: it gets ours, which are bounded.
            let kad = &mut self.swarm.behaviour_mut().kad;
            kad.remove_peer(&peer);
            for address in self.peers.addresses(node).iter().filter_map(|a| a.multiaddr(node)) {
                kad.add_address(&peer, address);
            }
        }
        if new || (how == Discovery::Mdns && !self.peers.is_member(node)) {
            self.tell(OverlayEvent::Discovered { node, addresses, how });
        }
    }

    fn publish_status(&mut self) {
        let external: BTreeSet<Address> =
            self.swarm.external_addresses().filter_map(Address::of).collect();
        let status = OverlayStatus {
            listening: self.listening.iter().copied().collect(),
            external: external.into_iter().collect(),
            relays: self.places.iter().filter(|(_, p)| p.held).map(|(node, _)| *node).collect(),
            nat: self.nat,
            peers: self.peers.paths().collect(),
            members: self.peers.len(),
            restarts: self.restarts,
        };
        let metrics = &self.ends.metrics;
        let count = |path| status.peers.iter().filter(|peer| peer.path == path).count() as f64;
        metrics.peers_direct.set(count(Path::Direct));
        metrics.peers_relayed.set(count(Path::Relayed));
        metrics.members.set(status.members as f64);
        metrics.relays_held.set(status.relays.len() as f64);
        metrics.circuits.set(f64::from(self.circuits));
        metrics.nat(status.nat);
        self.ends.status.send_replace(status);
    }

    /// Closes all connections and lets that be known, for a moment.
    async fn say_goodbye(&mut self) {
        let connected: Vec<PeerId> = self.swarm.connected_peers().copied().collect();
        for peer in connected {
            // It may have gone meanwhile.
            let _ = self.swarm.disconnect_peer_id(peer);
        }
        let goodbyes = async {
            while self.swarm.network_info().num_peers() > 0 {
                self.swarm.select_next_some().await;
            }
        };
        if tokio::time::timeout(GOODBYE_MAX, goodbyes).await.is_err() {
            tracing::debug!("the overlay leaves without saying goodbye to all");
        }
    }
}

/// What the swarm says.
impl Task<'_> {
    fn on_swarm(&mut self, event: SwarmEvent<BehaviourEvent>) -> Option<End> {
        match event {
            SwarmEvent::Behaviour(event) => self.on_behaviour(event),
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                self.on_connected(&peer_id, connection_id, &endpoint);
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, .. } => {
                self.on_closed(&peer_id, connection_id);
            }
            SwarmEvent::IncomingConnectionError { error, .. } => self.on_refused(&error),
            SwarmEvent::OutgoingConnectionError { peer_id: Some(peer), error, .. } => {
                if let Some(node) = node_id(&peer)
                    && !matches!(error, DialError::DialPeerConditionFalse(_))
                {
                    self.dial_failed(node, &error);
                }
            }
            SwarmEvent::NewListenAddr { listener_id, address } => {
                self.on_listening(listener_id, &address);
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                if let Some(Address::Direct(at)) = Address::of(&address) {
                    self.listening.remove(&at);
                    self.changed = true;
                }
            }
            SwarmEvent::ListenerClosed { listener_id, reason, .. } => {
                return self.on_listener_closed(listener_id, reason);
            }
            SwarmEvent::ExternalAddrConfirmed { .. } | SwarmEvent::ExternalAddrExpired { .. } => {
                self.on_external();
            }
            _ => {}
        }
        None
    }

    fn on_connected(&mut self, peer: &PeerId, id: ConnectionId, endpoint: &ConnectedPoint) {
        let Some(node) = node_id(peer) else { return };
        let path = if endpoint.is_relayed() { Path::Relayed } else { Path::Direct };
        let remote = match Address::of(endpoint.get_remote_address()) {
            Some(Address::Direct(at)) => Some(at),
            _ => None,
        };
        let now = self.now();
        if let Some(path) = self.peers.connected(now, node, id, path, remote, endpoint.is_dialer())
        {
            self.tell(OverlayEvent::Connected { node, path, at: self.peers.direct(node) });
        }
        // Who is new may know others; several that come at once are asked together.
        self.look_up_soon();
        self.ends.metrics.connections(endpoint.is_dialer()).increment(1);
        self.changed = true;
    }

    fn on_closed(&mut self, peer: &PeerId, id: ConnectionId) {
        let Some(node) = node_id(peer) else { return };
        match self.peers.closed(self.now(), node, id) {
            Some(Some(path)) => {
                self.tell(OverlayEvent::Connected { node, path, at: self.peers.direct(node) });
            }
            Some(None) => self.tell(OverlayEvent::Disconnected { node }),
            None => {}
        }
        self.changed = true;
    }

    fn on_refused(&mut self, error: &ListenError) {
        let metrics = &self.ends.metrics;
        let reason = match error {
            ListenError::Denied { cause } if is::<allow_block_list::NotAllowed>(cause) => {
                &metrics.refused_stranger
            }
            ListenError::Denied { cause } if is::<connection_limits::Exceeded>(cause) => {
                &metrics.refused_limit
            }
            _ => &metrics.refused_handshake,
        };
        reason.increment(1);
        tracing::debug!(%error, "a connection is refused");
    }

    fn on_listening(&mut self, id: ListenerId, at: &Multiaddr) {
        match Address::of(at) {
            Some(Address::Direct(address)) => {
                self.listening.insert(address);
                if self.reachability == Reachability::Public {
                    self.add_external(at.clone());
                }
                self.tell(OverlayEvent::Listening { address });
            }
            Some(address @ Address::Relayed { relay, .. }) => {
                let Some(place) = self.places.get_mut(&relay).filter(|p| p.listener == id) else {
                    return;
                };
                place.held = true;
                self.tell(OverlayEvent::RelayHeld { relay, address });
            }
            None => {}
        }
        self.changed = true;
    }

    fn on_listener_closed(
        &mut self,
        id: ListenerId,
        reason: Result<(), std::io::Error>,
    ) -> Option<End> {
        let why = reason.err().map_or("it was closed".to_owned(), |error| error.to_string());
        if self.listener == id {
            return Some(End::Deaf(why));
        }
        let relay = self.places.iter().find(|(_, place)| place.listener == id);
        if let Some(relay) = relay.map(|(relay, _)| *relay) {
            tracing::debug!(%relay, why, "a relay is lost");
            self.leave_relay(relay);
        }
        None
    }

    /// A node that others reach directly may serve them as a relay.
    fn on_external(&mut self) {
        let direct = |address: &Multiaddr| matches!(Address::of(address), Some(Address::Direct(_)));
        let status = match self.serve_relay && self.swarm.external_addresses().any(direct) {
            true => relay::Status::Enable,
            false => relay::Status::Disable,
        };
        self.swarm.behaviour_mut().relay.set_status(Some(status));
        self.changed = true;
    }

    fn on_behaviour(&mut self, event: BehaviourEvent) {
        match event {
            BehaviourEvent::Observed(identify::Event::Received {
                connection_id,
                peer_id,
                info,
            }) => {
                self.on_identified(connection_id, &peer_id, info);
            }
            BehaviourEvent::Kad(kad::Event::OutboundQueryProgressed {
                result: kad::QueryResult::GetClosestPeers(found),
                ..
            }) => self.on_found(found),
            BehaviourEvent::Mdns(mdns::Event::Discovered(found)) => self.on_heard(found),
            BehaviourEvent::Gossip(event) => self.on_gossip(event),
            BehaviourEvent::Autonat(autonat::Event::StatusChanged { new, .. }) => self.on_nat(&new),
            BehaviourEvent::Relay(relay::Event::CircuitReqAccepted { .. }) => {
                self.circuits += 1;
                self.changed = true;
            }
            BehaviourEvent::Relay(relay::Event::CircuitClosed { .. }) => {
                self.circuits = self.circuits.saturating_sub(1);
                self.changed = true;
            }
            BehaviourEvent::Dcutr(event) => self.on_punched(event),
            _ => {}
        }
    }

    fn on_identified(&mut self, id: ConnectionId, peer: &PeerId, info: identify::Info) {
        let Some(node) = node_id(peer) else { return };
        if !self.peers.identified(self.now(), node) {
            return self.cut_off(node, CutOff::Identify);
        }
        if info.protocol_version != self.protocol {
            return self.cut_off(node, CutOff::OtherMesh);
        }
        let remote = self.peers.remote(node, id);
        let offers = info.protocols.contains(&relay::HOP_PROTOCOL_NAME);
        self.peers.set_relay(node, offers);
        let told = info.listen_addrs.iter().filter_map(Address::of);
        let addresses: BTreeSet<Address> = told
            .filter(|address| makes_sense(address, remote))
            .take(ADDRESSES_PER_NODE_MAX)
            .collect();
        self.learn(node, addresses.into_iter().collect(), Discovery::Identify);
        if let Some(Address::Direct(address)) = Address::of(&info.observed_addr)
            && self.swarm.behaviour().observed.is_listeners(id)
            && self.observed.len() < CANDIDATES_MAX
            && self.observed.insert(address)
        {
            self.tell(OverlayEvent::Observed { address, by: node });
        }
    }

    fn on_found(&mut self, found: kad::GetClosestPeersResult) {
        let found = match found {
            Ok(found) => found.peers,
            Err(kad::GetClosestPeersError::Timeout { peers, .. }) => peers,
        };
        for peer in found {
            let Some(node) = node_id(&peer.peer_id).filter(|node| self.peers.is_member(*node))
            else {
                continue;
            };
            let addresses = peer.addrs.iter().filter_map(Address::of);
            // Whoever told us may share our host; a loopback address that is wrong costs one dial.
            let shared = self.listening.iter().any(|at| at.ip().is_loopback());
            let from = shared.then_some(std::net::Ipv4Addr::LOCALHOST.into());
            let addresses = addresses.filter(|address| makes_sense(address, from));
            let addresses = addresses.take(ADDRESSES_PER_NODE_MAX).collect();
            self.learn(node, addresses, Discovery::Kad);
        }
    }

    fn on_heard(&mut self, found: Vec<(PeerId, Multiaddr)>) {
        let mut nodes: BTreeMap<NodeId, Vec<Address>> = BTreeMap::new();
        for (peer, address) in &found {
            if let (Some(node), Some(address)) = (node_id(peer), Address::of(address))
                && makes_sense(&address, None)
            {
                nodes.entry(node).or_default().push(address);
            }
        }
        for (node, mut addresses) in nodes {
            addresses.truncate(ADDRESSES_PER_NODE_MAX);
            self.learn(node, addresses, Discovery::Mdns);
        }
    }

    fn on_gossip(&mut self, event: gossipsub::Event) {
        match event {
            gossipsub::Event::Message { propagation_source, message_id, message } => {
                let taken = self.on_message(&propagation_source, message);
                let acceptance = match taken {
                    true => gossipsub::MessageAcceptance::Accept,
                    false => gossipsub::MessageAcceptance::Ignore,
                };
                self.swarm.behaviour_mut().gossip.report_message_validation_result(
                    &message_id,
                    &propagation_source,
                    acceptance,
                );
            }
            gossipsub::Event::Subscribed { peer_id, topic } if topic == self.topic => {
                if let Some(node) = node_id(&peer_id) {
                    self.tell(OverlayEvent::Hears { node });
                }
            }
            gossipsub::Event::SlowPeer { .. } => self.ends.metrics.slow_peers.increment(1),
            _ => {}
        }
    }

    /// Delivers a broadcast; true if it may be passed on.
    fn on_message(&mut self, forwarder: &PeerId, message: gossipsub::Message) -> bool {
        // Strict validation has checked the signature: a message without a source does not come here.
        let source = message.source.as_ref().and_then(node_id);
        let (Some(from), Some(forwarder)) = (source, node_id(forwarder)) else { return false };
        let now = self.now();
        match self.peers.judge(now, from, forwarder, message.data.len()) {
            Verdict::Take => {
                self.ends.metrics.messages_received.increment(1);
                self.tell(OverlayEvent::Message { from, bytes: message.data.into() });
                true
            }
            Verdict::Ignore(why) => {
                match why {
                    Ignored::Stranger => self.ends.metrics.ignored_stranger.increment(1),
                    Ignored::Rate => self.ends.metrics.ignored_rate.increment(1),
                }
                false
            }
            Verdict::CutOff(why) => {
                self.cut_off(forwarder, why);
                false
            }
        }
    }

    fn on_nat(&mut self, status: &autonat::NatStatus) {
        if self.reachability != Reachability::Probe {
            return;
        }
        self.nat = match status {
            autonat::NatStatus::Public(_) => Nat::Public,
            autonat::NatStatus::Private => Nat::Private,
            autonat::NatStatus::Unknown => Nat::Unknown,
        };
        self.changed = true;
        self.tell(OverlayEvent::Reachable { nat: self.nat });
    }

    fn on_punched(&mut self, event: dcutr::Event) {
        let Some(node) = node_id(&event.remote_peer_id) else { return };
        let result = event.result.map(|_| ()).map_err(|error| error.to_string());
        match &result {
            Ok(()) => self.ends.metrics.holes_punched.increment(1),
            Err(error) => {
                tracing::info!(%node, error, "no direct path to a member: it stays on a relay");
                self.ends.metrics.holes_failed.increment(1);
            }
        }
        self.tell(OverlayEvent::HolePunched { node, result });
    }
}

fn is<E: std::error::Error + Send + Sync + 'static>(cause: &ConnectionDenied) -> bool {
    cause.downcast_ref::<E>().is_some()
}
