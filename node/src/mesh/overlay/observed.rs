//! Identify, with candidates for our own address that we pick ourselves.
//!
//! libp2p-identify 0.48 takes the port of a listener instead of the one that a peer saw whenever the two
//! differ. Behind a NAT that gives out ports of its own the result is an address where nobody listens, and
//! hole punching fails in silence. The port that a peer saw is right for a connection that left from the
//! listening socket, which is every connection but those that probe for reachability.

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::task::{Context, Poll};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId, identify};

use super::address::{Address, makes_sense, quic};
use super::limits::CANDIDATES_MAX;

/// [`identify::Behaviour`] whose candidates are the addresses that peers saw, at most
/// [`CANDIDATES_MAX`] in its life, since those who try them out never forget one.
pub(super) struct Observed {
    identify: identify::Behaviour,
    /// Connections that left from a socket of their own; no more than there are connections.
    elsewhere: HashSet<ConnectionId>,
    known: BTreeSet<Multiaddr>,
    pending: VecDeque<Multiaddr>,
}

impl Observed {
    pub(super) fn new(config: identify::Config) -> Observed {
        Observed {
            identify: identify::Behaviour::new(config),
            elsewhere: HashSet::new(),
            known: BTreeSet::new(),
            pending: VecDeque::new(),
        }
    }

    /// True if a connection goes through the socket that we listen on, so that its address is ours.
    pub(super) fn is_listeners(&self, connection: ConnectionId) -> bool {
        !self.elsewhere.contains(&connection)
    }

    fn note(&mut self, connection: ConnectionId, observed: &Multiaddr) {
        let Some(address @ Address::Direct(at)) = Address::of(observed) else { return };
        let address_of_ours = self.is_listeners(connection) && makes_sense(&address, Some(at.ip()));
        if address_of_ours && self.known.len() < CANDIDATES_MAX && self.known.insert(quic(at)) {
            self.pending.push_back(quic(at));
        }
    }
}

impl NetworkBehaviour for Observed {
    type ConnectionHandler = <identify::Behaviour as NetworkBehaviour>::ConnectionHandler;
    type ToSwarm = identify::Event;

    fn handle_pending_inbound_connection(
        &mut self,
        connection: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.identify.handle_pending_inbound_connection(connection, local, remote)
    }

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.identify.handle_established_inbound_connection(connection, peer, local, remote)
    }

    /// Gives no addresses: whom to dial where is the overlay's own decision.
    fn handle_pending_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: Option<PeerId>,
        _: &[Multiaddr],
        _: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        Ok(Vec::new())
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        let handler = self
            .identify
            .handle_established_outbound_connection(connection, peer, address, role, port)?;
        if port == PortUse::New {
            self.elsewhere.insert(connection);
        }
        Ok(handler)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match &event {
            FromSwarm::ConnectionClosed(closed) => {
                self.elsewhere.remove(&closed.connection_id);
            }
            FromSwarm::DialFailure(failed) => {
                self.elsewhere.remove(&failed.connection_id);
            }
            _ => {}
        }
        self.identify.on_swarm_event(event);
    }

    fn on_connection_handler_event(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        self.identify.on_connection_handler_event(peer, connection, event);
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        loop {
            if let Some(candidate) = self.pending.pop_front() {
                return Poll::Ready(ToSwarm::NewExternalAddrCandidate(candidate));
            }
            match std::task::ready!(self.identify.poll(cx)) {
                ToSwarm::NewExternalAddrCandidate(_) => {}
                ToSwarm::GenerateEvent(event) => {
                    if let identify::Event::Received { connection_id, info, .. } = &event {
                        self.note(*connection_id, &info.observed_addr);
                    }
                    return Poll::Ready(ToSwarm::GenerateEvent(event));
                }
                other => return Poll::Ready(other),
            }
        }
    }
}
