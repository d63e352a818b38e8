//! Members that carry packets for two others, and connections over them ([`protocol::carry`]).
//!
//! Where two nodes cannot reach each other, and a hole cannot be punched, each is still connected to
//! somebody whom the other reaches, too. One of these is asked to carry, and the two connect over it as
//! if they were reached at an address ([`super::carried`]). A way without a carrier, once there is one,
//! takes the place of a way with.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use protocol::NodeId;
use protocol::carry::{METHOD, NotCarried, Parcel, Way};
use tokio::sync::mpsc;

use super::carried::{Leaving, is_carried};
use super::connections::{CloseCode, Connection, Connections};
use super::limits::MeshCounters;
use super::rpc::{CODE_FAILED, Call, CallError, Heard, Request};
use super::upkeep::some_of;

impl Connections {
    /// Connects to a member over another one, unless it is connected.
    ///
    /// # Errors
    /// What each of those who were asked said.
    pub(super) async fn connect_carried(self: &Arc<Self>, node: NodeId) -> Result<(), String> {
        if self.to(node).is_some() {
            return Ok(());
        }
        let own = self.identity.id();
        let direct = self.all().into_iter().map(|c| c.link.peer());
        let able = direct.filter(|&peer| peer != node && peer != own && self.is_direct(peer));
        let mut tried = Vec::new();
        for carrier in some_of(able.collect(), CARRIERS_ASKED_MAX) {
            let asked = self.ask_to_carry(carrier, node).await.map_err(|error| error.to_string());
            let connected = match asked {
                Ok(()) => {
                    let at = self.endpoint.carried().way(node, carrier);
                    self.connect(at, Some(node)).await
                }
                Err(why) => Err(why),
            };
            match connected {
                Ok(_) => {
                    tracing::info!(
                        node = %node.short(), carrier = %carrier.short(),
                        "a node that cannot be reached is connected over another one"
                    );
                    return Ok(());
                }
                Err(why) => tried.push(format!("over {}: {why}", carrier.short())),
            }
        }
        match tried.is_empty() {
            true => Err("nobody is connected who could carry".to_owned()),
            false => Err(tried.join("; ")),
        }
    }

    async fn ask_to_carry(&self, carrier: NodeId, node: NodeId) -> Result<(), CallError> {
        let request = Request::new(METHOD, ASK_TIMEOUT, node.0.to_vec());
        let mut stream = self.call(carrier, &request).await?;
        stream.finish();
        match stream.next(ASK_TIMEOUT).await? {
            Heard::Reply(_) => Ok(()),
            Heard::Part(_) | Heard::End => Err(CallError::Unexpected { node: carrier, kind: 0 }),
        }
    }

    /// Answers [`METHOD`].
    pub(super) async fn asked_to_carry(self: &Arc<Self>, call: Call) -> Result<(), CallError> {
        let Call { from, request, stream } = call;
        let Ok(node) = <[u8; 32]>::try_from(&request.body[..]).map(NodeId) else {
            return stream.refuse(CODE_FAILED, "no node's id").await;
        };
        if node == from || !self.is_direct(node) || !self.is_direct(from) {
            return stream.refuse(CODE_FAILED, "that node is not connected here").await;
        }
        let begun = self.carrying().begin(self.now(), from, node);
        match begun {
            Ok(()) => stream.reply(Vec::new()).await,
            Err(why) => stream.refuse(CODE_FAILED, &why.to_string()).await,
        }
    }

    /// Takes a datagram of a member that is a parcel: to be passed on, or for this node.
    pub(super) fn parcel(&self, connection: &Connection, datagram: &[u8]) {
        let from = connection.link.peer();
        // Carriers are not carried.
        let parcel = Parcel::decode(datagram).filter(|_| !is_carried(connection.link.address()));
        let passed = match parcel {
            Some(parcel) if parcel.way == Way::From => {
                self.endpoint.carried().arrived(from, &parcel);
                return;
            }
            Some(parcel) => self.pass_on(from, &parcel, datagram.len()),
            None => Err(NotCarried::Unasked),
        };
        match passed {
            Ok(()) => MeshCounters::add(&self.counters.carried),
            Err(_) => MeshCounters::add(&self.counters.not_carried),
        }
    }

