//! Keeps an overlay running: one that panics, or loses its socket, is built anew after a pause.
//!
//! libp2p reads what peers send, and its gossipsub has panicked on that before (CVE-2026-33040,
//! CVE-2026-34219). Such a fault must not end the node, nor the overlay for good.

use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use libp2p::core::transport::ListenerId;
use libp2p::{Swarm, identity};
use protocol::NodeId;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::address::quic;
use super::behaviour::{self, Behaviour};
use super::limits::{RESTART_MAX, RESTART_MIN};
use super::task::{End, Ends, Task};
use super::transport::QuicTransport;
use super::{OverlayConfig, StartError};
use crate::mesh::quic::Endpoint;

/// A swarm that listens.
pub(super) struct Listening {
    pub swarm: Swarm<Behaviour>,
    pub listener: ListenerId,
}

/// What a swarm is built from, again and again.
pub(super) struct Ground {
    pub config: OverlayConfig,
    pub endpoint: Endpoint,
    pub key: identity::Keypair,
    pub node: NodeId,
}

/// Listens and starts the task. An error leaves nothing behind.
pub(super) fn spawn(ground: Ground, ends: Ends) -> Result<JoinHandle<()>, StartError> {
    let first = ground.listen()?;
    Ok(tokio::spawn(supervise(ground, ends, first)))
}

async fn supervise(ground: Ground, mut ends: Ends, first: Listening) {
    let mut next = Some(first);
    let mut pause = RESTART_MIN;
    let mut restarts = 0;
    loop {
        let began = Instant::now();
        if let Some(listening) = next.take() {
            let task = Task::new(&ground.config, ground.node, listening, &mut ends, restarts);
            // Nothing of a broken task is used again but the ends of its channels, which hold no
            // half-done state.
            match AssertUnwindSafe(task.run()).catch_unwind().await {
                Ok(End::Stopped) => return,
                // The node has closed its endpoint, and means us, too.
                Ok(End::Deaf(_)) if ends.stop.is_cancelled() => return,
                Ok(End::Deaf(reason)) => {
                    tracing::error!(reason, "the overlay has lost its socket and starts anew");
                }
                Err(_) => tracing::error!("the overlay has panicked and starts anew"),
            }
            restarts += 1;
            ends.metrics.restarts.increment(1);
        }
        if began.elapsed() > RESTART_MAX {
            pause = RESTART_MIN;
        }
        tokio::select! {
            () = ends.stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(RESTART_MAX);
        match ground.listen() {
            Ok(listening) => next = Some(listening),
            Err(error) => tracing::error!(%error, "the overlay cannot start anew yet"),
        }
    }
}

impl Ground {
    fn listen(&self) -> Result<Listening, StartError> {
        let transport = QuicTransport::new(self.endpoint.clone());
        let mut swarm = behaviour::swarm(&self.config, self.key.clone(), transport)?;
        let listening = |reason: &dyn std::fmt::Display| StartError::Listen(reason.to_string());
        let at = self.endpoint.address().map_err(|e| listening(&e))?;
        let listener = swarm.listen_on(quic(at)).map_err(|e| listening(&e))?;
        Ok(Listening { swarm, listener })
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;
    use std::time::Duration;

    use protocol::MeshId;
    use protocol::identity::NodeKey;
    use tokio::sync::mpsc::Receiver;

    use super::super::task::Command;
    use super::super::{Address, Member, Overlay, OverlayEvent, OverlayHandle, Path};
    use super::*;
    use crate::mesh::{MeshCounters, MeshLimits};
    use crate::metrics::Metrics;

    fn start(seed: u8, metrics: &Metrics) -> (OverlayHandle, Receiver<OverlayEvent>) {
        let (limits, counters) = (Arc::new(MeshLimits::default()), Arc::<MeshCounters>::default());
        let (key, at) = (NodeKey::from_secret([seed; 32]), "127.0.0.1:0".parse().unwrap());
        let endpoint = Endpoint::bind(&key, at, limits, counters).unwrap();
        tokio::spawn(endpoint.clone().serve_overlay());
        let config = OverlayConfig::new(MeshId([1; 32]));
        Overlay::start(config, &endpoint, metrics.overlay()).unwrap()
    }

    async fn until<T>(
        events: &mut Receiver<OverlayEvent>,
        what: impl Fn(&OverlayEvent) -> Option<T>,
    ) -> T {
        let waiting = async {
            loop {
                let event = events.recv().await.expect("the overlay runs");
                if let Some(found) = what(&event) {
                    return found;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("it happens in time")
    }

    fn listening(event: &OverlayEvent) -> Option<SocketAddr> {
        match event {
            OverlayEvent::Listening { address } => Some(*address),
            _ => None,
        }
    }

    #[tokio::test]
    async fn an_overlay_that_panics_comes_back_on_its_port() {
        let metrics = Metrics::new().unwrap();
        let (a, mut events) = start(1, &metrics);
        let (b, mut events_of_b) = start(2, &Metrics::new().unwrap());
        let at = until(&mut events, listening).await;
        let at_b = until(&mut events_of_b, listening).await;
        let member = |node, addresses: &[SocketAddr]| Member {
            node,
            addresses: addresses.iter().copied().map(Address::Direct).collect(),
        };
        b.set_members(vec![member(a.node(), &[])]);
        a.set_members(vec![member(b.node(), &[at_b])]);
        let connected =
            OverlayEvent::Connected { node: b.node(), path: Path::Direct, at: Some(at_b) };
        let met = |event: &OverlayEvent| (*event == connected).then_some(());
        until(&mut events, met).await;

        a.commands.try_send(Command::Break).unwrap();
        until(&mut events, |e| (*e == OverlayEvent::Restarted).then_some(())).await;
        assert_eq!(until(&mut events, listening).await, at, "others know this port");
        until(&mut events, met).await;
        assert_eq!(a.status().restarts, 1);
        assert!(metrics.render().contains("grapevine_overlay_restarts_total 1"));
    }
}