    fn pass_on(&self, from: NodeId, parcel: &Parcel<'_>, bytes: usize) -> Result<(), NotCarried> {
        let to = parcel.node;
        let connection = self.direct(to).ok_or(NotCarried::Unasked)?;
        self.carrying().carry(self.now(), from, to, bytes)?;
        let parcel = Parcel { way: Way::From, node: from, ..*parcel };
        match send(&connection, &parcel) {
            true => Ok(()),
            false => Err(NotCarried::TooMuch),
        }
    }

    /// Sends what QUIC has for carried addresses to the carriers, until the endpoint is gone.
    pub(super) async fn send_carried(self: Arc<Self>, mut leaving: mpsc::Receiver<Leaving>) {
        loop {
            let next = tokio::select! {
                () = self.stop.cancelled() => return,
                next = leaving.recv() => next,
            };
            let Some(Leaving { carrier, to, number, packet }) = next else { return };
            let parcel = Parcel {
                way: Way::To,
                node: to,
                number,
                piece: protocol::carry::Piece::Whole,
                bytes: &packet,
            };
            let sent = self.direct(carrier).is_some_and(|connection| send(&connection, &parcel));
            if !sent {
                MeshCounters::add(&self.counters.not_carried);
            }
        }
    }

    /// Whether a member is connected without a carrier.
    pub(super) fn is_direct(&self, node: NodeId) -> bool {
        self.direct(node).is_some()
    }

    /// A member's connection has begun: if nobody carries it, those that somebody carries end soon.
    pub(super) fn retire_carried(self: &Arc<Self>, connection: &Connection) {
        if is_carried(connection.link.address()) {
            let mut once = self.carried_once.lock().unwrap_or_else(PoisonError::into_inner);
            if once.len() < CARRIED_ONCE_MAX {
                once.insert(connection.link.peer());
            }
            return;
        }
        for old in self.of(connection.link.peer()) {
            if is_carried(old.link.address()) {
                let stop = self.stop.clone();
                // As many as there may be connections.
                self.tasks.spawn(async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = old.link.closed() => {}
                        () = tokio::time::sleep(RETIRE_AFTER) => {
                            old.link.close(CloseCode::Replaced as u32, "there is a way without a carrier");
                        }
                    }
                });
            }
        }
    }

    /// Whether somebody has carried between this node and a member.
    pub(super) fn was_carried(&self, node: NodeId) -> bool {
        self.carried_once.lock().unwrap_or_else(PoisonError::into_inner).contains(&node)
    }

    /// A member is gone: whatever it carried ends, for this node and for others.
    pub(super) fn carrier_gone(&self, carrier: NodeId) {
        self.carrying().gone(carrier);
        for connection in self.every() {
            if self.endpoint.carried().carrier(connection.link.address()) == Some(carrier) {
                connection.link.close(CloseCode::Gone as u32, "its carrier is gone");
            }
        }
    }

    fn carrying(&self) -> std::sync::MutexGuard<'_, protocol::carry::Carrying> {
        self.carrying.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends a parcel unless the connection has much to send already: others need it, too.
fn send(connection: &Connection, parcel: &Parcel<'_>) -> bool {
    let Some(room) = connection.link.datagram_room() else { return false };
    let datagrams = parcel.fit(room);
    !datagrams.is_empty()
        && datagrams.into_iter().all(|datagram| connection.link.send_bulk(Bytes::from(datagram)))
}

/// Members that are asked to carry, one after the other, for one connection.
const CARRIERS_ASKED_MAX: usize = 8;
/// Members of whom it is remembered that others carried to them; of more it is not.
const CARRIED_ONCE_MAX: usize = 1024;
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// Time for the streams on a carried connection to end. Too small: they break, and go on elsewhere. Too
/// large: the carrier carries keep-alives.
const RETIRE_AFTER: Duration = Duration::from_secs(60);
